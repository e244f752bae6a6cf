"""The Hessian as a matrix and as an operator, against finite differences, torch.func and known spectra."""

import math
import sys
import tracemalloc
import warnings
import weakref

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigsh
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from gatematch.attention import pairwise_attention
from gatematch.curvature import (
    HessianOperator,
    hessian,
    hvp,
    matrix,
    parameter_index,
    spectral_density,
    trace,
)
from gatematch.lstm import LSTM, named_gates

double = torch.float64


def by_differences(loss_fn, tensors, step=1e-5):
    """Rows of central differences of the gradient, one parameter element after the other."""

    def gradient():
        grads = torch.autograd.grad(loss_fn(), tensors, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in grads])

    rows = []
    for tensor in tensors:
        for place in np.ndindex(*tensor.shape):
            value, ends = tensor[place].item(), []
            for moved in (value + step, value - step, value):
                with torch.no_grad():
                    tensor[place] = moved
                ends.append(gradient())
            rows.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(rows)


def leaf(*shape, dtype=double):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def mlp(dtype=double):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    x = torch.randn(6, 3, dtype=dtype)
    return model, lambda: model(x).square().mean()


def quadratic(P=30):
    """A loss whose Hessian is a known matrix."""
    A = torch.randn(P, P, dtype=double)
    A = A + A.T
    w = leaf(P)
    return A, w, lambda: w @ A @ w / 2


def close(H, expected, tolerance=1e-10):
    assert H.shape == expected.shape
    assert expected.abs().max() > 1e-3  # else zeros would do
    assert (H - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def any_shapes():
    scalar, vector, cube, nothing = leaf(), leaf(3), leaf(2, 3, 2), leaf(0, 3)
    strided = torch.randn(4, 3, dtype=double).T.requires_grad_()
    tensors = [scalar, strided, nothing, cube, vector]

    def loss_fn():
        z = torch.tanh(cube.sum(0).T @ strided * scalar)  # (2, 4)
        return (z * z).sum() + (vector * strided.sum(1)).sum().sin() + scalar**3 + nothing.sum()

    return tensors, loss_fn


# The matrix.


def test_a_list_of_tensors_of_any_shape():
    tensors, loss_fn = any_shapes()
    H = hessian(loss_fn, tensors)
    assert H.dtype == double and not H.requires_grad
    close(H, by_differences(loss_fn, tensors), 1e-7)
    rows = list(parameter_index(tensors).values())
    assert rows == [slice(0, 1), slice(1, 13), slice(13, 13), slice(13, 25), slice(25, 28)]


def test_every_kind_of_params_gives_the_same_matrix():
    model, loss_fn = mlp()
    H = hessian(loss_fn, model)
    for params in (list(model.parameters()), model.parameters(), dict(model.named_parameters())):
        assert torch.equal(hessian(loss_fn, params), H)
    assert list(parameter_index(model)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(parameter_index(model.parameters())) == ["0", "1", "2", "3"]
    assert parameter_index({"b": model[0].bias, "w": model[0].weight}) == {
        "b": slice(0, 4),
        "w": slice(4, 16),
    }


@pytest.mark.parametrize("dtype, tolerance", [(double, 1e-12), (torch.float32, 1e-5)])
def test_an_mlp_against_torch_func(dtype, tolerance):
    model, _ = mlp(dtype)
    x = torch.randn(6, 3, dtype=dtype)
    params = {name: p.detach() for name, p in model.named_parameters()}
    blocks = torch.func.hessian(lambda p: functional_call(model, p, (x,)).square().mean())(params)
    sizes = {name: p.numel() for name, p in params.items()}
    expected = torch.cat(
        [torch.cat([blocks[r][c].reshape(sizes[r], sizes[c]) for c in params], 1) for r in params]
    )
    H = hessian(lambda: model(x).square().mean(), model)
    assert H.dtype == dtype
    close(H, expected, tolerance)


def test_a_stacked_bidirectional_projected_lstm_against_differences():
    model = LSTM(2, 3, num_layers=2, bidirectional=True, proj_size=2, dtype=double)
    x = torch.randn(4, 2, 2, dtype=double)

    def loss_fn():
        y, (h, c) = model(x)
        return y.square().sum() + h.sin().sum() + c.square().sum()

    H = hessian(loss_fn, model)
    assert H.shape == (360, 360)
    close(H, by_differences(loss_fn, list(model.parameters())), 1e-6)


@pytest.mark.parametrize("kind", [LSTM, nn.LSTM])
def test_a_float32_lstm_against_float64(kind):
    model = kind(3, 4)
    x = torch.randn(5, 2, 3)
    H = hessian(lambda: model(x)[0].square().sum(), model)
    wide = kind(3, 4, dtype=double)
    wide.load_state_dict(model.state_dict())
    close(H.double(), hessian(lambda: wide(x.double())[0].square().sum(), wide), 1e-5)


def test_an_lstm_with_lengths_against_differences():
    model = LSTM(2, 3, dtype=double)
    x, lengths = torch.randn(5, 3, 2, dtype=double), torch.tensor([5, 0, 2])

    def loss_fn():
        y, (_, c) = model(x, lengths=lengths)
        return y.square().sum() + c.square().sum()

    close(hessian(loss_fn, model), by_differences(loss_fn, list(model.parameters())), 1e-6)


def test_pairwise_attention_against_differences():
    q, a = leaf(1, 3, 4), leaf(1, 2, 4)
    weight = torch.randn(1, 3, 2, dtype=double)

    def loss_fn():
        return (pairwise_attention(q, a) * weight).sum()

    close(hessian(loss_fn, {"q": q, "a": a}), by_differences(loss_fn, [q, a]), 1e-6)


@pytest.mark.parametrize("dtype", [double, torch.float32])
def test_symmetric_to_the_bit(dtype):
    model = LSTM(2, 3, num_layers=2, dtype=dtype)
    x = torch.randn(4, 2, 2, dtype=dtype)
    H = hessian(lambda: model(x)[0].square().sum(), model)
    assert H.abs().max() > 1e-3 and torch.equal(H, H.T)


def test_the_rows_of_a_gate_are_those_of_its_matrix():
    model = LSTM(2, 3, dtype=double)
    x = torch.randn(4, 2, 2, dtype=double)

    def loss_fn():
        return 100 * model(x)[0].square().sum()

    H, start = hessian(loss_fn, model), parameter_index(model)["weight_hh_l0"].start
    W_hf = named_gates(model)["W_hf_l0"]
    rows = slice(start + 9, start + 18)  # gates i, f, g, o, each (3, 3)
    close(H[rows, rows], by_differences(loss_fn, list(model.parameters()))[rows, rows], 1e-6)
    before = W_hf.detach().clone()
    with torch.no_grad():
        model.weight_hh_l0.view(-1)[9:18] += 1
    assert torch.equal(named_gates(model)["W_hf_l0"], before + 1)


def test_unused_and_linear_parameters_have_zero_rows():
    used, unused, linear = leaf(2), leaf(3), leaf(4)
    H = hessian(lambda: (used**3).sum() + linear.sum(), [used, unused, linear])
    assert torch.equal(H, torch.diag(torch.cat([6 * used, torch.zeros(7)])).detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_zero(lambda: linear.sum(), linear)


def assert_zero(loss_fn, w):
    v, P = torch.ones(w.numel(), dtype=double), w.numel()
    assert torch.equal(hessian(loss_fn, [w]), torch.zeros(P, P, dtype=double))
    assert torch.equal(hvp(loss_fn, [w], v), torch.zeros_like(v))
    op = HessianOperator(loss_fn, [w])
    assert not (op @ np.ones(P)).any() and trace(op) == (0, 0)


@pytest.mark.parametrize("take", [hessian, HessianOperator, lambda f, p: hvp(f, p, torch.ones(4).double())])
def test_a_loss_that_depends_on_no_parameter_warns_once(take):
    w, other = leaf(4), leaf(2)
    for loss_fn in (lambda: torch.ones(()), lambda: (other**3).sum()):
        with pytest.warns(
            UserWarning, match=r"^loss_fn: expected a loss that depends on params, got"
        ) as caught:
            take(loss_fn, [w])
        assert [warning.filename for warning in caught] == [__file__]  # the caller's line
        with pytest.warns(UserWarning) as caught:
            assert_zero(loss_fn, w)
        assert len(caught) == 3


def test_a_view_that_the_loss_does_not_read_raises():
    """What people try for one gate: the loss reads the whole parameter, and H would be zero."""
    model, x = LSTM(2, 3).double(), torch.randn(4, 1, 2, dtype=double)
    gates = named_gates(model)
    for loss_fn in (lambda: model(x)[0].square().sum(), lambda: torch.ones(())):
        for take in (hessian, HessianOperator):
            with pytest.raises(
                ValueError, match=r"^params\['W_hf_l0'\]: .* computed from another and not read"
            ):
                take(loss_fn, {"W_hf_l0": gates["W_hf_l0"]})
    read = gates["W_hf_l0"]
    H = hessian(lambda: (read**3).sum(), [read])  # one that the loss reads is a variable like any other
    torch.testing.assert_close(H, torch.diag(6 * read.detach().flatten()))


def test_tied_parameters_have_rows_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    x = torch.randn(4, 3, dtype=double)
    tensors = [model[0].weight, model[0].bias, model[2].bias]

    def loss_fn():
        return model(x).square().sum()

    assert list(parameter_index(model)) == ["0.weight", "0.bias", "2.bias"]
    H = hessian(loss_fn, model)
    close(H, by_differences(loss_fn, tensors), 1e-7)
    assert torch.equal(hessian(loss_fn, [*tensors, model[2].weight]), H)


def test_frozen_parameters_of_a_module_are_left_out():
    model, loss_fn = mlp()
    H = hessian(loss_fn, model)
    model[0].requires_grad_(False)
    assert parameter_index(model) == {"2.weight": slice(0, 8), "2.bias": slice(8, 10)}
    close(hessian(loss_fn, model), H[16:, 16:], 1e-12)


def test_a_parameter_that_is_no_leaf():
    base = leaf(3)
    w = base * 2
    assert torch.equal(hessian(lambda: (w**3).sum(), [w]), torch.diag(6 * w).detach())


def test_only_empty_tensors():
    nothing = leaf(0, 3)
    assert hessian(lambda: nothing.sum(), [nothing]).shape == (0, 0)
    assert hvp(lambda: nothing.sum(), [nothing], torch.ones(0, dtype=double)).shape == (0,)
    op = HessianOperator(lambda: nothing.sum(), [nothing])
    assert trace(op) == (0, 0)
    with pytest.raises(ValueError, match="op: expected at least one row"):
        spectral_density(op)


def test_mixed_dtypes_are_promoted():
    narrow, wide = leaf(3, dtype=torch.float32), leaf(2)

    def loss_fn():
        return (narrow.double()[:2] * wide**2).sum() + (narrow**3).sum()

    H = hessian(loss_fn, [narrow, wide])
    expected = torch.diag(torch.cat([6 * narrow.double(), 2 * narrow[:2].double()]))
    expected[[0, 1], [3, 4]] = expected[[3, 4], [0, 1]] = 2 * wide
    assert H.dtype == double
    close(H, expected.detach(), 1e-6)
    v = torch.randn(5, dtype=double)
    close(hvp(loss_fn, [narrow, wide], v), H @ v, 1e-6)
    assert HessianOperator(loss_fn, [narrow, wide]).dtype == np.float64


def test_block_diagonal():
    tensors, loss_fn = any_shapes()
    H, index = hessian(loss_fn, tensors), parameter_index(tensors)
    blocks = hessian(loss_fn, tensors, block_diagonal=True)
    assert list(blocks) == list(index)
    for name, rows in index.items():
        assert torch.equal(blocks[name], blocks[name].T)
        assert blocks[name].shape == H[rows, rows].shape
        torch.testing.assert_close(blocks[name], H[rows, rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 1000])
def test_chunk_size_bounds_the_rows_at_once(chunk_size, monkeypatch):
    model, loss_fn = mlp()
    H = hessian(loss_fn, model)
    rows = []

    def counted(gradients, vectors, inputs, batched):
        rows.append(len(vectors[0]) if batched else 1)
        return pull_back(gradients, vectors, inputs, batched)

    pull_back = matrix.pull_back
    monkeypatch.setattr(matrix, "pull_back", counted)
    close(hessian(loss_fn, model, chunk_size=chunk_size), H, 1e-12)
    assert sum(rows) == len(H) and max(rows) == min(chunk_size, len(H))


class Square(torch.autograd.Function):
    """x² through numpy, which has no batching rule, and so has its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * Double.apply(x)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(2 * x.detach().numpy())

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(2 * grad.numpy())


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("block_diagonal", [False, True])
def test_operations_without_a_batching_rule(chunk_size, block_diagonal):
    w = leaf(9)
    H = hessian(
        lambda: (Square.apply(w) * w.detach()).sum() + (w.sum() ** 2),
        {"w": w},
        chunk_size=chunk_size,
        block_diagonal=block_diagonal,
    )
    close(H["w"] if block_diagonal else H, (torch.diag(2 * w) + 2).detach(), 1e-12)


class Once(torch.autograd.Function):
    """x³, by a backward pass that says it has no derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0] ** 2


class Cut(Once):
    """x³, by a backward pass that autograd does not see, as of a kernel."""

    @staticmethod
    def backward(ctx, grad):
        return (3 * grad * ctx.saved_tensors[0] ** 2).detach()


@pytest.mark.parametrize("call", [hessian, HessianOperator])
@pytest.mark.parametrize("cube", [Once, Cut])
def test_operations_without_a_second_derivative_raise(cube, call):
    # torch.autograd.grad takes their gradients as constant: silent zeros.
    w, inner, outer = leaf(40), leaf(3), leaf(3, 3)
    with pytest.raises(RuntimeError, match=r"^loss_fn: expected it to be twice differentiable, got"):
        call(lambda: cube.apply(w).sum(), [w])
    with pytest.raises(RuntimeError, match=r"^loss_fn: expected it to be twice differentiable, got"):
        call(lambda: cube.apply(outer @ inner.tanh()).sum(), [inner, outer])
    close(hessian(lambda: (w**3).sum() + cube.apply(inner).sum(), [w]), torch.diag(6 * w).detach())


def test_a_part_that_is_once_differentiable_raises():
    w = leaf(4)
    with pytest.raises(RuntimeError, match=r"^loss_fn: expected it to be twice differentiable, got"):
        hessian(lambda: Once.apply(w).sum() + (w**2).sum(), [w])


def test_operations_whose_gradient_is_zero_are_linear():
    w = leaf(4)
    H = hessian(lambda: w.floor().sum() + w.sign().sum() + w.round()[0], [w])
    assert torch.equal(H, torch.zeros(4, 4, dtype=double))
    loss = leaf()
    assert torch.equal(hessian(lambda: loss, [loss]), torch.zeros(1, 1, dtype=double))


def test_progress_is_shown_on_stderr(capsys):
    pytest.importorskip("rich")
    model, loss_fn = mlp()
    H = hessian(loss_fn, model, progress=True)
    assert torch.equal(H, hessian(loss_fn, model))
    out, err = capsys.readouterr()
    assert "Hessian" in err and not out


def test_progress_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match="progress needs rich"):
        hessian(mlp()[1], mlp()[0], progress=True)


# What the caller has is left alone.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_in_any_grad_mode(mode):
    model, loss_fn = mlp()
    H = hessian(loss_fn, model)
    v = torch.randn(26, dtype=double)
    with mode():
        assert torch.equal(hessian(loss_fn, model), H)
        close(hvp(loss_fn, model, v), H @ v, 1e-12)
        op = HessianOperator(loss_fn, model)
        close(torch.from_numpy(op @ v.numpy()), H @ v, 1e-12)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)


def test_gradients_flags_and_random_states_stay_as_they_are():
    model, loss_fn = mlp()
    model[0].weight.grad = torch.ones(4, 3, dtype=double)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    hessian(loss_fn, model)
    op = HessianOperator(loss_fn, model)
    trace(op, samples=3)
    spectral_density(op, samples=2, steps=3)
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3, dtype=double))
    assert model[0].bias.grad is None and model[2].weight.grad is None
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_graphs_live_no_longer_than_needed():
    model, _ = mlp()
    x, alive = torch.randn(6, 3, dtype=double), []

    def watched():
        y = model(x)  # saved by the square's node
        alive.append(weakref.ref(y))
        return y.square().sum()

    hessian(watched, model)
    hvp(watched, model, torch.ones(26, dtype=double))
    op = HessianOperator(watched, model)
    op @ np.ones(26)
    del op
    assert len(alive) == 3 and not any(ref() is not None for ref in alive)


def test_the_callers_own_graph_is_not_freed():
    model, loss_fn = mlp()
    loss = loss_fn()
    hessian(lambda: loss, model)
    hvp(lambda: loss, model, torch.ones(26, dtype=double))
    HessianOperator(lambda: loss, model) @ np.ones(26)
    loss.backward()
    assert model[0].weight.grad is not None


# The operator.


def test_hvp_and_products_are_those_of_the_matrix():
    model = LSTM(2, 3, bidirectional=True, dtype=double)
    x = torch.randn(4, 2, 2, dtype=double)

    def loss_fn():
        return model(x)[0].square().sum()

    H = hessian(loss_fn, model)
    op = HessianOperator(loss_fn, model)
    assert isinstance(op, LinearOperator) and op.shape == H.shape and op.dtype == np.float64
    assert op.index == parameter_index(model)
    v, V = torch.randn(len(H), dtype=double), torch.randn(len(H), 3, dtype=double)
    Hv = hvp(loss_fn, model, v)
    assert Hv.shape == v.shape and Hv.dtype == double and not Hv.requires_grad
    close(Hv, H @ v, 1e-11)
    for transformed in (op, op.H, op.T):
        close(torch.from_numpy(transformed @ v.numpy()), H @ v, 1e-11)
    close(torch.from_numpy(op.matvec(v[:, None].numpy())), (H @ v)[:, None], 1e-11)
    close(torch.from_numpy(op.matmat(V.numpy())), H @ V, 1e-11)
    close(torch.from_numpy(op.rmatvec(v.numpy())), H @ v, 1e-11)
    close(torch.from_numpy((op + 2 * op) @ v.numpy()), 3 * (H @ v), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_parameters_have_float32_operators(dtype):
    w = leaf(5, dtype=dtype)
    op = HessianOperator(lambda: (w**3).sum(), [w])
    assert op.dtype == np.float32 and (op @ np.ones(5)).dtype == np.float32
    expected = (6 * w.double()).detach()
    close(torch.from_numpy(op @ np.ones(5)).double(), expected, 1e-6 if dtype == torch.float32 else 2e-2)
    assert hessian(lambda: (w**3).sum(), [w]).dtype == dtype


def test_eigsh_finds_the_eigenvalues_of_the_matrix():
    model = LSTM(3, 4, num_layers=2, dtype=double)
    x = torch.randn(5, 3, 3, dtype=double)

    def loss_fn():
        return model(x)[0].square().sum()

    true = torch.linalg.eigvalsh(hessian(loss_fn, model)).numpy()
    op = HessianOperator(loss_fn, model)
    found = eigsh(op, k=3, which="LA", return_eigenvectors=False)
    assert np.abs(np.sort(found) - true[-3:]).max() <= 1e-9 * true[-1]
    assert abs(eigsh(op, k=1, which="SA", return_eigenvectors=False)[0] - true[0]) <= 1e-9 * true[-1]


def test_the_loss_is_called_once_until_a_parameter_changes():
    w, calls = leaf(4), []

    def loss_fn():
        calls.append(None)
        return (w**3).sum()

    op = HessianOperator(loss_fn, [w])
    op @ np.ones(4), op @ np.ones(4)
    assert len(calls) == 1
    with torch.no_grad():
        w += 1
    op @ np.ones(4), op @ np.ones(4)
    assert len(calls) == 2


def test_a_loss_that_fails_once_is_called_again():
    w, fails = leaf(4), []

    def loss_fn():
        if fails:
            raise fails.pop()
        return (w**3).sum()

    op = HessianOperator(loss_fn, [w])
    fails.append(OSError("no data"))
    with torch.no_grad():
        w += 1
    with pytest.raises(OSError, match="no data"):
        op @ np.ones(4)
    close(torch.from_numpy(op @ np.ones(4)), (6 * w).detach(), 1e-12)


def step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.3).step()


def write_to_data(model):
    model[0].weight.data.mul_(1.5)


def swap_data(model):
    model[2].weight.data = torch.randn(2, 4, dtype=double)


def load_the_same_values(model):
    model.load_state_dict(model.state_dict())


def change_a_bias(model):
    with torch.no_grad():
        model[2].bias += 1


@pytest.mark.parametrize("change", [step, write_to_data, swap_data, load_the_same_values, change_a_bias])
def test_products_follow_parameters_that_change_in_place(change):
    model, loss_fn = mlp()
    op = HessianOperator(loss_fn, model)
    v = torch.randn(26, dtype=double)
    op @ v.numpy()
    change(model)
    close(torch.from_numpy(op @ v.numpy()), hessian(loss_fn, model) @ v, 1e-12)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(
            {name: value.clone() for name, value in model.state_dict().items()}, assign=True
        ),
        lambda model: model.float(),
        lambda model: model.weight.requires_grad_(False),
        lambda model: model.register_parameter("bias", None),
    ],
    ids=["replaced", "converted", "frozen", "removed"],
)
def test_parameters_that_are_others_raise(change):
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    op = HessianOperator(lambda: model(x).tanh().square().sum(), model)
    op @ np.ones(8)
    change(model)
    with pytest.raises(RuntimeError, match="make a new operator"):
        op @ np.ones(8)


def test_reentrant_checkpoints_do_not_hide_parameters():
    w, b, x = (torch.randn(3, requires_grad=True) for _ in range(3))

    def loss(use_reentrant):
        inside = checkpoint(lambda x: (w * x).tanh(), x, use_reentrant=use_reentrant)
        return inside.square().sum() + b.square().sum()

    with pytest.raises(RuntimeError, match=r"^loss_fn: expected checkpoints with use_reentrant=False"):
        hessian(lambda: loss(True), [w, b])
    H = hessian(lambda: loss(False), [w, b])
    torch.testing.assert_close(H, hessian(lambda: (w * x).tanh().square().sum() + b.square().sum(), [w, b]))


def test_data_that_changes_in_place_raises_or_stays_as_it_was():
    w, x, v = leaf(4), torch.randn(4, dtype=double), np.ones(4)
    op = HessianOperator(lambda: (w**3 * x).sum(), [w])
    before = op @ v
    x += 1  # which the graph no longer needs
    assert (op @ v == before).all()
    op = HessianOperator(lambda: torch.tanh(x @ w), [w])
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        op @ np.ones(4)


def test_the_operator_holds_no_matrix():
    w = leaf(100_000)  # the matrix would be 80 GB
    op = HessianOperator(lambda: (w**3).sum() + w.sum() ** 2, [w])
    diagonal = (6 * w).detach().numpy()
    v = np.random.default_rng(0).standard_normal(100_000)
    assert np.allclose(op @ v, diagonal * v + 2 * v.sum())
    value, error = trace(op, samples=10)
    assert abs(value - diagonal.sum() - 2e5) <= 6 * 2 * math.sqrt(2e10 / 10) and error > 0
    nodes, _ = spectral_density(op, samples=1, steps=10)
    assert len(nodes) == 10


def test_lanczos_keeps_few_vectors():
    P = 100_000
    diagonal = np.linspace(1, 2, P)
    op = LinearOperator((P, P), matvec=lambda x: diagonal * x.reshape(-1), dtype=float)
    tracemalloc.start()
    spectral_density(op, samples=1, steps=60)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 8 * P


# Trace and density.


def test_the_trace_is_within_its_standard_error():
    A, w, loss_fn = quadratic()
    samples = 400
    value, error = trace(HessianOperator(loss_fn, [w]), samples=samples)
    deviation = math.sqrt(2 * ((A**2).sum() - (A.diag() ** 2).sum()) / samples)
    assert abs(value - A.trace()) <= 4 * deviation
    assert abs(error / deviation - 1) < 0.25


def test_the_trace_of_a_diagonal_matrix_is_exact():
    w = leaf(50)
    value, error = trace(HessianOperator(lambda: (w**3).sum(), [w]), samples=2)
    assert abs(value - 6 * w.sum().item()) < 1e-10 and error < 1e-10


def test_a_seed_gives_the_same_estimates():
    op = HessianOperator(*reversed_quadratic())
    assert trace(op, samples=5) == trace(op, samples=5)
    assert trace(op, samples=5) != trace(op, samples=5, seed=1)
    assert trace(op, samples=5, seed=None) != trace(op, samples=5, seed=None)
    same = [spectral_density(op, samples=2, steps=5, seed=3) for _ in range(2)]
    assert all(np.array_equal(x, y) for x, y in zip(*same, strict=True))


def reversed_quadratic():
    _, w, loss_fn = quadratic()
    return loss_fn, [w]


def test_the_moments_of_the_density():
    A, w, loss_fn = quadratic()
    op, P, samples = HessianOperator(loss_fn, [w]), len(A), 400
    nodes, weights = spectral_density(op, samples=samples, steps=12)
    assert len(nodes) == 12 * samples and (np.diff(nodes) >= 0).all() and (weights >= 0).all()
    assert abs(weights.sum() - 1) < 1e-12
    # The quadrature is exact for what the same random vectors see.
    assert abs(nodes @ weights - trace(op, samples=samples).value / P) < 1e-9
    for power in (1, 2, 3):
        M = torch.linalg.matrix_power(A, power)
        deviation = math.sqrt(2 * ((M**2).sum() - (M.diag() ** 2).sum()) / samples) / P
        assert abs(nodes**power @ weights - M.trace() / P) <= 4 * deviation


def test_the_density_of_a_known_spectrum():
    Q = torch.linalg.qr(torch.randn(60, 60, dtype=double))[0]
    eigenvalues = torch.tensor([-2.0] * 15 + [0.0] * 30 + [1.0] * 14 + [7.0], dtype=double)
    A, w = Q @ torch.diag(eigenvalues) @ Q.T, leaf(60)
    op = HessianOperator(lambda: w @ A @ w / 2, [w])
    nodes, weights = spectral_density(op, samples=200, steps=40)
    distance, counts = np.full(len(nodes), np.inf), {}
    for value in (-2.0, 0.0, 1.0, 7.0):
        near = np.abs(nodes - value)
        counts[value] = weights[near < 1e-6].sum() * 60
        distance = np.minimum(distance, near)
    assert distance[weights > 1e-9].max() < 1e-6
    for value, count in {-2.0: 15, 0.0: 30, 1.0: 14, 7.0: 1}.items():
        projector = Q[:, eigenvalues == value] @ Q[:, eigenvalues == value].T
        deviation = math.sqrt(2 * ((projector**2).sum() - (projector.diag() ** 2).sum()) / 200)
        assert abs(counts[value] - count) <= 4 * deviation
    assert nodes[-1] == pytest.approx(7, abs=1e-9)


def test_many_steps_leave_the_density_as_it_is():
    # Without orthogonalisation eigenvalues come up again; their weight must not.
    diagonal = np.concatenate([np.linspace(0, 1, 500), [10.0, 20.0]])
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((502, 502)))[0]
    op = aslinearoperator(Q @ np.diag(diagonal) @ Q.T)
    nodes, weights = spectral_density(op, samples=4, steps=200)
    assert (np.abs(nodes - 20) < 1e-6).sum() > 4
    draws = np.random.default_rng(0)  # as spectral_density draws
    z = np.stack([draws.integers(0, 2, 502, dtype=np.int8) * 2.0 - 1 for _ in range(4)])
    expected = ((z @ Q) ** 2).mean(0) / 502
    for value in (10.0, 20.0):
        assert abs(weights[np.abs(nodes - value) < 1e-6].sum() - expected[diagonal == value].sum()) < 1e-8
    for power in (1, 2, 5):
        assert nodes**power @ weights == pytest.approx(diagonal**power @ expected, rel=1e-9)


def test_the_density_of_zero_and_of_the_identity():
    for value in (0.0, 3.0):
        nodes, weights = spectral_density(aslinearoperator(value * np.eye(5)), samples=3)
        assert np.allclose(nodes, value) and np.allclose(weights, 1 / 3)


def test_the_smooth_density_integrates_to_one():
    density = spectral_density(HessianOperator(*reversed_quadratic()), samples=3, steps=10)
    grid = np.linspace(density.nodes[0] - 5, density.nodes[-1] + 5, 4000)
    values = density.smooth(grid, 0.5)
    assert values.shape == grid.shape and np.trapezoid(values, grid) == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match=r"^width: expected a finite number over 0, got 0$"):
        density.smooth(grid, 0)


# Errors.

w, other = leaf(3), leaf(2)
LOSS_ERRORS = [
    (lambda: 1.0, TypeError, r"loss_fn\(\): expected a Tensor, got float"),
    (lambda: w * 2, ValueError, r"loss_fn\(\): expected a scalar, got shape \(3,\)"),
    (lambda: torch.tensor(1), TypeError, r"loss_fn\(\): expected dtype .*, got torch.int64"),
    (lambda: w.sum() * 1j, TypeError, r"loss_fn\(\): expected dtype .*, got torch.complex128"),
    (w.sum(), TypeError, "loss_fn: expected a function without arguments, got Tensor; wrap"),
    (None, TypeError, "loss_fn: expected a function without arguments, got NoneType"),
]
CALLS = [hessian, HessianOperator, lambda f, p: hvp(f, p, torch.ones(3, dtype=double))]
NAMES = ["hessian", "operator", "hvp"]


@pytest.mark.parametrize("call", CALLS, ids=NAMES)
@pytest.mark.parametrize("loss_fn, error, message", LOSS_ERRORS)
def test_bad_losses(call, loss_fn, error, message):
    with pytest.raises(error, match=message):
        call(loss_fn, [w])


PARAMS_ERRORS = [
    ([], ValueError, "params: expected at least one tensor, got none"),
    ({}, ValueError, "params: expected at least one tensor, got none"),
    (nn.Tanh(), ValueError, "params: expected at least one tensor that requires gradients, got none"),
    (w, TypeError, "params: expected a module, a mapping or an iterable of tensors, got Tensor; put"),
    (3, TypeError, "params: expected a module, a mapping or an iterable of tensors, got int"),
    ("w", TypeError, "params: expected a module, a mapping or an iterable of tensors, got str"),
    ([w, 1.0], TypeError, r"params\['1'\]: expected a Tensor, got float"),
    (
        nn.Linear(1, 1).named_parameters(),
        TypeError,
        r"params\['0'\]: .* got tuple; .* dict\(named_parameters",
    ),
    ({1: w}, TypeError, "params: expected strings as names, got 1"),
    ([torch.ones(2)], ValueError, r"params\['0'\]: expected requires_grad=True, got False"),
    ([torch.ones(2, dtype=torch.long)], TypeError, r"params\['0'\]: expected dtype .*, got torch.int64"),
    (
        [torch.ones(2, dtype=torch.cfloat)],
        TypeError,
        r"params\['0'\]: expected dtype .*, got torch.complex64",
    ),
    ([w, leaf(2).to("meta")], ValueError, r"params\['1'\]: expected device cpu as the others, got meta"),
]


@pytest.mark.parametrize("call", [*CALLS, lambda f, p: parameter_index(p)], ids=[*NAMES, "index"])
@pytest.mark.parametrize("params, error, message", PARAMS_ERRORS)
def test_bad_params(call, params, error, message):
    def untouched():
        raise AssertionError("the loss was called")

    with pytest.raises(error, match=message):
        call(untouched, params if not hasattr(params, "send") else nn.Linear(1, 1).named_parameters())


def test_sparse_gradients_are_refused():
    model = nn.Embedding(4, 2, sparse=True)
    with pytest.raises(
        ValueError, match=r"^params\['weight'\]: expected a dense gradient, got layout torch.sparse_coo"
    ):
        hessian(lambda: model(torch.tensor([1])).square().sum(), model)


@pytest.mark.parametrize(
    "vector, error, message",
    [
        (np.ones(3), TypeError, "vector: expected a Tensor, got ndarray"),
        (torch.ones(4), ValueError, r"vector: expected shape \(3,\), got \(4,\)"),
        (torch.ones(3, 1), ValueError, r"vector: expected shape \(3,\), got \(3, 1\)"),
        (torch.ones(3), TypeError, "vector: expected dtype torch.float64 as params, got torch.float32"),
        (
            torch.ones(3, dtype=double, device="meta"),
            ValueError,
            "vector: expected device cpu as params, got meta",
        ),
    ],
)
def test_bad_vectors(vector, error, message):
    with pytest.raises(error, match=message):
        hvp(lambda: (w**3).sum(), [w], vector)


def test_a_matrix_too_large_for_memory_is_refused_before_the_loss_is_called(monkeypatch):
    def untouched():
        raise AssertionError("the loss was called")

    huge = leaf(1, dtype=torch.float32).detach().expand(10**8).requires_grad_()
    if sys.platform == "linux":
        with pytest.raises(MemoryError, match=r"and 8e\+07 GB; HessianOperator needs no matrix$"):
            hessian(untouched, [huge])
    two = [leaf(30), leaf(40)]
    for blocks, needed in ((False, 2 * 8 * 70**2), (True, 2 * 8 * (30**2 + 40**2))):
        monkeypatch.setattr(matrix, "_available", lambda device, needed=needed: needed - 1)
        with pytest.raises(
            MemoryError, match=r"^params: expected a Hessian that fits twice into .* got 70 elem"
        ):
            hessian(untouched, two, block_diagonal=blocks)
        for enough in (needed, None):
            monkeypatch.setattr(matrix, "_available", lambda device, enough=enough: enough)
            assert len(hessian(lambda: (two[0] ** 3).sum() + two[1].sum(), two, block_diagonal=blocks))


def test_memory_of_a_machine_a_container_and_a_gpu(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    assert matrix._available(cpu, tmp_path) is None and matrix._available(torch.device("meta")) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal: 9 kB\nMemAvailable:       5 kB\nSwapFree:     2 kB\nHugePages_Total:       0\n"
    )
    assert matrix._available(cpu, tmp_path) == 7 * 1024
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for limit, available in (("max\n", 7 * 1024), ("4096\n", 4096), ("1048576\n", 7 * 1024)):
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(limit)
        assert matrix._available(cpu, tmp_path) == available
    for name, found in (("mem_get_info", (100, 999)), ("memory_reserved", 30), ("memory_allocated", 10)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert matrix._available(torch.device("cuda", 1)) == 120


@pytest.mark.parametrize(
    "chunk_size, error, message",
    [
        (0, ValueError, "chunk_size: expected at least 1, got 0"),
        (-1, ValueError, "chunk_size: expected at least 1, got -1"),
        (2.0, TypeError, "chunk_size: expected an int, got float"),
        (True, TypeError, "chunk_size: expected an int, got bool"),
    ],
)
def test_bad_chunk_sizes(chunk_size, error, message):
    with pytest.raises(error, match=message):
        hessian(lambda: (w**3).sum(), [w], chunk_size=chunk_size)


def test_a_nan_loss_gives_nan_as_a_matrix_and_an_error_as_an_operator():
    def loss_fn():
        return (w**3).sum() * math.nan

    assert hessian(loss_fn, [w]).isnan().all()
    op = HessianOperator(loss_fn, [w])
    for call in (trace, spectral_density, lambda op: eigsh(op, k=1), lambda op: op @ np.ones(3)):
        with pytest.raises(FloatingPointError, match="the product is not finite"):
            call(op)


def test_complex_vectors_and_other_sizes_are_refused_by_the_operator():
    op = HessianOperator(lambda: (w**3).sum(), [w])
    with pytest.raises(TypeError, match="x: expected a real dtype, got complex128"):
        op @ (np.ones(3) * 1j)
    with pytest.raises(ValueError, match=r"(?i)dimension mismatch"):
        op @ np.ones(4)


@pytest.mark.parametrize("call", [trace, spectral_density])
@pytest.mark.parametrize(
    "op, options, error, message",
    [
        (np.eye(2), {}, TypeError, "op: expected a scipy.sparse.linalg.LinearOperator, got ndarray"),
        (
            aslinearoperator(np.ones((2, 3))),
            {},
            ValueError,
            r"op: expected as many rows as columns, got shape \(2, 3\)",
        ),
        (aslinearoperator(1j * np.eye(2)), {}, TypeError, "op: expected a real dtype, got complex128"),
        (aslinearoperator(np.eye(2)), {"samples": 0}, ValueError, "samples: expected at least ., got 0"),
        (aslinearoperator(np.eye(2)), {"samples": 2.5}, TypeError, "samples: expected an int, got float"),
        (aslinearoperator(np.eye(2)), {"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
    ],
)
def test_bad_estimates(call, op, options, error, message):
    with pytest.raises(error, match=message):
        call(op, **options)


def test_bad_steps_and_infinite_operators():
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        spectral_density(aslinearoperator(np.eye(2)), steps=0)
    with pytest.raises(ValueError, match="op: expected finite products, got nan in one"):
        spectral_density(aslinearoperator(np.full((2, 2), math.nan)))
