"""The pairwise kernels in Triton's interpreter, against float64 on the same inputs."""

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise_contract import (
    DTYPES,
    check_attend,
    check_attention,
    check_sums,
    compare,
    lengths_of,
    rows_at_distances,
)

from gatematch.attention import pairwise_attend, pairwise_attention, pairwise_sums, triton_ops
from gatematch.attention import reference as exact
from gatematch.kernels import distance


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("D", [1, 7, 50, 300, 768])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_gradients_are_exact_at_every_distance(dtype, D, with_lengths):
    q, a = rows_at_distances(D, dtype)
    check_attention(q, a, lengths_of(q, a) if with_lengths else (None, None))


@pytest.mark.parametrize("offset", [10.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_common_offset_changes_nothing(dtype, offset):
    q, a = rows_at_distances(50, dtype, offset)
    check_attention(q, a)


def test_without_the_near_branch_the_contract_does_not_hold(monkeypatch):
    monkeypatch.setattr(distance, "TAU", tl.constexpr(0.0))
    q, a = rows_at_distances(300, torch.float32)
    with pytest.raises(AssertionError):
        check_attention(q, a)


def test_without_the_centre_an_offset_makes_all_pairs_near(monkeypatch):
    q, a = torch.randn(1, 40, 50) + 10, torch.randn(1, 32, 50) + 10

    def near_pairs():
        _, R, _ = triton_ops.attention_op(q, a, None, None, "float32", True)
        return int((R < 0).sum())

    assert near_pairs() == 0
    monkeypatch.setattr(distance, "OFFSET", tl.constexpr(2.0))
    assert near_pairs() == 40 * 32


@pytest.mark.parametrize("normalize", [None, "rows"])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("D", [7, 50, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_streamed_products(dtype, D, with_lengths, normalize):
    q, a = rows_at_distances(D, dtype)
    v = torch.randn(2, a.shape[1], 65).to(dtype)
    lengths = (None, None)
    if with_lengths:
        lengths = lengths_of(q, a)
        lengths_of(v)
    check_attend(q, a, v, lengths, normalize)


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("D", [7, 50, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_streamed_sums(dtype, D, with_lengths):
    q, a = rows_at_distances(D, dtype)
    lengths = lengths_of(q, a) if with_lengths else (None, None)
    check_sums(q, a, lengths)


@st.composite
def layouts(draw, letter):
    """How to lay out rows (B, L, D): a function of them to a view with other strides."""
    kind = draw(
        st.sampled_from(["contiguous", "columns", "every second", "features apart", "one for all"]), letter
    )

    def lay_out(x):
        B, L, D = x.shape
        if kind == "columns":
            return torch.cat([x, torch.full((B, L, 3), torch.nan)], 2)[..., :D]
        if kind == "every second":
            return torch.stack([x, torch.full_like(x, torch.nan)], 2).view(B, 2 * L, D)[:, ::2]
        if kind == "features apart":
            return x.mT.contiguous().mT
        if kind == "one for all":
            return x[:1].expand(B, L, D)
        return x

    return lay_out


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_shape_stride_and_length(data):
    sizes = {"B": 3, "Q": 70, "A": 70, "D": 40, "V": 9}
    B, Q, A, D, V = (data.draw(st.integers(1, largest), letter) for letter, largest in sizes.items())
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    words = torch.randn(20, D)  # few, so that many pairs are equal
    q, a = words[torch.randint(20, (B, Q))], words[torch.randint(20, (B, A))]
    q = data.draw(layouts("q"))(q + 1e-3 * torch.randn_like(q) * torch.randint(0, 2, (B, Q, 1)))
    a, v = data.draw(layouts("a"))(a), data.draw(layouts("v"))(torch.randn(B, A, V))
    lengths = [
        torch.tensor(data.draw(st.lists(st.integers(0, most), min_size=B, max_size=B), letter))
        if given
        else None
        for letter, most in (("q_lengths", Q), ("a_lengths", A))
        for given in (data.draw(st.booleans()),)
    ]
    normalize = data.draw(st.sampled_from([None, "rows"]), "normalize")
    options = {"q_lengths": lengths[0], "a_lengths": lengths[1], "impl": "triton"}

    def ours(q, a, v):
        return pairwise_attention(q, a, **options), pairwise_attend(q, a, v, normalize, **options)

    def reference(q, a, v):
        S = exact.pairwise_attention_reference(q, a, *lengths)
        return S, exact.pairwise_attend_reference(q, a, v, *lengths, normalize)

    compare(ours, reference, [q, a, v], 1e-5)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_compare(sizes):
    B, Q, A = sizes
    q, a, v = torch.randn(B, Q, 5), torch.randn(B, A, 5), torch.randn(B, A, 6)
    for x in (q, a, v):
        x.requires_grad_()
    S = pairwise_attention(q, a, impl="triton")
    O = pairwise_attend(q, a, v, "rows", impl="triton")
    r, c = pairwise_sums(q, a, impl="triton")
    assert S.shape == sizes and O.shape == (B, Q, 6)
    assert not (O.any() or r.any() or c.any())
    (S.sum() + O.sum() + r.sum() + c.sum()).backward()
    assert not any(x.grad.any() for x in (q, a, v))


def test_two_runs_give_the_same_bits():
    q, a = rows_at_distances(50, torch.float32)
    v = torch.randn(2, a.shape[1], 33)
    runs = []
    for _ in range(2):
        inputs = [x.clone().requires_grad_() for x in (q, a, v)]
        S, O = pairwise_attention(*inputs[:2], impl="triton"), pairwise_attend(*inputs, impl="triton")
        sums = pairwise_sums(*inputs[:2], impl="triton")
        total = S.square().sum() + O.square().sum() + sum(x.square().sum() for x in sums)
        runs.append([S, O, *sums, *torch.autograd.grad(total, inputs)])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_norms_that_overflow_and_rows_of_nan():
    q, a = torch.randn(1, 5, 20) * 1e20, torch.randn(1, 6, 20)
    a[0, 0] = q[0, 0]
    q[0, 4] = torch.nan
    S = pairwise_attention(q, a, impl="triton")
    assert S[0, 0, 0] == 1 and S[0, 4].isnan().all()
    assert (S[0, :4, 1:] < 1e-18).all()


def test_the_second_derivative_is_the_references():
    q, a = (torch.randn(1, n, 10, requires_grad=True) for n in (4, 5))

    def penalty(S):
        (slope,) = torch.autograd.grad(S.square().sum(), q, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (q, a))

    ours = penalty(pairwise_attention(q, a, impl="triton"))
    for x, y in zip(ours, penalty(exact.pairwise_attention_reference(q, a)), strict=True):
        torch.testing.assert_close(x, y)


def test_tf32_is_less_exact_only_for_far_pairs():
    q, a = rows_at_distances(50, torch.float32)
    want = exact.pairwise_attention_reference(q.double(), a.double())
    error = (pairwise_attention(q, a, impl="triton", precision="tf32").double() - want).abs()
    assert 1e-6 < error.max() < 1e-3
    assert error[want > 0.9].max() < 1e-6


def opcheck_inputs(op):
    q, a, v = torch.randn(2, 9, 20), torch.randn(2, 8, 20), torch.randn(2, 8, 3)
    lengths = torch.tensor([9, 4]), None
    r = torch.rand(2, 9)
    S, R, centre = triton_ops.attention_op(q, a, *lengths, "float32", True)
    return {
        # Without lengths, and with A a multiple of 4, since R is not written where it is never read.
        triton_ops.attention_op: (q, a, None, None, "float32", True),
        triton_ops.attention_backward_op: (q, a, R, centre, S, *lengths, "float32", [True, False]),
        triton_ops.attend_op: (q, a, v, *lengths, True, "float32"),
        triton_ops.attend_backward_op: (
            q, a, v, torch.randn(2, 9, 3), r, torch.randn(2, 9, 3), *lengths, "float32", [True, True, False]
        ),
        triton_ops.sums_op: (q, a, *lengths, "float32"),
        triton_ops.sums_backward_op: (q, a, r, torch.rand(2, 8), *lengths, "float32", [False, True]),
    }[op]  # fmt: skip


@pytest.mark.parametrize(
    "name", [name for name in vars(triton_ops) if name.endswith("_op") and name != "custom_op"]
)
def test_opcheck(name):
    op = getattr(triton_ops, name)
    torch.library.opcheck(op, opcheck_inputs(op))
