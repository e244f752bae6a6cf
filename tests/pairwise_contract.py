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
    """Outputs and first gradients of two functions; NaN is never within a bound."""
    dtype = inputs[0].dtype
    mine = [x.detach().requires_grad_() for x in inputs]
    true = [x.detach().double().requires_grad_() for x in inputs]
    got, want = ours(*mine), reference(*true)
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == dtype and x.shape == y.shape
        bound = relative * y.detach().abs().amax() if absolute is None else absolute(y.detach())
        assert ((x.double() - y).abs() <= bound).all(), (x.double() - y).abs().max()
    upstream = [torch.randn_like(x) for x in got]
    grads = torch.autograd.grad(got, mine, upstream)
    true_grads = torch.autograd.grad(want, true, [g.double() for g in upstream])
    for x, y in zip(grads, true_grads, strict=True):
        assert ((x.double() - y).abs() <= relative * y.abs().amax()).all(), (x.double() - y).abs().max()


def one_rounding(dtype):
    """The contract of S: within 1e-6 in float32, one rounding of the true value in 16 bits."""
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    return lambda S: rounding * S + (1e-6 if dtype == torch.float32 else 1e-5)


def check_attention(q, a, lengths=(None, None)):
    compare(
        lambda q, a: pairwise_attention(q, a, *lengths, impl="triton"),
        lambda q, a: exact.pairwise_attention_reference(q, a, *lengths),
        [q, a],
        RELATIVE[q.dtype],
        one_rounding(q.dtype),
    )


def check_attend(q, a, v, lengths=(None, None), normalize=None):
    options = {"q_lengths": lengths[0], "a_lengths": lengths[1], "impl": "triton"}
    compare(
        lambda q, a, v: pairwise_attend(q, a, v, normalize, **options),
        lambda q, a, v: exact.pairwise_attend_reference(q, a, v, *lengths, normalize),
        [q, a, v],
        RELATIVE[q.dtype],
    )


def check_sums(q, a, lengths=(None, None)):
    compare(
        lambda q, a: pairwise_sums(q, a, *lengths, impl="triton"),
        lambda q, a: exact.pairwise_sums_reference(q, a, *lengths),
        [q, a],
        RELATIVE[q.dtype],
    )
