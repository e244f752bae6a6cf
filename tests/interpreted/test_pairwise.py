"""The pairwise kernels in Triton's interpreter, against float64 on the same inputs."""

import dataclasses

import pytest
import torch
import triton
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
from pairwise_ops import OPS, opcheck_case

from gatematch.attention import ops, pairwise_attend, pairwise_attention, pairwise_sums
from gatematch.attention import reference as exact
from gatematch.kernels import config, distance, pairwise, pairwise_bwd_near, pairwise_stream


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("D", [1, 7, 50, 300, 768])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_gradients_are_exact_at_every_distance(dtype, D, with_lengths):
    q, a = rows_at_distances(D, dtype)
    check_attention(q, a, lengths_of(q, a) if with_lengths else (None, None))


@pytest.mark.parametrize("A", [40, 80])
def test_gradients_of_few_pairs_have_the_precision_of_float32(A):
    q, a = torch.randn(1, 1, 30), torch.randn(1, A, 30)  # the errors of many would cancel
    compare(
        lambda q, a: pairwise_attention(q, a, impl="triton"), exact.pairwise_attention_reference, [q, a], 1e-6
    )


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("offset", [10.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_common_offset_changes_nothing(dtype, offset, with_lengths):
    q, a = rows_at_distances(50, dtype, offset)
    check_attention(q, a, lengths_of(q, a) if with_lengths else (None, None))


def test_pairs_at_the_threshold_are_in_one_of_both_walks():
    """Pairs that roundings make near or far: one in both walks or in neither would be off by its score."""
    B, L, D = 6, 64, 40
    x, other = torch.randn(2, B, L, D, dtype=torch.float64)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    other -= (other * x).sum(-1, keepdim=True) / size**2 * x
    other *= size / torch.linalg.vector_norm(other, dim=-1, keepdim=True)
    cosine = 1 - distance.TAU.value  # so that d² = TAU (||x||² + ||y||²)
    y = cosine * x + (1 - cosine**2) ** 0.5 * other
    x, y = (0.1 * rows.float() for rows in (x, y))
    v = torch.eye(L).expand(B, L, L).contiguous()
    check_attend(x, y, v)
    O = pairwise_attend(x, y, v, impl="triton")
    want = exact.pairwise_attention_reference(x.double(), y.double())
    torch.testing.assert_close(O.double(), want, rtol=0, atol=2e-6)


@triton.jit
def store_shares(out_ptr, tiles, parts):
    part = tl.program_id(0)
    tl.store(out_ptr + part, distance.share(part, tiles, parts))


@pytest.mark.parametrize("tiles", [1, 263, 264, 265, 10_000_019, 2**26])
def test_parts_share_all_tiles_evenly(tiles):
    """264 parts times as many tiles as 2^31 rows have is more than 32 bits hold."""
    parts = 264
    first = torch.zeros(parts + 1, dtype=torch.int32)
    store_shares[(parts + 1,)](first, tiles, parts)
    each = first.diff()
    assert first[0] == 0 and first[-1] == tiles
    assert each.min() >= tiles // parts and each.max() <= -(-tiles // parts)


def test_blocks_of_features_may_be_wider_than_what_is_resident(monkeypatch):
    """As `tune` may ask for them: then a program has one."""
    choose = config.choose

    def narrow(kernel, *given):
        tile = choose(kernel, *given)
        resident = {"RESIDENT": 32} if kernel == "pairwise_bwd" else {}
        return dataclasses.replace(tile, blocks={**tile.blocks, **resident})

    monkeypatch.setattr(config, "choose", narrow)
    q, a = torch.randn(1, 70, 20), torch.randn(1, 80, 20)
    check_attention(q, a)


def test_lengths_that_are_wrong_are_cut_to_what_is_possible():
    q, a = torch.randn(2, 9, 20), torch.randn(2, 7, 20)
    by = ("triton", "float32", False)
    S, _, _ = ops.attention.forward_op(q, a, torch.tensor([-3, 10**9]), torch.tensor([7, 10**9]), *by)
    assert not S[0].any() and torch.equal(S[1], ops.attention.forward_op(q, a, None, None, *by)[0][1])


def test_what_is_kept_past_the_lengths_is_never_read():
    q, a = rows_at_distances(50, torch.float32)
    lengths = torch.tensor([11, 30]), torch.tensor([37, 5])
    S, W, centre = ops.attention.forward_op(q, a, *lengths, "triton", "float32", True)
    W[0, 11:] = W[1, :, 5:] = -1.0  # would be near pairs
    g = torch.randn_like(S)
    by = ("triton", "float32", [True, True])
    grads = ops.attention.backward_op(q, a, W, centre, g, *lengths, *by)
    q, a = q.requires_grad_(), a.requires_grad_()
    want = torch.autograd.grad(exact.pairwise_attention_reference(q, a, *lengths), (q, a), g)
    torch.testing.assert_close(grads, want)


def test_the_centre_is_kept_for_the_backward():
    q, a = torch.randn(2, 70, 20), torch.randn(2, 300, 20)
    q[1] += 100
    a[1] += 100
    _, _, centre = ops.attention.forward_op(q, a, None, None, "triton", "float32", True)
    assert not centre[0].any()
    assert (centre[1] - 100).abs().max() < 3  # a mean of 8 Gaussian rows


def test_without_the_near_branch_the_contract_does_not_hold(monkeypatch):
    monkeypatch.setattr(distance, "TAU", tl.constexpr(0.0))
    q, a = rows_at_distances(300, torch.float32)
    with pytest.raises(AssertionError):
        check_attention(q, a)


def test_without_the_centre_an_offset_makes_all_pairs_near(monkeypatch):
    q, a = torch.randn(1, 40, 50) + 10, torch.randn(1, 32, 50) + 10

    def near_pairs():
        _, W, _ = ops.attention.forward_op(q, a, None, None, "triton", "float32", True)
        return int((W < 0).sum())

    assert near_pairs() == 0
    monkeypatch.setattr(distance, "OFFSET", tl.constexpr(2.0))
    assert near_pairs() == 40 * 32


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_programs_that_walk_more_tiles_than_they_have_bits(offset, runs, monkeypatch):
    monkeypatch.setattr(pairwise, "runs_of", lambda *args: runs)
    q, a = torch.randn(1, 5, 20) + offset, torch.randn(1, 4300, 20) + offset
    q[0, :4] = a[0, [1, 2150, 4096, 4299]]  # in the tiles 0, 33, 64 and 67
    a[0, 70] = q[0, 4] + 1e-3
    got = pairwise_attention(q, a, a_lengths=torch.tensor([4299]), impl="triton")
    want = exact.pairwise_attention_reference(q.double(), a.double(), None, torch.tensor([4299]))
    assert (got - want).abs().max() < 1e-6
    assert (got[0, [0, 1, 2], [1, 2150, 4096]] == 1).all()


@pytest.mark.parametrize(
    ("blocks", "columns", "runs"),
    [(1, 40, 1), (4096, 40, 1), (16, 512, 2), (256, 512, 1), (8, 8192, 32), (64, 8192, 8), (512, 8192, 3)],
)
def test_runs_occupy_the_device_and_are_not_short(blocks, columns, runs):
    assert pairwise.runs_of(blocks, columns, torch.device("cpu")) == runs


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_score_exactly_one(dtype):
    q = torch.randn(1, 70, 50).to(dtype)
    q[0, 7] = 0
    S = pairwise_attention(q, q, impl="triton")
    assert (S.diagonal(dim1=1, dim2=2) == 1).all()


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("D", [7, 50, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_streamed_products(dtype, D, with_lengths):
    """Every dtype with every D, with lengths and without, normalised and not."""
    normalize = "rows" if with_lengths == (D == 50) else None
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
@settings(max_examples=15, deadline=None)
def test_any_shape_stride_and_length(data):
    sizes = {"B": 3, "Q": 70, "A": 70, "D": 40, "V": 9}
    B, Q, A, D, V = (data.draw(st.integers(1, largest), letter) for letter, largest in sizes.items())
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    words = torch.randn(20, D)  # few, so that many pairs are equal
    q, a = words[torch.randint(20, (B, Q))], words[torch.randint(20, (B, A))]
    q = data.draw(layouts("q"))(q + 1e-3 * torch.randn_like(q) * torch.randint(0, 2, (B, Q, 1)))
    a, v = data.draw(layouts("a"))(a), data.draw(layouts("v"))(torch.randn(B, A, V))
    lengths = [
        torch.tensor(data.draw(st.lists(st.integers(0, most), min_size=2 * B, max_size=2 * B), letter))[::2]
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


@pytest.mark.parametrize("letters", ["q_lengths", "a_lengths"])
def test_one_length_for_all(letters):
    q, a = torch.randn(3, 9, 20), torch.randn(3, 8, 20)
    shared = torch.tensor(5).expand(3)
    got = pairwise_attention(q, a, **{letters: shared}, impl="triton")
    assert torch.equal(got, pairwise_attention(q, a, **{letters: shared.clone()}, impl="triton"))


@pytest.mark.parametrize(("D", "with_lengths"), [(7, False), (50, True)])
def test_programs_that_walk_many_tiles(D, with_lengths, monkeypatch):
    monkeypatch.setattr(pairwise_stream, "_wanted", lambda device: 1)
    words = torch.randn(40, D)
    q, a = words[torch.randint(40, (2, 200))], words[torch.randint(40, (2, 170))]
    v = torch.randn(2, 170, 9)
    lengths = (torch.tensor([200, 131]), torch.tensor([64, 170])) if with_lengths else (None, None)
    check_sums(q, a, lengths)
    check_attend(q, a, v, lengths, "rows")


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("Q", [20, 70])
def test_near_pairs_of_many_blocks_by_one_program(Q, wanted, monkeypatch):
    """In few of more blocks than it looks at at once, on one side or both."""
    monkeypatch.setattr(pairwise_bwd_near, "multiprocessors", lambda device: 0)
    monkeypatch.setattr(pairwise_bwd_near, "WORDS", tl.constexpr(4))
    B = 11
    q, a = torch.randn(B, Q, 9), torch.randn(B, 5, 9)
    for b in (0, 3, B - 6, B - 1):
        q[b, 3] = a[b, 2] + 1e-3
        q[b, Q - 1] = a[b, 4] - 1e-3
    inputs = [x.requires_grad_(want) for x, want in zip((q, a), wanted, strict=True)]
    g = torch.randn(B, Q, 5)
    got = torch.autograd.grad(
        pairwise_attention(q, a, impl="triton"), [x for x in inputs if x.requires_grad], g
    )
    q, a = (x.detach().double().requires_grad_(x.requires_grad) for x in inputs)
    S = exact.pairwise_attention_reference(q, a, None, None)
    want = torch.autograd.grad(S, [x for x in (q, a) if x.requires_grad], g.double())
    torch.testing.assert_close([x.double() for x in got], list(want), rtol=1e-4, atol=1e-5)


def test_norms_that_overflow():
    q, a = torch.randn(1, 5, 20) * 1e20, torch.randn(1, 6, 20)
    a[0, 0] = q[0, 0]
    S = pairwise_attention(q, a, impl="triton")
    assert S[0, 0, 0] == 1
    assert (S[0, :, 1:] < 1e-18).all()


@pytest.mark.parametrize("D", [2, 20])
def test_distances_score_until_their_squares_overflow(D):
    """The bounds of the docs: S until d² leaves float32, distances of 1.8e19; its gradient until d³ does."""
    d = torch.tensor([4e12, 1.8e19, 1.9e19, 1e25])
    q, a = torch.zeros(1, 4, D), torch.zeros(1, 1, D)
    q[0, :, 1] = d
    q.requires_grad_()
    S = pairwise_attention(q, a, impl="triton")
    torch.testing.assert_close(S[0, :, 0], torch.tensor([1 / 4e12, 1 / 1.8e19, 0.0, 0.0]), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(S, q, torch.full_like(S, 1e12))
    assert grad[0, 0, 1].item() == pytest.approx(-1e12 / 4e12**2, rel=1e-4) and not grad[0, 1:].any()
    d = d[1:]
    far, v = q.detach()[:, 2:], torch.ones(1, 1, 2)
    assert not pairwise_attend(far, a, v, "rows", impl="triton").any()
    assert not any(x.any() for x in pairwise_sums(far, a, impl="triton"))
    torch.testing.assert_close(
        pairwise_attention(far, a, impl="torch")[0, :, 0], 1 / d[1:], rtol=1e-6, atol=0
    )


# That of the CPU, and those of CUDA's arithmetic.
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_nan_stays_in_its_rows(precision, bits):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    q, a = rows_at_distances(50, torch.float32)
    q[0, 4] = nan
    clean = torch.arange(q.shape[1]) != 4
    options = {"impl": "triton", "precision": precision}
    S = pairwise_attention(q, a, **options)
    O, (r, c) = pairwise_attend(q, a, a, **options), pairwise_sums(q, a, **options)
    for x in (S[0], O[0], r[0]):
        assert x[4].isnan().all() and not x[clean].isnan().any()
    assert c[0].isnan().all()
    assert not any(x[1].isnan().any() for x in (S, O, r, c))
    # An upstream NaN, at a pair that is near (0, 0) or far.
    q, a = rows_at_distances(50, torch.float32)
    q.requires_grad_()
    for column in (0, 30):
        S = pairwise_attention(q, a, **options)
        g = torch.ones_like(S)
        g[0, 1, column] = nan
        (dq,) = torch.autograd.grad(S, q, g)
        assert dq[0, 1].isnan().all()
        assert dq.isnan().sum() == q.shape[2]


def test_gradients_too_large_for_float16_in_between():
    q, a, v = (
        (30 * torch.randn(1, 4, 300)).half(),
        (30 * torch.randn(1, 1, 300)).half(),
        torch.randn(1, 1, 8).half(),
    )
    v.requires_grad_()
    O = pairwise_attend(q, a, v, "rows", impl="triton")
    (dv,) = torch.autograd.grad(O, v, torch.full_like(O, 100))
    assert torch.equal(dv, torch.full_like(v, 400))


def test_streamed_near_pairs_stay_exact_in_tf32():
    q = 1e3 * torch.randn(1, 64, 50)
    a = q + 0.02 * torch.randn_like(q)
    r, _ = pairwise_sums(q, a, impl="triton", precision="tf32")
    want = exact.pairwise_sums_reference(q.double(), a.double())[0]
    near_part = 1 / (1 + (q - a).double().norm(dim=2))
    assert ((r - want).abs() < 2e-5 * near_part + 1e-3 * (want - near_part)).all()


def test_compiled():
    q, a = rows_at_distances(50, torch.float32)
    v, lengths = torch.randn(2, a.shape[1], 9), torch.tensor([29, 7])
    q.requires_grad_()

    def function(q, a):
        S = pairwise_attention(q, a, lengths, impl="triton")
        O = pairwise_attend(q, a, v, "rows", q_lengths=lengths, impl="triton")
        return S, O, *pairwise_sums(q, a, lengths, impl="triton")

    got = torch.compile(function, backend="aot_eager", fullgraph=True)(q, a)
    want = function(q, a)
    g = [torch.randn_like(x) for x in want]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, q, g), torch.autograd.grad(want, q, g))


def test_without_gradients_nothing_is_kept_for_them(monkeypatch):
    saves = []
    compute = ops.attention.compute
    monkeypatch.setattr(ops.attention, "compute", lambda *args: saves.append(args[-1]) or compute(*args))
    q = torch.randn(1, 5, 20, requires_grad=True)
    pairwise_attention(q, q, impl="triton")
    with torch.no_grad():
        pairwise_attention(q, q, impl="triton")
    pairwise_attention(q.detach(), q.detach(), impl="triton")
    assert saves == [True, False, False]


def test_the_second_derivative_is_the_references():
    q, a = (torch.randn(1, n, 10, requires_grad=True) for n in (4, 5))

    def penalty(S):
        (slope,) = torch.autograd.grad(S.square().sum(), q, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (q, a))

    ours = penalty(pairwise_attention(q, a, impl="triton"))
    for x, y in zip(ours, penalty(exact.pairwise_attention_reference(q, a)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("op", ["attention", "attend", "sums"])
def test_under_torch_func(op):
    lengths = torch.tensor([[4, 2], [0, 3], [1, 4]])
    q, a = torch.randn(3, 2, 4, 10), torch.randn(2, 5, 10)

    def ours(q, a, lengths):
        if op == "attend":
            return pairwise_attend(q, a, a, "rows", q_lengths=lengths, impl="triton")
        if op == "sums":
            return torch.cat(pairwise_sums(q, a, lengths, impl="triton"), 1)
        return pairwise_attention(q, a, lengths, impl="triton")

    def reference(q, a, lengths):
        if op == "attend":
            return exact.pairwise_attend_reference(q, a, a, lengths, None, "rows")
        if op == "sums":
            return torch.cat(exact.pairwise_sums_reference(q, a, lengths), 1)
        return exact.pairwise_attention_reference(q, a, lengths)

    def transformed(function):
        loss = torch.func.grad(lambda q, a, lengths: function(q, a, lengths).square().sum(), (0, 1))
        values = torch.func.vmap(function, (0, None, 0))(q, a, lengths)
        return values, *torch.func.vmap(loss, (0, None, 0))(q, a, lengths)

    for x, y in zip(transformed(ours), transformed(reference), strict=True):
        torch.testing.assert_close(x, y)


def test_tf32_is_less_exact_only_for_far_pairs():
    q, a = rows_at_distances(50, torch.float32)
    want = exact.pairwise_attention_reference(q.double(), a.double())
    error = (pairwise_attention(q, a, impl="triton", precision="tf32").double() - want).abs()
    assert 1e-6 < error.max() < 1e-3
    assert error[want > 0.9].max() < 1e-6


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    op, inputs = opcheck_case(name, "triton", torch.float32)
    torch.library.opcheck(op, inputs)


def test_what_the_kernels_do_not_serve():
    q, a = torch.randn(1, 5, 20), torch.randn(1, 6, 20)

    def function(q):
        return pairwise_attention(q, a, impl="triton").sum()

    with pytest.raises(ValueError, match="the kernels have no forward-mode derivative"):
        torch.func.jvp(function, (q,), (q,))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"know nothing of torch\.func inside of what is compiled"):
        torch.compile(torch.func.grad(function), backend="aot_eager", fullgraph=True)(q)
