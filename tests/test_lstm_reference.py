"""The step-by-step reference against the NumPy oracle, torch.nn.LSTM and finite differences."""

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gatematch.lstm.reference import cell_update, lstm_cell_reference, lstm_reference

torch.set_num_threads(1)

State = tuple[Tensor, Tensor]


def make(
    seed: int, T: int, B: int, I: int, H: int, L: int, bias: bool, bidirectional: bool, P: int
) -> tuple[nn.LSTM, Tensor, State]:
    torch.manual_seed(seed)
    module = nn.LSTM(I, H, L, bias, bidirectional=bidirectional, proj_size=P, dtype=torch.float64)
    cells = L * (1 + bidirectional)
    x = torch.randn(T, B, I, dtype=torch.float64)
    return (
        module,
        x,
        (
            torch.randn(cells, B, P or H, dtype=torch.float64),
            torch.randn(cells, B, H, dtype=torch.float64),
        ),
    )


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 99),
    T=st.integers(1, 5),
    B=st.integers(1, 3),
    I=st.integers(1, 4),
    H=st.integers(2, 5),
    L=st.integers(1, 3),
    bias=st.booleans(),
    bidirectional=st.booleans(),
    projected=st.booleans(),
    with_state=st.booleans(),
    data=st.data(),
)
def test_outputs_and_gradients_equal_the_oracle(
    seed: int,
    T: int,
    B: int,
    I: int,
    H: int,
    L: int,
    bias: bool,
    bidirectional: bool,
    projected: bool,
    with_state: bool,
    data: Any,
) -> None:
    P = H - 1 if projected else 0
    lengths = data.draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B), label="lengths")
    module, x, hx = make(seed, T, B, I, H, L, bias, bidirectional, P)
    params = dict(zip(module.state_dict(), leaves(*module.state_dict().values()), strict=True))
    x, h_0, c_0 = leaves(x, *hx)
    state = (h_0, c_0) if with_state else None
    row_lengths = None if lengths is None else torch.tensor(lengths)
    y, (h_n, c_n), c = lstm_reference(x, params, state, lengths=row_lengths)

    as_numpy = {name: param.detach().numpy() for name, param in params.items()}
    h_first, c_first = (s.detach().numpy() * with_state for s in (h_0, c_0))
    expected, tape = oracle.lstm(x.detach().numpy(), as_numpy, h_first, c_first, lengths)
    for got, want in zip((y, h_n, c_n, c), expected, strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=0, atol=1e-12)

    ups = [torch.randn_like(out) for out in (y, h_n, c_n, c)]
    inputs = [x, *params.values()] + [h_0, c_0] * with_state
    grads = torch.autograd.grad([y, h_n, c_n, c], inputs, ups)
    want_grads = oracle.lstm_backward(tape, *(up.numpy() for up in ups))
    wanted = [want_grads.x, *(want_grads.params[name] for name in params)]
    wanted += [want_grads.h_0, want_grads.c_0] * with_state
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("P", [0, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_equals_torch(bidirectional: bool, P: int) -> None:
    module, x, hx = make(0, 6, 3, 4, 5, 2, True, bidirectional, P)
    y, (h_n, c_n), _ = lstm_reference(x, module.state_dict(), hx)
    want_y, (want_h, want_c) = module(x, hx)
    torch.testing.assert_close((y, h_n, c_n), (want_y, want_h, want_c), rtol=0, atol=1e-13)


def test_cell_equals_torch_and_repeats_to_the_sequence() -> None:
    module, x, (h, c) = make(0, 5, 2, 3, 4, 1, True, False, 0)
    params = module.state_dict()
    cell = nn.LSTMCell(3, 4, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in params.items()})
    y, _, cells = lstm_reference(x, params, (h, c))
    h, c = h[0], c[0]
    for t in range(5):
        want = cell(x[t], (h, c))
        h, c = lstm_cell_reference(x[t], (h, c), *params.values())
        torch.testing.assert_close((h, c), want, rtol=0, atol=1e-14)
        torch.testing.assert_close((y[t], cells[t]), (h, c), rtol=0, atol=1e-14)


def test_cell_update_saturates_to_finite_values() -> None:
    z = torch.tensor([[-1e4, 1e4, 1e4, 1e4]], requires_grad=True)
    h, c = cell_update(z, torch.tensor([[3.0]]))
    assert c.item() == 3.0 and h.item() == pytest.approx(np.tanh(3.0))
    (grad,) = torch.autograd.grad(h.sum(), z)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_reaches_nothing(bidirectional: bool) -> None:
    module, x, hx = make(1, 5, 4, 3, 4, 2, True, bidirectional, 0)
    lengths = torch.tensor([3, 0, 5, 1])
    padding = torch.arange(5)[:, None] >= lengths
    results = []
    for garbage in (0.0, float("nan"), float("inf")):
        dirty = x.masked_fill(padding[..., None], garbage)
        dirty, h_0, c_0, *weights = leaves(dirty, *hx, *module.parameters())
        params = dict(zip(module.state_dict(), weights, strict=True))
        y, (h_n, c_n), c = lstm_reference(dirty, params, (h_0, c_0), lengths=lengths)
        loss = sum(out.square().sum() for out in (y, h_n, c_n, c))
        results.append((y, h_n, c_n, c, *torch.autograd.grad(loss, [dirty, h_0, c_0, *weights])))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)
    y, h_n, c_n, c, grad_x, *_ = results[0]
    for padded in (y, c, grad_x):
        assert not padded[padding].any()
    torch.testing.assert_close((h_n[:, 1], c_n[:, 1]), (hx[0][:, 1], hx[1][:, 1]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_carries_the_cell_state_in_float32(dtype: torch.dtype) -> None:
    """Over 200 steps of a slow accumulation, c keeps what 8 or 11 bits would lose."""
    H = 4
    params = {
        "weight_ih_l0": torch.zeros(4 * H, 1, dtype=dtype),
        "weight_hh_l0": torch.zeros(4 * H, H, dtype=dtype),
        "bias_ih_l0": torch.tensor([0.0, 20.0, 0.01, 0.0], dtype=dtype).repeat_interleave(H),
        "bias_hh_l0": torch.zeros(4 * H, dtype=dtype),
    }
    x = torch.zeros(200, 1, 1, dtype=dtype)
    y, (_, c_n), cells = lstm_reference(x, params)
    want = lstm_reference(x.double(), {name: value.double() for name, value in params.items()})
    assert y.dtype == c_n.dtype == cells.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(c_n.double(), want[1][1], rtol=eps, atol=0)
    torch.testing.assert_close(y.double(), want[0], rtol=2 * eps, atol=0)


@pytest.mark.parametrize(("bidirectional", "P"), [(False, 0), (True, 1)])
def test_gradcheck(bidirectional: bool, P: int) -> None:
    module, x, hx = make(2, 3, 2, 2, 2, 2, True, bidirectional, P)
    names = list(module.state_dict())
    lengths = torch.tensor([3, 1])

    def op(x: Tensor, h_0: Tensor, c_0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        params = dict(zip(names, weights, strict=True))
        y, (h_n, c_n), c = lstm_reference(x, params, (h_0, c_0), lengths=lengths)
        return y, h_n, c_n, c

    inputs = leaves(x, *hx, *module.parameters())
    assert torch.autograd.gradcheck(op, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, inputs, fast_mode=True)


def test_torch_func() -> None:
    module, x, hx = make(3, 3, 2, 2, 3, 1, True, False, 0)
    params = {name: value.detach() for name, value in module.state_dict().items()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        y, (_, c_n), _ = lstm_reference(x, params, hx)
        return y.square().sum() + c_n.sum()

    func = torch.func
    grads = func.grad(loss)(params, x)
    tangents = {name: torch.randn_like(value) for name, value in params.items()}
    _, slope = func.jvp(lambda p: loss(p, x), (params,), (tangents,))
    torch.testing.assert_close(slope, sum((grads[name] * tangents[name]).sum() for name in params))
    xs = torch.randn(4, *x.shape, dtype=x.dtype)
    batched = func.vmap(func.grad(loss), (None, 0))(params, xs)
    for n in range(4):
        torch.testing.assert_close({k: v[n] for k, v in batched.items()}, func.grad(loss)(params, xs[n]))
    hessian = func.hessian(lambda x: loss(params, x))(x)
    torch.testing.assert_close(hessian, func.jacrev(func.jacrev(lambda x: loss(params, x)))(x))
