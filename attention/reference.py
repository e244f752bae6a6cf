"""Pairwise attention as written, from the difference of every pair.

    S[b, i, j] = 1 / (1 + d),   d = ||q[b, i] - a[b, j]||

and its gradients for an upstream g = dL/dS, where a pair at distance 0 has the subgradient 0:

    dL/dq[b, i] = sum_j -g S^2 (q[b, i] - a[b, j]) / d        dL/da[b, j] = -(the same summed over i)

Shapes: q (B, Q, D), a (B, A, D), S (B, Q, A), v (B, A, V). Any floating dtype, any device; the yardstick
for every other implementation here, and it differentiates as often as asked.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(q: Tensor, a: Tensor) -> Tensor:
    """``1 / (1 + d)`` of shape (B, Q, A), from the differences themselves."""
    difference = q[:, :, None, :] - a[:, None, :, :]  # (B, Q, A, D)
    # Where squares might over- or underflow, a pair is divided by its largest difference. d is that times
    # the length of the rest whatever it is, so that no derivative depends on it.
    largest = difference.detach().abs().amax(-1)
    wide = torch.finfo(q.dtype).max ** 0.25
    scaled = ((largest > wide) | (largest < 1 / wide)) & (largest > 0) & (largest < torch.inf)
    scale = torch.where(scaled, largest, 1.0)
    squared = (difference / scale[..., None]).square().sum(-1)
    # The square root has no derivative at 0. Taking it of 1 there, and returning the constant 0, makes
    # every derivative 0 instead of NaN.
    same = squared == 0
    d = torch.where(same, 0.0, torch.where(same, 1.0, squared).sqrt())
    # S² of far pairs would underflow in the gradient; that of (1 + d) / large does not.
    large = scale.clamp(min=1)
    return 1 / (1 / large + d * (scale / large)) / large


def valid_pairs(q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None) -> Tensor:
    """Boolean (B, Q, A): whether row i of q and row j of a both lie within their sequences' lengths."""
    valid = torch.ones(q.shape[0], q.shape[1], a.shape[1], dtype=torch.bool, device=q.device)
    if q_lengths is not None:
        valid = valid & (torch.arange(q.shape[1], device=q.device) < q_lengths[:, None].long())[:, :, None]
    if a_lengths is not None:
        valid = valid & (torch.arange(a.shape[1], device=a.device) < a_lengths[:, None].long())[:, None, :]
    return valid


def pairwise_attention_reference(
    q: Tensor, a: Tensor, q_lengths: Tensor | None = None, a_lengths: Tensor | None = None
) -> Tensor:
    """S of shape (B, Q, A); pairs outside the lengths score 0."""
    valid = valid_pairs(q, a, q_lengths, a_lengths)
    # Rows outside the lengths may hold anything, NaN too: they are replaced before they are used.
    q = torch.where(valid.any(2)[..., None], q, 0.0) if q_lengths is not None else q
    a = torch.where(valid.any(1)[..., None], a, 0.0) if a_lengths is not None else a
    return torch.where(valid, scores(q, a), 0.0)


def pairwise_attend_reference(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    q_lengths: Tensor | None = None,
    a_lengths: Tensor | None = None,
    normalize: str | None = None,
) -> Tensor:
    """``S @ v`` (B, Q, V); ``normalize="rows"`` divides row i by ``sum_j S[b, i, j]`` (0 / 0 is 0)."""
    S = pairwise_attention_reference(q, a, q_lengths, a_lengths)
    if a_lengths is not None:
        real = torch.arange(a.shape[1], device=a.device) < a_lengths[:, None].long()
        v = torch.where(real[..., None], v, 0.0)
    # No product, which autocast, or torch's precision of products, would round in a backward pass.
    O = (S[..., None] * v[:, None]).sum(2)
    if normalize == "rows":
        r = S.sum(2, keepdim=True)
        O = O / torch.where(r == 0, 1.0, r)
    return O


def pairwise_sums_reference(
    q: Tensor, a: Tensor, q_lengths: Tensor | None = None, a_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Row sums (B, Q) and column sums (B, A) of S."""
    S = pairwise_attention_reference(q, a, q_lengths, a_lengths)
    return S.sum(2), S.sum(1)
