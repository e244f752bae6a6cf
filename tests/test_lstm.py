"""gatematch.lstm against torch.nn.LSTM: where both call the same fused op, equal to the last bit."""

import copy
import pickle
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gatematch.lstm import LSTM, LSTMCell, convert, init_preset_, lstm, lstm_cell
from gatematch.lstm.gates import PRESETS
from gatematch.lstm.reference import lstm_reference

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
KINDS = {
    "plain": {},
    "no-bias": {"bias": False},
    "two-way": {"bidirectional": True},
    "layers": {"num_layers": 2, "batch_first": True},
    "projection": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
}
LENGTHS = [4, 0, 6, 1, 6]


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=False)


def pair(I: int = 5, H: int = 7, **kind: Any) -> tuple[nn.LSTM, LSTM]:
    torch.manual_seed(0)
    theirs, ours = nn.LSTM(I, H, **kind), LSTM(I, H, **kind)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def make_state(module: LSTM, B: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    cells = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(cells, B, module.proj_size or module.hidden_size, dtype=dtype)
    return h, torch.randn(cells, B, module.hidden_size, dtype=dtype)


def flat(result: Any) -> list[Tensor]:
    """y, h_n, c_n and the cells if there are any, packed ones as their data."""
    y, (h_n, c_n), *cells = result
    return [out.data if isinstance(out, PackedSequence) else out for out in (y, h_n, c_n, *cells)]


def results(call: Callable[..., Any], module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of every input and parameter for fixed upstream gradients."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = flat(call(module, *inputs))
    generator = torch.Generator().manual_seed(1)
    ups = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [*inputs, *module.parameters()], ups)]


def max_error(got: Tensor, want: Tensor) -> float:
    return (got.double() - want).abs().max().item()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch(kind: str, dtype: torch.dtype, training: bool) -> None:
    theirs, ours = (module.to(dtype).train(training) for module in pair(**KINDS[kind]))
    x = torch.randn(3, 4, 5, dtype=dtype)
    hx = make_state(ours, x.shape[1 - ours.batch_first], dtype)
    same(results(lambda m, x: m(x), ours, [x]), results(lambda m, x: m(x), theirs, [x]))

    def with_state(module: nn.Module, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return module(x, (h, c))

    same(results(with_state, ours, [x, *hx]), results(with_state, theirs, [x, *hx]))
    with torch.no_grad():
        same(flat(ours(x, hx)), flat(theirs(x, hx)))
        params = dict(ours.named_parameters())
        same(flat(lstm(x, params, hx, batch_first=ours.batch_first)), flat(theirs(x, hx)))


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched(kind: str) -> None:
    theirs, ours = pair(**KINDS[kind])
    x = torch.randn(4, 5)
    h, c = make_state(ours, 1)
    same(flat(ours(x)), flat(theirs(x)))
    same(flat(ours(x, (h[:, 0], c[:, 0]))), flat(theirs(x, (h[:, 0], c[:, 0]))))
    *_, cells = ours(x, return_cells=True)
    assert cells.shape == (4, 7 * (1 + ours.bidirectional))


@pytest.mark.parametrize("H", [1, 3, 63, 65, 300])
@pytest.mark.parametrize("T", [1, 3])
def test_odd_sizes(H: int, T: int) -> None:
    theirs, ours = pair(I=H, H=H)
    x = torch.randn(T, 3, H)
    same(results(lambda m, x: m(x), ours, [x]), results(lambda m, x: m(x), theirs, [x]))
    got = ours(x, lengths=torch.tensor([T, 0, T // 2]), return_cells=True)
    want = lstm_reference(x, theirs.state_dict(), lengths=torch.tensor([T, 0, T // 2]))
    torch.testing.assert_close(flat(got), flat(want))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str) -> None:
    theirs, ours = pair(**KINDS[kind])
    x = torch.randn((0, 4, 5) if ours.batch_first else (4, 0, 5), requires_grad=True)
    want = flat(theirs(x))
    same(flat(ours(x)), want)
    empty = torch.empty(0, dtype=torch.int64)
    for got in (flat(ours(x, None, empty)), flat(ours(x, None, empty, True))[:3]):
        assert [out.shape for out in got] == [out.shape for out in want]
    ours(x, None, empty)[0].sum().backward()


def test_strided_input_and_state() -> None:
    theirs, ours = pair()
    x = torch.randn(5, 3, 8).permute(2, 1, 0)[::2]
    h, c = (s.transpose(0, 2).contiguous().transpose(0, 2) for s in make_state(ours, 3))
    assert not x.is_contiguous()
    same(flat(ours(x, (h, c))), flat(theirs(x.contiguous(), (h.contiguous(), c.contiguous()))))


def test_construction_is_torchs() -> None:
    for kind in KINDS.values():
        torch.manual_seed(3)
        theirs = nn.LSTM(5, 7, **kind)
        state = torch.random.get_rng_state()
        torch.manual_seed(3)
        ours = LSTM(5, 7, **kind)
        same(torch.random.get_rng_state(), state)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        same(dict(ours.state_dict()), dict(theirs.state_dict()))
        same(ours.all_weights, theirs.all_weights)
        assert repr(ours) == repr(theirs)
        names = ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
        for name in (*names, "bidirectional", "proj_size"):
            assert getattr(ours, name) == getattr(theirs, name)
        theirs.reset_parameters()
        ours.load_state_dict(theirs.state_dict())
        ours.reset_parameters()
        theirs.load_state_dict(ours.state_dict())
        same(dict(theirs.state_dict()), dict(ours.state_dict()))
        ours.flatten_parameters()
    positional = (5, 7, 2, False, True, 0.5, True, 3, torch.device("cpu"), torch.float64)
    assert repr(LSTM(*positional)) == repr(nn.LSTM(*positional))
    assert LSTM(*positional).weight_ih_l0.dtype == torch.float64
    assert LSTM(5, 7, device="meta").weight_ih_l0.is_meta
    assert repr(LSTM(5, 7, impl="torch")) == "LSTM(5, 7, impl=torch)"


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_cell(bias: bool, batched: bool) -> None:
    torch.manual_seed(3)
    theirs = nn.LSTMCell(5, 7, bias)
    torch.manual_seed(3)
    ours = LSTMCell(5, 7, bias)
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    same(dict(ours.state_dict()), dict(theirs.state_dict()))
    shape = (3,) if batched else ()
    inputs = [torch.randn(*shape, 5), torch.randn(*shape, 7), torch.randn(*shape, 7)]

    def call(module: nn.Module, x: Tensor, h: Tensor, c: Tensor) -> Any:
        h_n, c_n = module(x, (h, c))
        return h_n, (c_n, module(x)[1])

    same(results(call, ours, inputs), results(call, theirs, inputs))
    x, *hx = inputs
    same(lstm_cell(x, tuple(hx), *ours.parameters()), theirs(x, tuple(hx)))
    per_sample = torch.func.vmap(lambda x: ours(x)[0])(torch.randn(4, *shape, 5))
    assert per_sample.shape == (4, *shape, 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cell_low_precision_and_empty(dtype: torch.dtype) -> None:
    theirs, ours = nn.LSTMCell(5, 7, dtype=dtype), LSTMCell(5, 7, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    for B in (0, 3):
        x = torch.randn(B, 5, dtype=dtype)
        same(ours(x), theirs(x))


@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequence(kind: str, enforce_sorted: bool) -> None:
    theirs, ours = pair(**KINDS[kind])
    lengths = torch.tensor([4, 3, 3, 1] if enforce_sorted else [1, 3, 4, 3])
    packed = pack_padded_sequence(torch.randn(4, 4, 5), lengths, enforce_sorted=enforce_sorted)
    hx = make_state(ours, 4)

    def call(module: nn.Module, data: Tensor, h: Tensor, c: Tensor) -> Any:
        return module(packed._replace(data=data), (h, c))

    inputs = [packed.data, *hx]
    same(results(call, ours, inputs), results(call, theirs, inputs))
    got, want = ours(packed), theirs(packed)
    same(flat(got), flat(want))
    assert isinstance(got[0], PackedSequence)
    for ours_field, theirs_field in zip(got[0][1:], want[0][1:], strict=True):
        same(ours_field, theirs_field)
    same(pad_packed_sequence(got[0]), pad_packed_sequence(want[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequence_cells(kind: str) -> None:
    _, ours = pair(**KINDS[kind])
    lengths = torch.tensor([1, 3, 4, 3])
    x, hx = torch.randn(4, 4, 5), make_state(ours, 4)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, states, cells = ours(packed, hx, return_cells=True)
    want_y, want_states, want_cells = lstm_reference(x, ours.state_dict(), hx, lengths=lengths)
    padded = [pad_packed_sequence(out)[0] for out in (y, cells)]
    torch.testing.assert_close((padded, states), ([want_y, want_cells], want_states))


@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_equal_packing(kind: str, integer: torch.dtype) -> None:
    theirs, ours = pair(**KINDS[kind])
    lengths = torch.tensor([2, 5, 1, 5], dtype=integer)
    x, hx = torch.randn(6, 4, 5), make_state(ours, 4)  # T is longer than the longest row
    if ours.batch_first:
        x = x.transpose(0, 1)

    def packing(module: nn.Module, x: Tensor, h: Tensor, c: Tensor) -> Any:
        packed = pack_padded_sequence(x, lengths.long(), ours.batch_first, enforce_sorted=False)
        y, states = module(packed, (h, c))
        return pad_packed_sequence(y, ours.batch_first, total_length=6)[0], states

    def padded(module: nn.Module, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return module(x, (h, c), lengths)

    same(results(padded, ours, [x, *hx]), results(packing, theirs, [x, *hx]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_equal_the_reference_whatever_the_padding(kind: str, dtype: torch.dtype) -> None:
    ours = pair(**KINDS[kind])[1].to(dtype)
    lengths = torch.tensor(LENGTHS)
    x, hx = torch.randn(6, 5, 5, dtype=dtype), make_state(ours, 5, dtype)
    x[torch.arange(6)[:, None] >= lengths] = float("nan")

    def call(module: nn.Module, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return module(x.transpose(0, 1) if ours.batch_first else x, (h, c), lengths)

    def reference(module: nn.Module, x: Tensor, h: Tensor, c: Tensor) -> Any:
        y, states, _ = lstm_reference(x, dict(module.named_parameters()), (h, c), lengths=lengths)
        return y.transpose(0, 1) if ours.batch_first else y, states

    got, want = (results(f, ours, [x, *hx]) for f in (call, reference))
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-6}
    torch.testing.assert_close(got, want, **tolerance)
    same((got[1][:, 1], got[2][:, 1]), (hx[0][:, 1], hx[1][:, 1]))


def test_lengths_all_zero() -> None:
    _, ours = pair(bidirectional=True)
    x, hx = torch.full((3, 2, 5), float("nan"), requires_grad=True), make_state(ours, 2)
    y, states = ours(x, hx, torch.zeros(2, dtype=torch.int64))
    same((y, states), (torch.zeros(3, 2, 14), hx))
    y.sum().backward()
    same(x.grad, torch.zeros(3, 2, 5))


@pytest.mark.parametrize("kind", ["layers", "projection"])
@pytest.mark.parametrize("form", ["padded", "unbatched", "packed", "lengths"])
def test_dropout_draws_what_torch_draws(form: str, kind: str) -> None:
    theirs, ours = pair(**KINDS[kind], dropout=0.4)
    lengths = torch.tensor([2, 6, 3, 6, 1, 2])
    x = torch.randn(6, 5) if form == "unbatched" else torch.randn(6, 6, 5)
    packed = x
    if form in ("packed", "lengths"):
        packed = pack_padded_sequence(x, lengths, ours.batch_first, enforce_sorted=False)
    torch.manual_seed(5)
    want = flat(theirs(packed))
    torch.manual_seed(5)
    if form == "lengths":
        got = ours(x, None, lengths)
        got = flat((pack_padded_sequence(got[0], lengths, ours.batch_first, enforce_sorted=False), got[1]))
    else:
        got = flat(ours(packed))
    same(got, want)
    with pytest.raises(AssertionError):  # dropout was at work
        same(flat(ours.eval()(packed))[0], want[0])
    if form in ("padded", "unbatched"):
        torch.manual_seed(5)
        torch.testing.assert_close(flat(ours.train()(x, return_cells=True))[:3], want)


def test_dropout_warning() -> None:
    for cls in (nn.LSTM, LSTM):
        with pytest.warns(UserWarning, match=r"dropout=0.5 and num_layers=1") as record:
            cls(5, 7, dropout=0.5)
    assert record[0].filename == __file__


@pytest.mark.parametrize("kind", KINDS)
def test_cells_equal_the_reference(kind: str) -> None:
    _, ours = pair(**KINDS[kind])
    lengths = torch.tensor(LENGTHS)
    x, hx = torch.randn(6, 5, 5), make_state(ours, 5)
    for row_lengths in (None, lengths):
        want = lstm_reference(x, ours.state_dict(), hx, lengths=row_lengths)
        given = x.transpose(0, 1) if ours.batch_first else x
        y, states, cells = ours(given, hx, row_lengths, return_cells=True)
        plain = ours(given, hx, row_lengths)
        torch.testing.assert_close((y, states), plain)
        if ours.batch_first:
            y, cells = y.transpose(0, 1), cells.transpose(0, 1)
        same((y, states, cells), want)
        assert cells.shape == (6, 5, 7 * (1 + ours.bidirectional))


def test_cells_equal_a_loop_over_torchs_cell() -> None:
    theirs, ours = pair(bidirectional=True)
    x = torch.randn(6, 3, 5)
    *_, cells = ours(x, return_cells=True)
    for direction, suffix in enumerate(("", "_reverse")):
        cell = nn.LSTMCell(5, 7)
        weights = {name: getattr(theirs, f"{name}_l0{suffix}") for name in cell.state_dict()}
        cell.load_state_dict(weights)
        h = c = torch.zeros(3, 7)
        for t in reversed(range(6)) if direction else range(6):
            h, c = cell(x[t], (h, c))
            torch.testing.assert_close(cells[t, :, direction * 7 : direction * 7 + 7], c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cells_in_low_precision_are_as_exact_as_torch(dtype: torch.dtype) -> None:
    theirs, ours = (module.to(dtype) for module in pair(I=33, H=65))
    x = torch.randn(20, 4, 33, dtype=dtype)
    params = {name: value.double() for name, value in theirs.state_dict().items()}
    want = flat(lstm_reference(x.double(), params))
    with torch.no_grad():
        got, peer = flat(ours(x, return_cells=True)), flat(theirs(x))
    for name, exact, value, their_value in zip(("y", "h_n", "c_n"), want, got, peer, strict=False):
        assert value.dtype == dtype
        assert max_error(value, exact) <= 2 * max_error(their_value, exact) + 1e-6, name
    eps = torch.finfo(dtype).eps
    assert max_error(got[3], want[3]) <= 2 * eps * want[3].abs().max().item()


def test_mutated_and_replaced_weights() -> None:
    theirs, ours = pair()
    x = torch.randn(3, 2, 5)
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
        ours.bias_ih_l0.data = torch.ones(28)
    ours.weight_ih_l0 = nn.Parameter(torch.randn(28, 5))
    theirs.load_state_dict(ours.state_dict())
    same(flat(ours(x)), flat(theirs(x)))
    del ours.weight_hh_l0
    ours.weight_hh_l0 = theirs.weight_hh_l0.detach() * 1  # a plain tensor, as weight drop does
    same(flat(ours(x)), flat(theirs(x)))


def test_tied_weights() -> None:
    theirs, ours = pair(I=7, H=7, num_layers=2)
    for module in (theirs, ours):
        module.weight_hh_l0 = module.weight_ih_l1 = module.weight_hh_l1 = module.weight_ih_l0
    assert len(list(ours.parameters())) == 5
    x = torch.randn(3, 2, 7)
    same(results(lambda m, x: m(x), ours, [x]), results(lambda m, x: m(x), theirs, [x]))
    double = ours.double()
    separate = {name: value.detach().clone() for name, value in double.state_dict().items()}
    same(flat(double(x.double())), flat(lstm(x.double(), separate)))


@pytest.mark.parametrize("parametrization", ["weight_norm", "orthogonal", "spectral_norm"])
def test_parametrised_weights(parametrization: str) -> None:
    _, ours = pair()
    getattr(parametrizations, parametrization)(ours, "weight_hh_l0")
    ours.eval()  # spectral_norm changes its buffers in training
    computed = {**dict(ours.named_parameters()), "weight_hh_l0": ours.weight_hh_l0}
    plain = nn.LSTM(5, 7)
    plain.load_state_dict({name: computed[name].detach() for name in plain.state_dict()})
    x = torch.randn(3, 2, 5)
    y, _ = ours(x)
    same(y, plain(x)[0])
    y.sum().backward()
    assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in ours.parameters())
    same(copy.deepcopy(ours)(x)[0], y)
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    same(ours(x)[0], y)


def test_hook_style_weight_norm() -> None:
    theirs, ours = pair()
    with pytest.warns(FutureWarning):
        for module in (theirs, ours):
            nn.utils.weight_norm(module, "weight_hh_l0")
    x = torch.randn(3, 2, 5)
    same(results(lambda m, x: m(x), ours, [x]), results(lambda m, x: m(x), theirs, [x]))


def test_strided_weights() -> None:
    theirs, ours = pair(bidirectional=True)
    params = {
        name: value.t().contiguous().t() if value.dim() == 2 else value.repeat_interleave(2)[::2]
        for name, value in theirs.state_dict().items()
    }
    assert not any(value.is_contiguous() for value in params.values())
    x, lengths = torch.randn(4, 3, 5), torch.tensor([2, 0, 4])
    # Other strides take another matrix product, so the last bit may differ.
    torch.testing.assert_close(flat(lstm(x, params)), flat(theirs(x)), rtol=0, atol=1e-7)
    got, want = lstm(x, params, lengths=lengths), ours(x, None, lengths)
    torch.testing.assert_close(flat(got), flat(want), rtol=0, atol=1e-7)


def test_functional_call() -> None:
    theirs, ours = pair()
    x = torch.randn(3, 2, 5)
    params = {name: torch.randn_like(value) for name, value in ours.named_parameters()}
    same(flat(functional_call(ours, params, (x,))), flat(functional_call(theirs, params, (x,))))


def test_second_derivatives() -> None:
    _, ours = pair(2, 3)
    ours.double()
    lengths = torch.tensor([3, 1])

    def op(x: Tensor, *weights: Tensor) -> Any:
        return flat(
            functional_call(ours, dict(zip(ours.state_dict(), weights, strict=True)), (x, None, lengths))
        )

    inputs = [torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True), *ours.parameters()]
    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, inputs, fast_mode=True)


@pytest.mark.parametrize("with_lengths", [False, True], ids=["full", "lengths"])
def test_torch_func_and_forward_mode(with_lengths: bool) -> None:
    _, ours = pair(2, 3)
    lengths = torch.tensor([3, 1]) if with_lengths else None
    params = {name: value.detach() for name, value in ours.named_parameters()}
    x, tangent = torch.randn(2, 3, 2, 2)

    def loss(x: Tensor, params: dict[str, Tensor] = params) -> Tensor:
        return functional_call(ours, params, (x, None, lengths))[0].square().sum()

    grad = torch.func.grad(loss)(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(loss(leaf), leaf)[0])
    slope = torch.func.jvp(loss, (x,), (tangent,))[1]
    torch.testing.assert_close(slope, (grad * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent, slope)
    hessian = torch.func.hessian(loss)(x)
    curve = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(hessian, curve)
    xs = torch.randn(4, 3, 2, 2)
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=1), (0, None))(xs, params)
    for n in range(4):
        want = torch.func.grad(loss, argnums=1)(xs[n], params)
        torch.testing.assert_close({name: value[n] for name, value in per_sample.items()}, want)


@pytest.mark.usefixtures("bfloat16_lstm")
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(given: torch.dtype) -> None:
    theirs, ours = pair(33, 65, num_layers=2)
    x, lengths = torch.randn(6, 4, 33).to(given), torch.tensor([3, 1, 6, 6])
    params = {name: value.bfloat16().double() for name, value in theirs.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        peer = flat(theirs(x))
        same(flat(ours(x)), peer)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        same(ours(x, None, lengths)[0], pad_packed_sequence(theirs(packed)[0])[0])
        cells = flat(ours(x, return_cells=True))
    want = flat(lstm_reference(x.bfloat16().double(), params))
    for exact, value, their_value in zip(want, cells, peer, strict=False):
        assert value.dtype == their_value.dtype
        assert max_error(value, exact) <= 2 * max_error(their_value, exact)


@pytest.mark.parametrize("parametrised", [False, True], ids=["plain", "parametrised"])
@pytest.mark.parametrize("kind", KINDS)
def test_convert(kind: str, parametrised: bool) -> None:
    theirs, _ = pair(**KINDS[kind])
    if parametrised:
        parametrizations.weight_norm(theirs, "weight_hh_l0")
    theirs.eval()
    calls = []
    handle = theirs.register_forward_hook(lambda *args: calls.append(args))
    x = torch.randn(3, 2, 5)
    want = flat(theirs(x))
    params = dict(theirs.named_parameters())
    ours = convert(theirs)
    assert isinstance(ours, LSTM) and not isinstance(ours, nn.LSTM) and not ours.training
    assert [(n, id(p)) for n, p in ours.named_parameters()] == [(n, id(p)) for n, p in params.items()]
    same(flat(ours(x)), want)
    assert len(calls) == 2
    handle.remove()
    ours(x)
    assert len(calls) == 2
    assert parametrize.is_parametrized(ours) == parametrised
    assert not any(name.startswith(("_flat", "_all_weights")) for name in vars(ours))
    same(flat(copy.deepcopy(ours)(x)), want)
    assert ours.double().weight_hh_l0.dtype == torch.float64
    if parametrised:
        parametrize.remove_parametrizations(ours, "weight_hh_l0")
        assert type(ours) is LSTM


def test_convert_inside_a_model() -> None:
    shared = nn.LSTM(5, 5)
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Linear(5, 5), shared),
            "b": shared,
            "cell": nn.LSTMCell(5, 5, bias=False),
            "gru": nn.GRU(5, 5),
        }
    )
    names = list(model.state_dict())
    x = torch.randn(3, 2, 5)
    want, want_cell = shared(x), model["cell"](x[0])
    assert convert(model) is model
    assert type(model["b"]) is LSTM and model["a"][1] is model["b"]
    assert type(model["cell"]) is LSTMCell and type(model["gru"]) is nn.GRU
    assert list(model.state_dict()) == names
    same(flat(model["b"](x)), flat(want))
    same(model["cell"](x[0]), want_cell)
    assert convert(model)["b"] is model["b"]
    cell = parametrizations.weight_norm(nn.LSTMCell(5, 5), "weight_hh")
    want_cell = cell(x[0])
    same(convert(cell)(x[0]), want_cell)


def test_convert_of_a_network_without_an_lstm_warns(recwarn: pytest.WarningsRecorder) -> None:
    network = nn.Sequential(nn.Linear(5, 5), nn.GRU(5, 5))
    assert convert(network) is network
    (warning,) = recwarn
    assert str(warning.message) == (
        "module: expected a torch.nn.LSTM or LSTMCell in it, got none in a Sequential"
    )
    assert warning.filename == __file__
    recwarn.clear()
    for network in (nn.Sequential(nn.LSTM(5, 5)), nn.LSTMCell(5, 5)):
        convert(convert(network))  # there is nothing to do for ours, and nothing wrong
    assert not recwarn


def test_convert_refuses_what_it_would_break() -> None:
    class Own(nn.LSTM):
        def forward(self, x: Tensor, hx: Any = None) -> Any:
            return super().forward(2 * x, hx)

    model = nn.Sequential(nn.LSTM(5, 5), Own(5, 5))
    with pytest.raises(TypeError, match=r"1: expected a torch.nn.LSTM itself, got its subclass Own"):
        convert(model)
    assert type(model[0]) is nn.LSTM
    patched = nn.LSTM(5, 5)
    patched.forward = lambda x: x
    with pytest.raises(TypeError, match="forward of its own"):
        convert(patched)


def test_the_arguments_are_called_as_torchs() -> None:
    theirs, ours = pair()
    x = torch.randn(3, 2, 5)
    state = make_state(ours, 2)
    same(flat(ours(input=x, hx=state)), flat(theirs(input=x, hx=state)))
    cell, their_cell = LSTMCell(5, 7), nn.LSTMCell(5, 7)
    cell.load_state_dict(their_cell.state_dict())
    same(cell(input=x[0], hx=None), their_cell(input=x[0], hx=None))


@pytest.mark.parametrize("cls", [LSTM, LSTMCell])
def test_copy_and_pickle(cls: type[nn.Module]) -> None:
    module = cls(5, 7, impl="torch")
    x = torch.randn(3, 5)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        same(other(x), module(x))
        assert repr(other) == repr(module)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in module.parameters()}


@pytest.mark.parametrize("with_lengths", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_compiles_to_one_graph(grad: bool, with_lengths: bool) -> None:
    torch._dynamo.reset()  # one code object serves every module here, and versions of it are limited
    _, ours = pair()
    x, lengths = torch.randn(3, 2, 5), torch.tensor([3, 1]) if with_lengths else None
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x, None, lengths), ours(x, None, lengths))
        want = ours(x, None, lengths, True)
        torch.testing.assert_close(compiled(x, None, lengths, True), want)
    if grad:
        got = results(lambda m, x: m(x, None, lengths), compiled, [x])
        torch.testing.assert_close(got, results(lambda m, x: m(x, None, lengths), ours, [x]))


def test_exports_with_dynamic_batch() -> None:
    _, ours = pair(bidirectional=True)
    x = torch.randn(3, 2, 5)
    program = torch.export.export(ours, (x,), dynamic_shapes={"input": {1: torch.export.Dim("B")}})
    wider = torch.randn(3, 4, 5)
    torch.testing.assert_close(program.module()(wider), ours(wider))


NUMBERS = [1, 0, True, np.int64(1), np.int64(0), np.int32(1), np.uint8(1), np.True_, np.False_]
NUMBERS += [torch.tensor(1), np.float64(1), "1", None]


@pytest.mark.parametrize(("ours", "theirs"), [(LSTM, nn.LSTM), (LSTMCell, nn.LSTMCell)])
def test_the_constructors_take_the_numbers_that_torchs_take(ours: Any, theirs: Any) -> None:
    """Of what torch looks at for its truth alone, ours take bools and integers."""
    truths = ("bidirectional", "bias") if theirs is nn.LSTMCell else ("bidirectional",)
    for option in (name for name in theirs.__constants__ if name not in ("mode", "dropout")):
        for value in NUMBERS:
            args = {"input_size": 3, "hidden_size": 4} | {option: value}
            taken = option not in truths or isinstance(value, (Integral, np.bool_))
            if taken:
                torch.manual_seed(0)
                try:
                    peer = theirs(**args)
                except (TypeError, ValueError):
                    taken = False
            if not taken:
                with pytest.raises((TypeError, ValueError), match=f"^{option} (should|must) "):
                    ours(**args)
                continue
            torch.manual_seed(0)
            module = ours(**args)
            assert getattr(module, option) == (bool(value) if option in truths else value)
            same(dict(module.state_dict()), dict(peer.state_dict()))
            if option in ("num_layers", "bidirectional"):  # torch constructs with some that it cannot call
                setattr(peer, option, (int if option == "num_layers" else bool)(value))
            x = torch.randn(2, module.input_size)
            same(module(x), peer(x))


@pytest.mark.parametrize(("I", "H"), [(0, 2), (5, 0), (0, 0)])
def test_a_cell_without_inputs_or_hidden_units(I: int, H: int) -> None:
    theirs, ours = nn.LSTMCell(I, H), LSTMCell(I, H)
    ours.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(3, I), (torch.randn(3, H), torch.randn(3, H))
    for state in (None, hx):
        want = theirs(x, state)
        same(ours(x, state), want)
        h, c = torch.func.vmap(lambda x: ours(x, state))(x[None])  # noqa: B023
        torch.testing.assert_close((h[0], c[0]), want)
    ours.reset_parameters()
    for preset in PRESETS:
        init_preset_(ours, preset)
    sum(out.sum() for out in ours(x, hx)).backward()
