"""Pairwise attention of long sequences, whose rows are prepared: the contract of test_pairwise.py once more.

Sequences are short all the same, since the interpreter is slow: `PREPARED` says from where on they are long.
"""

import pytest
import torch
from pairwise_contract import DTYPES, check_attention, lengths_of, one_rounding, rows_at_distances

from gatematch.attention import ops, pairwise_attention
from gatematch.attention import reference as exact
from gatematch.kernels import config, pairwise, pairwise_parts, pairwise_tiles


@pytest.fixture(autouse=True)
def _all_are_long(monkeypatch):
    monkeypatch.setattr(pairwise, "PREPARED", 1)


def check_scores(q, a, lengths=(None, None)):
    S = pairwise_attention(q, a, *lengths, impl="triton")
    want = exact.pairwise_attention_reference(q.double(), a.double(), *lengths)
    assert ((S.double() - want).abs() <= one_rounding(q.dtype)(want)).all(), (S.double() - want).abs().max()


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("D", [50, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_gradients_are_exact_at_every_distance(dtype, D, with_lengths):
    q, a = rows_at_distances(D, dtype)
    check_attention(q, a, lengths_of(q, a) if with_lengths else (None, None))


@pytest.mark.parametrize("offset", [10.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_common_offset_changes_nothing(dtype, offset):
    check_attention(*rows_at_distances(50, dtype, offset))


@pytest.mark.parametrize("D", [50, 1100])
def test_rows_that_are_not_kept_on_the_chip(D, monkeypatch):
    tile = config.choose("pairwise_tiles_fwd", "sm_90", torch.float32, {"Q": 512, "A": 512, "D": D})
    assert tile.blocks["RESIDENT"] < 2 * 1100
    choose = config.choose

    def chosen(kernel, *args):
        found = choose(kernel, *args)
        if kernel != "pairwise_tiles_fwd":
            return found
        return config.Config({**found.blocks, "RESIDENT": 0}, found.num_warps, found.num_stages)

    monkeypatch.setattr(config, "choose", chosen)
    check_scores(*rows_at_distances(D, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_size(dtype):
    """From what is almost lost beside other rows to what float16, or a square, cannot hold."""
    powers = range(-40, 64, 4) if dtype != torch.float16 else range(-14, 15)
    sizes = torch.tensor([0.0, *(2.0**power for power in powers)])
    q, a = (sizes[:, None] * torch.randn(2, len(sizes), 20) for _ in range(2))
    q, a = q.to(dtype), a.to(dtype)
    a[0, 3:9] = q[0, 3:9]
    check_scores(q, a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_need_no_differences(dtype, monkeypatch):
    """They score 1 by their fingerprints, and W is 0: the second walk has nothing to do."""
    visits = []
    monkeypatch.setattr(pairwise_tiles, "near_pairs", lambda *args: visits.append(args))
    words = torch.randn(9, 20).to(dtype)
    q, a = words[torch.randint(9, (2, 40))], words[torch.randint(9, (2, 70))]
    same = (q[:, :, None] == a[:, None]).all(-1)
    S, W, _ = ops.attention.forward_op(q, a, None, None, "triton", "float32", True)
    assert same.any() and torch.equal(S == 1, same) and torch.equal(W[..., :70] == 0, same)
    check_scores(q, a)
    assert not visits


def test_near_pairs_that_are_not_equal_are_marked():
    q = torch.randn(1, 30, 20)
    a = torch.cat([q, q + 1e-3], 1)
    _, W, _ = ops.attention.forward_op(q, a, None, None, "triton", "float32", True)
    near = torch.eye(30, dtype=torch.bool)
    assert (W[0, :, 30:60][near] < 0).all() and (W[0, :, :30][near] == 0).all()
    check_scores(q, a)


def test_fingerprints_differ_where_rows_do():
    """Also of rows whose floats have no bits below their exponents, as counts and one-hot rows."""
    x = torch.cat(
        [torch.eye(60), torch.eye(60) * 2, torch.cartesian_prod(*[torch.arange(3.0)] * 4).repeat(1, 15)]
    )
    x = x.unique(dim=0)[None]
    _, parts, _ = pairwise_parts.parts_of(x, x, None, None, number=2)
    prints = parts.prints[0, :, : x.shape[1]]
    assert prints.unique(dim=1).shape[1] == x.shape[1]
    for word in prints:  # each alone would do for so few
        assert word.unique().numel() > 0.99 * x.shape[1]


def test_rows_of_nan_and_infinity():
    q, a = torch.randn(1, 20, 30), torch.randn(1, 40, 30)
    q[0, 3, 5], q[0, 7, 6], a[0, 9, 6] = torch.nan, torch.inf, torch.inf
    q[0, 11], a[0, 12] = 1e20, 1e20
    check_with_nan(q, a)


def check_with_nan(q, a):
    S = pairwise_attention(q, a, impl="triton").double()
    want = exact.pairwise_attention_reference(q.double(), a.double(), None, None)
    rounding = 0 if q.dtype == torch.float32 else torch.finfo(q.dtype).eps / 2
    torch.testing.assert_close(S, want, rtol=rounding, atol=1e-5 if rounding else 1e-6, equal_nan=True)


@pytest.mark.parametrize("prepared", [1, 10**9])
@pytest.mark.parametrize("value", [torch.inf, 1e27])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_huge_row_in_the_sample_leaves_the_others_exact(dtype, value, prepared, monkeypatch):
    """The scale is that of a sample, the first row of a among them."""
    monkeypatch.setattr(pairwise, "PREPARED", prepared)
    q, a = torch.randn(1, 8, 16), torch.randn(1, 40, 16)
    a[0, 0, 0] = value
    check_with_nan(q.to(dtype), a.to(dtype))


def test_rows_that_float16_cannot_hold_are_near(monkeypatch):
    monkeypatch.setattr(pairwise, "PREPARED", 10**9)
    q, a = torch.randn(1, 8, 16) * 3, torch.randn(1, 256, 16).clamp(-1.5, 1.5)
    q[0, 1], q[0, 1, 0] = 0, 6000
    a[0, :, 0] = -1
    S = pairwise_attention(q, a, impl="triton", precision="tf32")
    want = exact.pairwise_attention_reference(q.double(), a.double(), None, None)
    torch.testing.assert_close(S[0, 1].double(), want[0, 1], rtol=1e-5, atol=0)


def test_gradients_past_the_lengths_are_zero_beside_nan():
    q, a = torch.randn(1, 8, 16), torch.randn(1, 8, 16)
    q[0, 0, 0] = torch.nan
    a.requires_grad_()
    S = pairwise_attention(q, a, a_lengths=torch.tensor([5]), impl="triton")
    (da,) = torch.autograd.grad(S.sum(), a)
    assert not da[0, 5:].any()


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_programs_that_walk_more_tiles_than_they_have_bits(offset, runs, monkeypatch):
    monkeypatch.setattr(pairwise_tiles, "runs_of", lambda *args: runs)
    q, a = torch.randn(1, 5, 20) + offset, torch.randn(1, 4300, 20) + offset
    q[0, :4] = a[0, [1, 2150, 4096, 4299]] + 1e-4
    a[0, 70] = q[0, 4] + 1e-3
    check_scores(q, a, (None, torch.tensor([4299])))
