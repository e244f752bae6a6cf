"""Pairwise attention against float64: values, gradients, lengths, and the exactness contract."""

import math
import subprocess
import sys
from functools import partial

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gatematch.attention import (
    AttentionFeatures,
    PairwiseAttention,
    attention_pool,
    ops,
    pairwise_attend,
    pairwise_attention,
    pairwise_sums,
)
from gatematch.attention import blocks as blocks_module
from gatematch.attention import operands as operands_module
from gatematch.attention import tiled as tiled_module
from gatematch.attention.reference import (
    pairwise_attend_reference,
    pairwise_attention_reference,
    pairwise_sums_reference,
)

DISTANCES = [0.0, 1e-6, 1e-4, 1e-2, 0.1, 0.5, 1.0, 2.0, 10.0, 100.0]


def exact(q, a, *lengths):
    return pairwise_attention_reference(q.double(), a.double(), *lengths)


def at_distances(D, dtype=torch.float32, norm=None, offset=0.0):
    """Rows a, and for each several q at known distances from it (before rounding to the dtype)."""
    a = torch.randn(1, 6, D, dtype=torch.float64)
    if norm is not None:
        a = a / a.norm(dim=-1, keepdim=True) * norm
    direction = torch.randn(1, 6, len(DISTANCES), D, dtype=torch.float64)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    q = a[:, :, None] + direction * torch.tensor(DISTANCES, dtype=torch.float64)[:, None]
    return (q.flatten(1, 2) + offset).to(dtype), (a + offset).to(dtype)


def gradients(function, inputs, upstream):
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs), inputs, upstream)


def assert_gradients_exact(q, a, g, grads):
    """Each gradient row within rounding of the sum of the sizes of its terms.

    A far pair's d carries a relative error of up to 11 ε / (2 TAU) = 2.6e-6 and its term falls with d³.
    """
    true = gradients(exact, (q.double(), a.double()), g.double())
    S = exact(q, a)
    for grad, want, weight in zip(
        grads, true, ((g.abs() * S**2).sum(2), (g.abs() * S**2).sum(1)), strict=True
    ):
        error = (grad.double() - want).norm(dim=-1)
        assert (error <= 8e-6 * weight + 1e-12).all(), (error / weight).max()


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("norm", [None, 0.01, 1.0, 2.0, 2.7, 100.0])
@pytest.mark.parametrize("D", [1, 3, 7, 50, 300, 768])
def test_float32_is_exact_at_every_distance(D, norm, offset):
    q, a = at_distances(D, norm=norm, offset=offset)
    S = pairwise_attention(q, a)
    assert (S.double() - exact(q, a)).abs().max() < 1e-6
    g = torch.randn_like(S)
    assert_gradients_exact(q, a, g, gradients(pairwise_attention, (q, a), g))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [1, 7, 50, 300])
def test_low_precision_is_one_rounding_from_exact(D, dtype):
    q, a = at_distances(D, dtype)
    S = pairwise_attention(q, a)
    want = exact(q, a)
    assert S.dtype == dtype
    # Half a unit in the last place of the value, and the float32 error before that rounding.
    assert ((S.double() - want).abs() <= want * torch.finfo(dtype).eps / 2 + 1e-6).all()
    g = torch.randn_like(S)
    grads = gradients(pairwise_attention, (q, a), g)
    for grad, full in zip(grads, gradients(exact, (q.double(), a.double()), g.double()), strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, full.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_float64_equals_the_reference():
    q, a = at_distances(33, torch.float64)
    torch.testing.assert_close(pairwise_attention(q, a), exact(q, a), rtol=0, atol=1e-14)


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_with_lengths_and_poisoned_padding(data):
    B, Q, A = (data.draw(st.integers(0, high)) for high in (4, 9, 9))
    D = data.draw(st.sampled_from([1, 2, 5, 17]))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    q_lengths = torch.tensor([data.draw(st.integers(0, Q)) for _ in range(B)], dtype=torch.int64)
    a_lengths = torch.tensor([data.draw(st.integers(0, A)) for _ in range(B)], dtype=torch.int32)
    words = torch.randn(5, D)
    q, a = words[torch.randint(0, 5, (B, Q))], words[torch.randint(0, 5, (B, A))]  # many equal rows
    v = torch.randn(B, A, 3)
    past_q = torch.arange(Q) >= q_lengths[:, None]
    past_a = torch.arange(A) >= a_lengths[:, None]
    q, a, v = q.clone(), a.clone(), v.clone()
    q[past_q], a[past_a], v[past_a] = math.nan, math.nan, math.nan

    S = pairwise_attention(q, a, q_lengths, a_lengths)
    want = exact(q, a, q_lengths, a_lengths)
    assert S.shape == (B, Q, A)
    torch.testing.assert_close(S.double(), want, rtol=0, atol=1e-6)
    assert (S[(past_q[:, :, None] | past_a[:, None, :]).expand_as(S)] == 0).all()
    r, c = pairwise_sums(q, a, q_lengths, a_lengths)
    torch.testing.assert_close((r.double(), c.double()), (want.sum(2), want.sum(1)), rtol=1e-5, atol=1e-5)

    for normalize in (None, "rows"):

        def ours(q, a, v, normalize=normalize):
            return pairwise_attend(q, a, v, normalize, q_lengths=q_lengths, a_lengths=a_lengths)

        def reference(q, a, v, normalize=normalize):
            return pairwise_attend_reference(q, a, v, q_lengths, a_lengths, normalize)

        g = torch.randn(B, Q, 3)
        double = q.double(), a.double(), v.double()
        torch.testing.assert_close(ours(q, a, v).double(), reference(*double), rtol=1e-5, atol=1e-5)
        grads = gradients(ours, (q, a, v), g)
        for grad, true in zip(grads, gradients(reference, double, g.double()), strict=True):
            torch.testing.assert_close(grad.double(), true, rtol=1e-4, atol=1e-4)
        assert not grads[0][past_q].any() and not grads[1][past_a].any() and not grads[2][past_a].any()

    # An infinite upstream gradient on padding (log of a masked score) must not spread.
    g = torch.randn(B, Q, A)
    true = gradients(lambda q, a: exact(q, a, q_lengths, a_lengths), (q.double(), a.double()), g.double())
    g[(past_q[:, :, None] | past_a[:, None, :]).expand_as(g)] = math.inf
    grads = gradients(lambda q, a: pairwise_attention(q, a, q_lengths, a_lengths), (q, a), g)
    for grad, want in zip(grads, true, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("B", "Q", "A", "D"),
    [(1, 1, 1, 1), (3, 63, 65, 50), (2, 300, 1, 7), (2, 1, 300, 65), (1, 700, 600, 3), (70, 65, 63, 5)],
)
def test_odd_sizes_and_several_tiles(B, Q, A, D):
    q, a = torch.randn(B, Q, D), torch.randn(B, A, D)
    a[:, 0] = q[:, -1]
    S = pairwise_attention(q, a)
    assert (S.double() - exact(q, a)).abs().max() < 1e-6
    assert (S[:, -1, 0] == 1).all()
    g = torch.randn_like(S)
    assert_gradients_exact(q, a, g, gradients(pairwise_attention, (q, a), g))
    true = gradients(lambda q, a: exact(q, a).sum(2), (q.double(), a.double()), g.sum(2).double())
    for grad, want in zip(
        gradients(lambda q, a: pairwise_sums(q, a)[0], (q, a), g.sum(2)), true, strict=True
    ):
        torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-4)


def test_padding_passes_no_gradient_whatever_comes_back():
    """Infinite where S is 0: from the logarithm of S, and from rows that are divided by a sum of nothing."""
    lengths = torch.tensor([3, 2]), torch.tensor([0, 3])
    q, a, v = (torch.randn(2, n, 9, requires_grad=True) for n in (3, 4, 4))
    O = pairwise_attend(q, a, v, "rows", q_lengths=lengths[0], a_lengths=lengths[1])
    want = pairwise_attend_reference(q, a, v, *lengths, "rows")
    grads, true = (torch.autograd.grad(y.square().sum(), (q, a, v)) for y in (O, want))
    torch.testing.assert_close(grads, true)
    low = q.detach().bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(pairwise_attention(low, a.bfloat16(), *lengths).log().sum(), low)
    assert grad.isfinite().all() and grad[1, :2].any() and not grad[0].any() and not grad[1, 2:].any()


def test_many_tiles_of_small_sentences_and_of_long_rows(monkeypatch):
    monkeypatch.setattr(blocks_module, "TILE", 256)
    monkeypatch.setattr(blocks_module, "SIDE", 16)
    words = torch.randn(30, 20)
    for B, Q, A in ((40, 9, 11), (3, 130, 40), (2, 17, 90)):
        q, a = words[torch.randint(0, 30, (B, Q))], words[torch.randint(0, 30, (B, A))]
        q = q + 1e-3 * torch.randn_like(q) * torch.randint(0, 2, (B, Q, 1))  # equal pairs and near ones
        v, g = torch.randn(B, A, 4), torch.randn(B, Q, 4)
        S = pairwise_attention(q, a)
        assert (S.double() - exact(q, a)).abs().max() < 1e-6
        r, c = pairwise_sums(q, a)
        torch.testing.assert_close((r, c), (S.sum(2), S.sum(1)))
        G = torch.randn_like(S)
        assert_gradients_exact(q, a, G, gradients(pairwise_attention, (q, a), G))
        double = q.double(), a.double(), v.double()
        true = gradients(lambda q, a, v: pairwise_attend_reference(q, a, v), double, g.double())
        for grad, want in zip(gradients(pairwise_attend, (q, a, v), g), true, strict=True):
            torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-4)


def test_a_common_offset_is_taken_out(monkeypatch):
    """Otherwise every pair would be near: right, but at a cost that follows all pairs."""
    found = []
    original = tiled_module.near_pairs

    def spy(*args):
        near = original(*args)
        found.append(0 if near is None else near.place.shape[0])
        return near

    monkeypatch.setattr(tiled_module, "near_pairs", spy)
    q, a = torch.randn(4, 30, 40) + 20, torch.randn(4, 33, 40) + 20
    assert (pairwise_attention(q, a).double() - exact(q, a)).abs().max() < 1e-6
    assert sum(found) < 50
    lengths = torch.tensor([3, 30, 0, 12])
    q[lengths[:, None] <= torch.arange(30)] = 1e4
    found.clear()
    S = pairwise_attention(q, a, q_lengths=lengths)
    assert (S.double() - exact(q, a, lengths)).abs().max() < 1e-6
    assert sum(found) < 50


def test_breaking_the_near_branch_shows(monkeypatch):
    q, a = at_distances(300)
    monkeypatch.setattr(tiled_module, "near_pairs", lambda *args: None)
    assert not (pairwise_attention(q, a).double() - exact(q, a)).abs().max() < 1e-6


def test_rows_of_very_different_sizes():
    scale = 10.0 ** torch.randint(-3, 4, (2, 80, 1))
    q, a = torch.randn(2, 80, 30) * scale, torch.randn(2, 80, 30) * scale.flip(1)
    a[:, :40] = q[:, :40] * (1 + 1e-6)
    S = pairwise_attention(q, a)
    assert (S.double() - exact(q, a)).abs().max() < 1e-6
    g = torch.randn_like(S)
    assert_gradients_exact(q, a, g, gradients(pairwise_attention, (q, a), g))


def test_infinite_and_huge_rows_are_far_and_nan_stays_nan():
    q, a = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    q[0, 0], a[0, 1], q[0, 2, 1] = math.inf, 1e25, math.nan
    S = pairwise_attention(q, a)
    assert (S[0, 0] == 0).all() and S[0, 1, 1] < 1e-20 and S[0, 2].isnan().all()
    torch.testing.assert_close(S[0, 1, ::2], exact(q, a)[0, 1, ::2].float())


def test_far_rows_of_the_issue_score_what_they_should():
    q, a = torch.tensor([[1e20, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1e19]])
    v = torch.tensor([[1.0], [3.0]])
    for D in (2, 5):  # from the differences, and by the product
        q, a = (torch.nn.functional.pad(x, (0, D - x.shape[1])) for x in (q, a))
        torch.testing.assert_close(pairwise_attend(q, a, v, "rows"), torch.tensor([[1.99751]]))
        assert attention_pool(q, a, 1)[0][0, 0].item() == pytest.approx(1.995037)
        for dtype, size in ((torch.float32, 1e5), (torch.float64, 1e140)):
            rows, others = q.to(dtype) * size, a.to(dtype) * size
            want = [[1 / (1 + math.dist(x, y)) for y in others.tolist()] for x in rows.tolist()]
            torch.testing.assert_close(pairwise_attention(rows, others), torch.tensor(want, dtype=dtype))


def extreme(e, B, Q, A, D):
    """Rows of about the size e, one of size 1 and one equal to another beside them."""
    q, a = torch.randn(B, Q, D) * e, torch.randn(B, A, D) * e
    if A > 1:
        a[:, 0] = q[:, 0]
        if e > 1:
            a[:, 1] = torch.randn(D)
    return q, a


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("e", [1e-35, 1e-30, 1e-12, 1e12, 1e16, 1.2e19, 1e20, 1e30, 1e36])
@pytest.mark.parametrize("D", [1, 4, 5, 300])
def test_extreme_rows_have_exact_scores_and_gradients(D, e, reference):
    by = pairwise_attention_reference if reference else pairwise_attention
    for B, Q, A in ((1, 3, 1), (2, 3, 63), (1, 65, 9)):
        q, a = extreme(e, B, Q, A, D)
        q_lengths, a_lengths = torch.tensor([Q, Q - 2][:B]), torch.tensor([A, A // 2][:B])
        for x, n in ((q, q_lengths), (a, a_lengths)):
            x[torch.arange(x.shape[1]) >= n[:, None]] = math.nan
        # S falls with d and its gradient with d²: an upstream of the size of d keeps them within float32.
        g = torch.randn(B, Q, A) * max(1, e)
        S = by(q, a, q_lengths, a_lengths)
        want = exact(q, a, q_lengths, a_lengths)
        assert ((S - want).abs() <= 1e-6 * want + 1e-37).all() and (S[0, 0, 0] == 1 or A == 1)
        lengths = {"q_lengths": q_lengths, "a_lengths": a_lengths}
        got = gradients(partial(by, **lengths), (q, a), g)
        true = gradients(
            partial(pairwise_attention_reference, **lengths), (q.double(), a.double()), g.double()
        )
        sizes = g.double().abs() * want.square()
        for x, y, size in zip(got, true, (sizes.sum(2), sizes.sum(1)), strict=True):
            assert ((x - y).norm(dim=-1) <= 8e-6 * size + 1e-37).all()


@pytest.mark.parametrize("D", [3, 20])
@pytest.mark.parametrize("e", [1e-30, 1e20, 1e30])
def test_attend_of_extreme_rows_has_gradients_in_every_mode(e, D):
    q, a, v = torch.randn(1, 6, D) * e, torch.randn(1, 7, D) * e, torch.randn(1, 7, 2)
    g = torch.randn(1, 6, 2)

    def attend(q, a, v):
        return pairwise_attend(q, a, v, "rows")

    def true(q, a, v):
        return pairwise_attend_reference(q, a, v, normalize="rows")

    wide = [x.double() for x in (q, a, v)]
    O, want = attend(q, a, v), true(*wide)
    close = {"rtol": 1e-4, "atol": 0, "check_dtype": False}
    torch.testing.assert_close(O, want, **close)
    for x, y in zip(gradients(attend, (q, a, v), g), gradients(true, wide, g.double()), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * y.abs().max().item(), check_dtype=False)
    dot = torch.func.jvp(attend, (q, a, v), (q.roll(1, 1), a.roll(1, 1), v))[1]
    dot64 = torch.func.jvp(true, tuple(wide), (wide[0].roll(1, 1), wide[1].roll(1, 1), wide[2]))[1]
    torch.testing.assert_close(dot, dot64, rtol=1e-4, atol=1e-5 * dot64.abs().max().item(), check_dtype=False)
    many = torch.vmap(attend)(*(torch.stack([x, x]) for x in (q, a, v)))
    torch.testing.assert_close(many[1], O)


@pytest.mark.parametrize("e", [1e-12, 1.0, 1e10, 1e12])
def test_the_reference_scales_without_a_change_of_any_derivative(e):
    q, a, v = torch.randn(1, 3, 4) * e, torch.randn(1, 5, 4) * e, torch.randn(1, 5, 2)

    def plain(q, a, v):
        S = 1 / (1 + (q[:, :, None] - a[:, None]).square().sum(-1).sqrt())
        return (S @ v) / S.sum(2, keepdim=True)

    def of(function, *rows):
        rows = [x.clone().requires_grad_() for x in rows]
        first = torch.autograd.grad(function(*rows).square().sum(), rows, create_graph=True)
        turned = [x.detach().roll(1, 1) for x in rows[:2]]
        second = torch.autograd.grad((first[0] * turned[0]).sum() + (first[1] * turned[1]).sum(), rows)
        return [*first, *second]

    want = of(plain, q.double(), a.double(), v.double())
    for function in (pairwise_attend, pairwise_attend_reference):
        for x, y in zip(of(partial(function, normalize="rows"), q, a, v), want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * y.abs().max().item(), check_dtype=False)


def test_padding_beside_far_rows_with_an_offset_scores_nothing():
    """The centred padding times a far row overflows, and an infinite norm less that is NaN."""
    q, a, v = 1e34 * torch.randn(1, 9, 20), torch.randn(1, 7, 20) + 1e10, torch.ones(1, 7, 2)
    n = torch.tensor([2])
    a[:, 2:] = math.nan
    S = pairwise_attention(q, a, a_lengths=n)
    torch.testing.assert_close(S, exact(q, a, None, n).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(pairwise_attend(q, a, v, "rows", a_lengths=n), v[:, :1].expand(1, 9, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
def test_an_offset_of_many_sentences_is_seen_before_their_product(shared, dtype, monkeypatch):
    measured = []
    measure = operands_module.Operands.measure
    monkeypatch.setattr(
        operands_module.Operands, "measure", lambda x: (measured.append(x.offset is not None), measure(x))
    )
    offset = 10 if shared else 10 * torch.randn(64, 1, 210)
    q, a = torch.randn(64, 40, 210) + offset, torch.randn(64, 40, 210) + offset
    lengths = torch.randint(2, 41, (64,))
    lengths[0] = 2
    q, a = q.to(dtype), a.to(dtype)
    for n in (None, lengths):
        measured.clear()
        rows = a if n is None else a.masked_fill((torch.arange(40) >= n[:, None])[..., None], math.nan)
        S = pairwise_attention(q, rows, None, n)
        assert measured == [True]
        torch.testing.assert_close(S, exact(q, rows, None, n).to(dtype), rtol=0, atol=1e-6)
    # Nothing is found where there is nothing, or no number.
    for rows in (torch.randn_like(a), a.clone().index_fill_(1, torch.tensor(0), math.nan)):
        measured.clear()
        pairwise_attention(torch.randn_like(q), rows)
        assert measured[0] is False


def test_zero_rows_and_equal_rows_pass_no_gradient():
    q = torch.cat([torch.zeros(1, 2, 5), torch.ones(1, 2, 5)], 1).requires_grad_()
    S = pairwise_attention(q, q)
    assert (S[0, :2, :2] == 1).all() and (S[0, 2:, 2:] == 1).all()
    (grad,) = torch.autograd.grad(S[0, :2, :2].sum() + S[0, 2:, 2:].sum(), q)
    assert not grad.any()


def test_reduced_precision_switches_and_autocast_do_not_reach_it():
    q, a = at_distances(300)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            S = pairwise_attention(q, a)
            g = torch.randn_like(S)
            grads = gradients(pairwise_attention, (q, a), g)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert S.dtype == torch.float32
    assert (S.double() - exact(q, a)).abs().max() < 1e-6
    assert_gradients_exact(q, a, g, grads)


def test_strided_inputs_and_expanded_gradients():
    q, a = torch.randn(7, 20, 12).permute(1, 0, 2)[::2], torch.randn(10, 8, 24)[..., ::2]
    assert (pairwise_attention(q, a).double() - exact(q, a)).abs().max() < 1e-6
    one = torch.ones(())
    grads = gradients(lambda q, a: pairwise_attention(q, a).sum(), (q, a), one)
    true = gradients(lambda q, a: exact(q, a).sum(), (q.double(), a.double()), one.double())
    for grad, want in zip(grads, true, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-5)


def test_unbatched_equals_a_batch_of_one():
    q, a, v = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4, 2)
    torch.testing.assert_close(pairwise_attention(q, a), pairwise_attention(q[None], a[None])[0])
    torch.testing.assert_close(pairwise_attend(q, a, v), pairwise_attend(q[None], a[None], v[None])[0])
    torch.testing.assert_close(pairwise_sums(q, a)[1], pairwise_sums(q[None], a[None])[1][0])


@pytest.mark.parametrize("B,Q,A", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(B, Q, A):
    q, a = torch.randn(B, Q, 5, requires_grad=True), torch.randn(B, A, 5, requires_grad=True)
    v = torch.randn(B, A, 2, requires_grad=True)
    S = pairwise_attention(q, a)
    assert S.shape == (B, Q, A)
    O = pairwise_attend(q, a, v, "rows")
    assert O.shape == (B, Q, 2) and not O.any()
    r, c = pairwise_sums(q, a)
    assert r.shape == (B, Q) and c.shape == (B, A)
    (S.sum() + O.sum() + r.sum() + c.sum()).backward()
    assert not q.grad.any() and not a.grad.any() and not v.grad.any()


def test_reference_against_the_numpy_oracle():
    rng = np.random.default_rng(0)
    q, a = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 4, 3))
    a[0, 1] = q[0, 2]
    g = rng.normal(size=(2, 5, 4))
    lengths = np.array([5, 3]), np.array([2, 4])
    q_lengths, a_lengths = map(torch.from_numpy, lengths)
    tensors = torch.from_numpy(q), torch.from_numpy(a)
    S = pairwise_attention_reference(*tensors, q_lengths, a_lengths)
    want_S, tape = oracle.pairwise(q, a, *lengths)
    np.testing.assert_allclose(S, want_S, atol=1e-14)
    grads = gradients(
        lambda q, a: pairwise_attention_reference(q, a, q_lengths, a_lengths), tensors, torch.from_numpy(g)
    )
    for grad, want in zip(grads, oracle.pairwise_backward(tape, g), strict=True):
        np.testing.assert_allclose(grad, want, atol=1e-12)


@pytest.mark.parametrize("function", [pairwise_attention, pairwise_attention_reference])
def test_derivatives_of_attention(function):
    torch.manual_seed(0)
    q, a = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    q.requires_grad_(), a.requires_grad_()
    assert gradcheck(function, (q, a)) and gradgradcheck(function, (q, a))


def test_derivatives_of_the_streaming_ops():
    torch.manual_seed(0)
    q, a, v = (torch.randn(1, n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4))
    lengths = dict(q_lengths=torch.tensor([2]), a_lengths=torch.tensor([3]))
    for normalize in (None, "rows"):

        def attend(q, a, v, normalize=normalize):
            return pairwise_attend(q, a, v, normalize, **lengths)

        assert gradcheck(attend, (q, a, v)) and gradgradcheck(attend, (q, a, v))
    assert gradcheck(lambda q, a: pairwise_sums(q, a, **lengths), (q, a))
    assert gradgradcheck(lambda q, a: pairwise_sums(q, a, **lengths), (q, a))


def test_second_derivative_when_one_side_is_computed_from_the_other():
    q = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)

    def loss(function):
        return function(q, q.sin() * 2).square().sum()

    def hessian_vector(function):
        (grad,) = torch.autograd.grad(loss(function), q, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), q)[0]

    torch.testing.assert_close(
        hessian_vector(pairwise_attention), hessian_vector(pairwise_attention_reference)
    )


def test_second_derivative_at_zero_distance_is_finite():
    q = torch.randn(1, 3, 4, requires_grad=True)
    S = pairwise_attention(q, q.detach())
    (grad,) = torch.autograd.grad(S.sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), q)
    assert grad.isfinite().all() and second.isfinite().all()


def test_first_derivative_never_pays_for_the_second(monkeypatch):
    from gatematch.attention import ops

    monkeypatch.setattr(ops.attention, "reference", lambda **named: pytest.fail("the reference was called"))
    q = torch.randn(1, 3, 4, requires_grad=True)
    pairwise_attention(q, q).sum().backward()
    torch.func.grad(lambda q: pairwise_attention(q, q).sum())(q)


def test_two_runs_are_equal_to_the_bit():
    words = torch.randn(40, 16)
    q, a = words[torch.randint(0, 40, (9, 50))], words[torch.randint(0, 40, (9, 50))] + 1e-3
    g = torch.randn(9, 50, 50)
    first, second = (gradients(pairwise_attention, (q, a), g) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


MEMORY = """
import resource, torch
from gatematch.attention import pairwise_attend, pairwise_sums
def run(L):
    q, a, v = (torch.randn(1, L, 64, requires_grad=True) for _ in range(3))
    pairwise_attend(q, a, v, "rows").sum().backward()
    r, c = pairwise_sums(q, a)
    (r.sum() + c.sum()).backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
run(1024)
before = peak()
run({L})
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts bytes elsewhere")
@pytest.mark.parametrize("L", [8192, pytest.param(16384, marks=pytest.mark.slow)])
def test_streaming_memory_does_not_grow_with_the_pairs(L):
    code = MEMORY.format(L=L)
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 0.1 * L * L * 4


def test_modules():
    q, a = torch.randn(3, 5, 4), torch.randn(3, 6, 4)
    lengths = torch.tensor([5, 2, 0]), torch.tensor([6, 1, 3])
    torch.testing.assert_close(PairwiseAttention()(q, a, *lengths), pairwise_attention(q, a, *lengths))
    features = AttentionFeatures(4, length=8)
    assert {name: tuple(p.shape) for name, p in features.named_parameters()} == {
        "weight_q": (4, 8),
        "weight_a": (4, 8),
    }
    F_q, F_a = features(q, a, *lengths)
    S = exact(q, a, *lengths).float()
    for b in range(3):  # W0·Sᵀ and W1·S of the paper, words as columns
        torch.testing.assert_close(F_q[b].T, features.weight_q[:, :6] @ S[b].T)
        torch.testing.assert_close(F_a[b].T, features.weight_a[:, :5] @ S[b])
    assert not F_q[1, 2:].any() and not F_a[1, 1:].any()
    (F_q.sum() + F_a.sum()).backward()
    assert features.weight_q.grad.any() and features.weight_a.grad.any()
    shared = AttentionFeatures(4, length=8, shared=True)
    assert len(list(shared.parameters())) == 1 and "shared=True" in repr(shared)
    torch.testing.assert_close(features(q[0], a[0])[0], features(q[:1], a[:1])[0][0])


def test_a_shared_weight_stays_one():
    q, a = torch.randn(3, 5, 4), torch.randn(3, 6, 4)
    shared = AttentionFeatures(4, length=8, shared=True)
    assert list(shared.state_dict()) == ["weight_q"]
    both = AttentionFeatures(4, length=8)
    both.load_state_dict(dict.fromkeys(("weight_q", "weight_a"), shared.weight_q))
    torch.testing.assert_close(shared(q, a), both(q, a))

    empty = AttentionFeatures(4, length=8, shared=True, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(math.nan)
    empty.reset_parameters()
    assert all(rows.isfinite().all() for rows in empty(q, a))
    assigned = AttentionFeatures(4, length=8, shared=True, device="meta")
    assigned.load_state_dict(shared.state_dict(), assign=True)
    for module in (empty, assigned):
        assert len(list(module.parameters())) == 1
        sum(rows.sum() for rows in module(q, a)).backward()
    torch.testing.assert_close(assigned(q, a), shared(q, a))


def test_sums_of_the_reference():
    q, a = torch.randn(2, 3, 4).double(), torch.randn(2, 5, 4).double()
    S = exact(q, a)
    torch.testing.assert_close(pairwise_sums_reference(q, a), (S.sum(2), S.sum(1)))


q0, a0 = torch.randn(2, 3, 4), torch.randn(2, 5, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pairwise_attention([1.0], a0), TypeError, "q: expected a Tensor, got list"),
        (
            lambda: pairwise_attention(q0, a0.long()),
            TypeError,
            "a: expected dtype torch.float32 as q, got torch.int64",
        ),
        (
            lambda: pairwise_attention(q0, a0.double()),
            TypeError,
            "a: expected dtype torch.float32 as q, got torch.float64",
        ),
        (
            lambda: pairwise_attention(q0[0, 0], a0),
            ValueError,
            r"q: expected shape \(B, Q, D\) or \(Q, D\), got \(4,\)",
        ),
        (
            lambda: pairwise_attention(q0, a0[0]),
            ValueError,
            r"a: expected shape \(2, any, 4\), got \(5, 4\)$",
        ),
        (
            lambda: pairwise_attention(q0, a0[:1]),
            ValueError,
            r"a: expected shape \(2, any, 4\), got \(1, 5, 4\)$",
        ),
        (
            lambda: pairwise_attention(q0, a0.mT),
            ValueError,
            r"\(2, any, 4\), got \(2, 4, 5\); it looks transposed$",
        ),
        (
            lambda: pairwise_attention(q0.mT, a0),
            ValueError,
            r"\(2, any, 3\), got \(2, 5, 4\); q looks transposed$",
        ),
        (
            lambda: pairwise_attention(q0, a0, torch.ones(3).long()),
            ValueError,
            r"q_lengths: expected shape \(2,\), got \(3,\)",
        ),
        (
            lambda: pairwise_attention(q0, a0, [1, 2.5]),
            TypeError,
            "q_lengths: expected integers, got a list that holds others",
        ),
        (
            lambda: pairwise_attention(q0, a0, torch.ones(2)),
            TypeError,
            "q_lengths: expected an integer dtype, got torch.float32",
        ),
        (
            lambda: pairwise_attention(q0, a0, a_lengths=torch.tensor([1, 6])),
            ValueError,
            "a_lengths: expected values from 0 to A = 5, got 6",
        ),
        (
            lambda: pairwise_attention(q0, a0, torch.tensor([-1, 3])),
            ValueError,
            "q_lengths: expected values from 0 to Q = 3, got -1",
        ),
        (
            lambda: pairwise_attention(q0[0], a0[0], torch.tensor([3])),
            ValueError,
            "q_lengths: expected None for an unbatched q, got Tensor",
        ),
        (lambda: pairwise_attention(q0, a0, impl="triton"), ValueError, "run on CUDA; got cpu"),
        (
            lambda: pairwise_attention(q0.double(), a0.double(), impl="triton"),
            ValueError,
            "the kernels take float32, float16 and bfloat16; got float64",
        ),
        (
            lambda: pairwise_sums(q0, a0, precision="bf16"),
            ValueError,
            "precision: expected one of 'float32', 'tf32', got 'bf16'",
        ),
        (
            lambda: pairwise_attention(q0, a0, impl="cuda"),
            ValueError,
            "impl: expected one of 'auto', 'torch', 'triton', got",
        ),
        (
            lambda: pairwise_attend(q0, a0, q0),
            ValueError,
            r"v: expected shape \(2, 5, any\), got \(2, 3, 4\)",
        ),
        (
            lambda: pairwise_attend(q0, a0, a0, "cols"),
            ValueError,
            "normalize: expected one of None, 'rows', got 'cols'",
        ),
        (
            lambda: AttentionFeatures(4, length=4)(q0, a0),
            ValueError,
            "a: expected at most length = 4 rows, got 5",
        ),
        (lambda: AttentionFeatures(4, length=0), ValueError, "length: expected at least 1, got 0"),
        (
            lambda: AttentionFeatures(4, length=5)(q0.double(), a0),
            TypeError,
            "q: expected dtype torch.float32 as the weights, got torch.float64",
        ),
        (
            lambda: AttentionFeatures(4, length=5)(q0.double(), a0.double()),
            TypeError,
            "q: expected dtype torch.float32 as the weights, got torch.float64",
        ),
        (
            lambda: AttentionFeatures(4, length=5, device="meta")(q0, a0),
            ValueError,
            "q: expected device meta as the weights, got cpu",
        ),
        (lambda: AttentionFeatures(4, length=4, shared="no"), TypeError, "shared: expected a bool, got str"),
        (
            lambda: pairwise_attention(q0.to("meta"), a0),
            ValueError,
            "q: expected device cpu or cuda, got meta",
        ),
        (
            lambda: pairwise_attention(q0[..., :0], a0[..., :0]),
            ValueError,
            "q: expected at least one feature, got shape",
        ),
        (
            lambda: AttentionFeatures(4, length=4, dtype=torch.int8),
            TypeError,
            "dtype: expected dtype .* or torch.bfloat16, got torch.int8",
        ),
        (
            lambda: pairwise_attention(q0, a0, torch.tensor([3, 4], dtype=torch.uint16)),
            ValueError,
            "q_lengths: expected values from 0 to Q = 3, got 4",
        ),
        (lambda: AttentionFeatures(4.0, length=4), TypeError, "features: expected an int, got float"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


class Largest(TorchDispatchMode):
    """Knows the most elements that a tensor had in it."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        sizes = [y.numel() for y in tree_leaves(found) if isinstance(y, Tensor)]
        self.elements = max([self.elements, *sizes])
        return found


FORWARD_MODE = {
    "attention": pairwise_attention,
    "attend": lambda q, a, n=None, m=None: pairwise_attend(q, a, a, "rows", q_lengths=n, a_lengths=m),
    "sums": pairwise_sums,
}


@pytest.mark.parametrize("name", FORWARD_MODE)
@pytest.mark.parametrize("lengths", [(), (torch.tensor([7, 0, 50]), torch.tensor([20, 33, 1]))])
def test_forward_mode_takes_a_few_rows_at_a_time(name, lengths, monkeypatch):
    q, a, tangent = torch.randn(3, 50, 24), torch.randn(3, 33, 24), torch.randn(3, 50, 24)
    a[:, 3] = q[:, 4]
    function = FORWARD_MODE[name]

    def along(q, a, tangent):
        with forward_ad.dual_level(), Largest() as largest:
            found = tree_leaves(function(forward_ad.make_dual(q, tangent), a, *lengths))
            return [forward_ad.unpack_dual(y) for y in found], largest.elements

    want, _ = along(q.double(), a.double(), tangent.double())
    monkeypatch.setattr(ops, "TILE", 8 * a.numel())
    found, elements = along(q, a, tangent)
    assert elements <= 8 * a.numel()
    for (y, moved), (exact_y, exact_moved) in zip(found, want, strict=True):
        torch.testing.assert_close(y, exact_y.float())
        torch.testing.assert_close(moved, exact_moved.float(), rtol=1e-4, atol=1e-5)


def test_dual_numbers_elsewhere_cost_a_call_nothing(monkeypatch):
    q, a = torch.randn(2, 6, 3), torch.randn(2, 5, 3, requires_grad=True)
    want = pairwise_sums(q, a)
    monkeypatch.setattr(ops.sums, "reference", None)
    with forward_ad.dual_level():
        found = pairwise_sums(q, a)
        (slope,) = torch.autograd.grad(found[0].sum(), a)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
    torch.testing.assert_close(slope, torch.autograd.grad(want[0].sum(), a)[0])
