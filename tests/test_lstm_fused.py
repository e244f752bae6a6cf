"""The layer ops with torch's fused op inside, for compilers and transforms: values, gradients, mapping."""

import lstm_contract
import pytest
import torch
from lstm_contract import DTYPES, check_layer, lengths_of
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from gatematch.lstm import LSTM, functional, lstm, ops
from gatematch.lstm.reference import lstm_reference

KINDS = {
    "plain": {},
    "two layers": {"L": 2, "N": 1},
    "projection": {"P": 3},
    "no bias, batch first": {"bias": False, "batch_first": True, "N": 1},
    "a gradient of the cells": {"upstream": ("y", "h_n", "c_n", "c")},
    "one gradient": {"upstream": ("h_n",)},
}


@pytest.fixture
def through_ops(monkeypatch):
    """Every call that torch computes goes through the ops, but for the peer's."""
    by_ops = [True]
    around = functional.surroundings
    monkeypatch.setattr(
        functional, "surroundings", lambda *args: "torch.func" if by_ops[0] else around(*args)
    )
    of_torch = lstm_contract.of_torch

    def fused(*args):
        by_ops[0] = False
        try:
            return of_torch(*args)
        finally:
            by_ops[0] = True

    monkeypatch.setattr(lstm_contract, "of_torch", fused)
    op, calls = ops.layer, []
    monkeypatch.setattr(ops, "layer", lambda *args: calls.append(args) or op(*args))
    yield
    assert calls and all(impl == "torch" for *_, impl, _ in calls)


@pytest.mark.parametrize("with_lengths", [True, False], ids=["lengths", "full"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, kind, with_lengths, through_ops):
    check_layer(7, 4, 3, 20, dtype, impl="torch", with_lengths=with_lengths, **KINDS[kind])


@pytest.mark.parametrize(("T", "B", "H"), [(1, 1, 1), (1, 17, 65), (63, 3, 3), (3, 64, 64)])
def test_sizes(T, B, H, through_ops):
    check_layer(T, B, 5, H, torch.float32, impl="torch")


@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_sequences(enforce_sorted, cells, through_ops, monkeypatch):
    lengths = torch.tensor([5, 3, 2] if enforce_sorted else [2, 5, 3])
    x = pack_padded_sequence(torch.randn(5, 3, 4), lengths, enforce_sorted=enforce_sorted)
    model = LSTM(4, 6, 2, bidirectional=True)
    got = model(x, return_cells=cells)
    monkeypatch.setattr(functional, "surroundings", lambda *args: "nothing")
    for ours, theirs in zip(got, model(x, return_cells=cells), strict=True):
        if isinstance(ours, PackedSequence):
            assert torch.equal(ours.batch_sizes, theirs.batch_sizes)
            ours, theirs = ours.data, theirs.data
        torch.testing.assert_close(ours, theirs)


def test_the_state_of_a_row_without_steps_is_never_looked_at(through_ops):
    model, x = LSTM(3, 5, bidirectional=True), torch.randn(4, 2, 3)
    h_0 = torch.randn(2, 2, 5, requires_grad=True)
    with torch.no_grad():
        h_0[:, 1] = torch.nan
    y, (h_n, _) = model(x, (h_0, torch.randn(2, 2, 5)), torch.tensor([4, 0]))
    assert not y[:, 1].any() and h_n[:, 1].isnan().all()
    for grad in torch.autograd.grad(y.sum(), [h_0, *model.parameters()]):
        assert grad.isfinite().all()


@pytest.mark.usefixtures("bfloat16_lstm")
def test_autocast_gives_the_dtypes_of_the_fused_op(through_ops, monkeypatch):
    x, lengths = torch.randn(4, 3, 5), torch.tensor([4, 1, 0])
    for options in ({}, {"proj_size": 3}):
        model = LSTM(5, 8, **options)
        for given in (None, lengths):
            with torch.autocast("cpu", torch.bfloat16):
                got = model(x, None, given)
                with monkeypatch.context() as patch:
                    patch.setattr(functional, "surroundings", lambda *args: "nothing")
                    want = model(x, None, given)
            for ours, theirs in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
                assert ours.dtype == theirs.dtype
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


@pytest.mark.parametrize("mapped", ["x", "lengths", "params", "state"])
@pytest.mark.parametrize("gradient", [False, True], ids=["values", "gradients"])
def test_mapped(mapped, gradient):
    """What is mapped becomes a larger batch, or a call for each sample where weights are involved."""
    N, T, B = 3, 4, 5
    model = LSTM(2, 6, bidirectional=True, proj_size=3, dtype=torch.float64)
    given = {
        "x": torch.randn(T, B, 2, dtype=torch.float64),
        "params": {name: p.detach() for name, p in model.named_parameters()},
        "state": (torch.randn(2, B, 3, dtype=torch.float64), torch.randn(2, B, 6, dtype=torch.float64)),
        "lengths": lengths_of(T, B),
    }
    samples = {
        "x": torch.randn(T, N, B, 2, dtype=torch.float64),
        "params": {name: torch.randn(N, *p.shape, dtype=p.dtype) for name, p in given["params"].items()},
        "state": tuple(torch.randn(N, *s.shape, dtype=s.dtype) for s in given["state"]),
        "lengths": torch.stack([lengths_of(T, B) for _ in range(N)], 1),
    }
    dims = {"x": 1, "params": 0, "state": 0, "lengths": 1}

    def total(function):
        def of(x, params, state, lengths):
            y, (h_n, c_n), *_ = function(x, params, state, lengths=lengths)
            return y.sin().sum() + h_n.cos().sum() + c_n.square().sum()

        return torch.func.grad(of, (0, 1, 2)) if gradient else of

    call = [(samples if name == mapped else given)[name] for name in ("x", "params", "state", "lengths")]
    in_dims = tuple(dims[name] if name == mapped else None for name in ("x", "params", "state", "lengths"))
    got = torch.func.vmap(total(lstm), in_dims)(*call)
    want = torch.func.vmap(total(lstm_reference), in_dims)(*call)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("wanted", ["weight_hr_l0", "weight_hh_l0", "bias_hh_l0"])
@pytest.mark.parametrize("T", [1, 2])
def test_gradients_of_weights_that_not_every_result_depends_on(wanted, T, through_ops):
    """After one step, c depends on neither the projection nor, from a zero state, the recurrent weights."""
    model, x = LSTM(3, 4, proj_size=2, dtype=torch.float64), torch.randn(T, 2, 3, dtype=torch.float64)
    params = {name: p.detach().requires_grad_(name == wanted) for name, p in model.named_parameters()}
    for chosen in (lambda y, h, c: y.sum() + c.sin().sum(), lambda y, h, c: c.sin().sum()):

        def total(function, chosen=chosen):
            y, (h_n, c_n), *_ = function(x, params)
            return chosen(y, h_n, c_n) + 0 * params[wanted].sum()

        got, want = (
            torch.autograd.grad(total(f), params[wanted], allow_unused=True, materialize_grads=True)
            for f in (lstm, lstm_reference)
        )
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("options", [{}, {"proj_size": 3}], ids=str)
def test_a_backward_pass_under_autocast_is_exact(options, twice, through_ops):
    model, x = LSTM(3, 8, **options), torch.randn(4, 2, 3, requires_grad=True)

    def gradients(low):
        y = model(x)[0].square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            (slope,) = torch.autograd.grad(y, x, create_graph=twice)
            total = slope.square().sum() if twice else None
            return torch.autograd.grad(total, list(model.parameters())) if twice else slope

    torch.testing.assert_close(gradients(True), gradients(False))


def test_on_the_meta_device(through_ops):
    model = LSTM(3, 8, 2, bidirectional=True, device="meta")
    y, (h_n, _) = model(torch.empty(4, 2, 3, device="meta"))
    assert y.is_meta and y.shape == (4, 2, 16) and h_n.shape == (4, 2, 8)


def test_without_gradients_nothing_is_kept_for_them(through_ops):
    model, x, kept = LSTM(3, 8), torch.randn(4, 2, 3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            y = model(x)[0]
        assert not kept and y.grad_fn is None
        model(x)
    # No result: the layer is computed once more.
    shapes = [tuple(t.shape) for t in kept]
    assert (4, 2, 8) not in shapes and (4, 2, 3) in shapes


def test_lengths_that_are_wrong_are_cut_to_what_is_possible(through_ops):
    model, x = LSTM(3, 8), torch.randn(4, 3, 3)
    compiled = torch.compile(lambda x, n: model(x, lengths=n)[0], backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, torch.tensor([-3, 2, 9])), model(x, lengths=torch.tensor([0, 2, 4]))[0]
    )


@pytest.mark.parametrize("lengths", [None, [3, 1]], ids=["full", "lengths"])
@pytest.mark.parametrize("proj_size", [0, 3])
def test_opcheck_with_cells(proj_size, lengths):
    """Whose strides only the default backend would look at."""
    model = LSTM(2, 5, bidirectional=True, proj_size=proj_size)
    weights = [p.detach() for p in model.parameters()]
    x, h_0, c_0 = torch.randn(3, 2, 2), torch.randn(2, 2, proj_size or 5), torch.randn(2, 2, 5)
    lengths = None if lengths is None else torch.tensor(lengths)
    torch.library.opcheck(
        ops.layer.forward_op, (x, h_0, c_0, lengths, weights, proj_size > 0, "torch", True, True)
    )


def test_a_map_over_no_samples():
    model = LSTM(3, 5)
    params = {name: p.detach() for name, p in model.named_parameters()}
    xs, some = torch.randn(0, 4, 2, 3), {name: p.expand(0, *p.shape) for name, p in params.items()}
    total = lambda x, params: lstm(x, params)[0].sum()  # noqa: E731
    for dims, x, weights in (((0, None), xs, params), ((None, 0), torch.randn(4, 2, 3), some)):
        grads = torch.func.vmap(torch.func.grad(total, (0, 1)), dims)(x, weights)
        assert grads[0].shape == (0, 4, 2, 3)
        assert all(g.shape == (0, *params[name].shape) for name, g in grads[1].items())


def test_one_compiled_function_serves_models_of_different_sizes():
    compiled = torch.compile(lambda x, params: lstm(x, params)[0], fullgraph=True, backend="aot_eager")
    for H in (4, 5, 6):
        model, x = LSTM(3, H), torch.randn(4, 2, 3)
        params = {name: p.detach() for name, p in model.named_parameters()}
        torch.testing.assert_close(compiled(x, params), lstm(x, params)[0])
