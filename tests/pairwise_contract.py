"""What the pairwise kernels promise, as checks against float64 on the same inputs, on any device."""

import torch

from gatematch.attention import pairwise_attend, pairwise_attention, pairwise_sums
from gatematch.attention import reference as exact

DISTANCES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Largest error of sums, products and gradients, as a share of the largest value.
RELATIVE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def rows_at_distances(D, dtype, offset=0.0, device="cpu"):
    """q (2, 30, D) and a (2, 37, D): each of three rows of a has a row of q at every distance."""
    a = torch.randn(2, 37, D, dtype=torch.float64) + offset
    direction = torch.nn.functional.normalize(
        torch.randn(2, 3, len(DISTANCES), D, dtype=torch.float64), dim=-1
    )
    q = a[:, :3, None] + direction * torch.tensor(DISTANCES, dtype=torch.float64)[:, None]
    return q.flatten(1, 2).to(device, dtype), a.to(device, dtype)


def lengths_of(*rows):
    """Lengths of the first of two sequences, none of the second, and NaN in all padding."""
    lengths = []
    for x in rows:
        lengths.append(torch.tensor([x.shape[1] - 5, 0], device=x.device))
        x[0, -5:] = torch.nan
        x[1:] = torch.nan
    return lengths


def compare(ours, reference, inputs, relative, absolute=None):
    """Outputs and first gradients of two functions, each within its bound."""
    within(shares(ours, reference, inputs, relative, absolute))


def shares(ours, reference, inputs, relative, absolute=None):
    """The largest errors of the outputs and the first gradients of two functions, as shares of their bounds.

    A bound is `relative` of the largest value, or what `absolute` makes of each of an output's; NaN is never
    within it.
    """
    dtype = inputs[0].dtype
    mine = [x.detach().requires_grad_() for x in inputs]
    true = [x.detach().double().requires_grad_() for x in inputs]
    got, want = ours(*mine), reference(*true)
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    upstream = [torch.randn_like(x) for x in got]
    grads = torch.autograd.grad(got, mine, upstream)
    true_grads = torch.autograd.grad(want, true, [g.double() for g in upstream])
    found = []
    for x, y in zip((*got, *grads), (*want, *true_grads), strict=True):
        assert x.dtype == dtype and x.shape == y.shape
        by_value = absolute is not None and len(found) < len(got)
        bound = absolute(y.detach()) if by_value else relative * y.detach().abs().amax()
        error = (x.detach().double() - y.detach()).abs().nan_to_num(torch.inf)
        found.append(float(torch.where(error > 0, error / bound, 0).max()))
    return found


def one_rounding(dtype):
    """The contract of S: within 1e-6 in float32, one rounding of the true value in 16 bits."""
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return lambda S: rounding * S + (1e-6 if dtype == torch.float32 else 1e-5)


def attention_shares(q, a, lengths=(None, None), impl="triton"):
    return shares(
        lambda q, a: pairwise_attention(q, a, *lengths, impl=impl),
        lambda q, a: exact.pairwise_attention_reference(q, a, *lengths),
        [q, a],
        RELATIVE[q.dtype],
        one_rounding(q.dtype),
    )


def attend_shares(q, a, v, lengths=(None, None), normalize=None, impl="triton"):
    options = {"q_lengths": lengths[0], "a_lengths": lengths[1], "impl": impl}
    return shares(
        lambda q, a, v: pairwise_attend(q, a, v, normalize, **options),
        lambda q, a, v: exact.pairwise_attend_reference(q, a, v, *lengths, normalize),
        [q, a, v],
        RELATIVE[q.dtype],
    )


def sums_shares(q, a, lengths=(None, None), impl="triton"):
    return shares(
        lambda q, a: pairwise_sums(q, a, *lengths, impl=impl),
        lambda q, a: exact.pairwise_sums_reference(q, a, *lengths),
        [q, a],
        RELATIVE[q.dtype],
    )


def within(found):
    assert max(found) <= 1, found


def check_attention(*given):
    within(attention_shares(*given))


def check_attend(*given):
    within(attend_shares(*given))


def check_sums(*given):
    within(sums_shares(*given))


def check_draws(op, dtype, impl, rng):
    """Draws of sizes and rows, every second one with near pairs: the root mean squares of their shares.

    Six draws, and 18 more where those are past the bound: gradients of few pairs cancel now and then. In
    float32 the root mean squares are far below 1. Two parts of a float32 in the place of three bring them to
    about 0.4.
    """
    bound = 0.15 if dtype == torch.float32 else 1
    found = []
    for draws in (6, 18):
        found += [draw(op, dtype, impl, rng, near=n % 2 == 1) for n in range(draws)]
        squares = [sum(share**2 for share in of) / len(found) for of in zip(*found, strict=True)]
        if max(squares) ** 0.5 <= bound:
            return
    assert max(squares) ** 0.5 <= bound, found


def draw(op, dtype, impl, rng, near):
    """The shares of an op at random sizes and rows."""
    B, Q, A, D = rng.randint(1, 3), any_size(rng, 90), any_size(rng, 90), any_size(rng, 120)
    if op == "rows":
        # The rows of O are means of those of v: of few of them, gradients cancel to little but rounding.
        Q, A = max(Q, 4), max(A, 8)
    q, a, v = torch.randn(B, Q, D), torch.randn(B, A, D), torch.randn(B, A, rng.randint(4, 20))
    if near:
        rows = min(Q, A)
        a[:, :rows] = q[:, :rows] + 10.0 ** -rng.randint(1, 6) * torch.randn(B, rows, D)
    q, a, v = (x.to(dtype) for x in (q, a, v))
    lengths = [torch.randint(0, n + 1, (B,)) if rng.random() < 0.5 else None for n in (Q, A)]
    for given, rows in zip(lengths, (q, a), strict=True):
        if given is not None:
            given[0] = rows.shape[1]  # so that there is something to compare with
            rows[torch.arange(rows.shape[1]) >= given[:, None]] = torch.nan
    if op == "attention":
        return attention_shares(q, a, lengths, impl)
    if op == "sums":
        return sums_shares(q, a, lengths, impl)
    return attend_shares(q, a, v, lengths, None if op == "attend" else op, impl)


def any_size(rng, most):
    """One of a few, which loads mask and sums do not average, or any."""
    return rng.randint(1, rng.choice((8, most)))
