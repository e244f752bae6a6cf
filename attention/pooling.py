"""Pooling over words: windows of them (w-ap), all of them (all-ap), and ABCNN-2's attention as the weights.

Shapes: rows (B, T, C), weights (B, T). Yin et al., "ABCNN", TACL 2016, sections 3 and 4.2, has words as
columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gatematch.checks import GivenLengths, check_bool, check_int

from .functional import check_pair, pairwise_sums
from .operands import padding


def attention_pool(
    q: Tensor,
    a: Tensor,
    width: int,
    q_lengths: GivenLengths | None = None,
    a_lengths: GivenLengths | None = None,
    *,
    normalize: bool = False,
    impl: str = "auto",
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """ABCNN-2's pooling: sums over windows of rows, each row weighted by all of its attention.

    With S the pairwise attention of q and a, never built, and r_k = Σ_j S[k, j]:

        P_q[j] = Σ_{k=j}^{j+width-1} r_k · q[k]

    and P_a likewise with the column sums of S (Yin et al., "ABCNN", TACL 2016, section 4.2). The Triton
    kernels take S of distances beyond 1.8e19 as 0: see `pairwise_attention`.

    Args:
        q: (B, Q, D) or (Q, D); float64, float32, float16 or bfloat16; Q >= width.
        a: (B, A, D) or (A, D), dtype and device of q; A >= width.
        width: how many consecutive rows a window holds.
        q_lengths: (B,) integers as for `pairwise_attention`, how many rows of each q are real; windows that
            reach past them give 0, and what lies there does not matter.
        a_lengths: the same for a.
        normalize: divide the weights of a sentence by their sum, as the authors' code does.
        impl: as for `pairwise_attention`.
        precision: as for `pairwise_attention`.

    Returns:
        P_q (B, Q - width + 1, D) and P_a (B, A - width + 1, D), in the dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device, shape or value, by name.
    """
    unbatched, q_lengths, a_lengths = check_pair(q, a, q_lengths, a_lengths)
    check_int("width", width, 1)
    check_bool("normalize", normalize)
    for name, rows in (("q", q), ("a", a)):
        if rows.shape[-2] < width:
            raise ValueError(f"{name}: expected at least width = {width} rows, got {rows.shape[-2]}")
    if unbatched:
        q, a = q[None], a[None]
    # Small integer types could not hold a length less the width.
    q_lengths, a_lengths = (None if n is None else n.long() for n in (q_lengths, a_lengths))
    q, a = zero_past(q, q_lengths), zero_past(a, a_lengths)
    weights = attention_weights(q, a, q_lengths, a_lengths, normalize, impl, precision)
    P_q, P_a = (
        zero_past(window_pool(rows, width, w), None if lengths is None else lengths - width + 1)
        for rows, w, lengths in zip((q, a), weights, (q_lengths, a_lengths), strict=True)
    )
    return (P_q[0], P_a[0]) if unbatched else (P_q, P_a)


def attention_weights(
    q: Tensor,
    a: Tensor,
    q_lengths: Tensor | None,
    a_lengths: Tensor | None,
    normalize: bool,
    impl: str = "auto",
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """Row and column sums of the attention of q and a, (B, Q) and (B, A); `normalize`: with the sum 1."""
    r, c = pairwise_sums(q, a, q_lengths, a_lengths, impl=impl, precision=precision)
    if normalize:
        r, c = _shares(r), _shares(c)
    return r, c


def _shares(weights: Tensor) -> Tensor:
    # The sum of all scores of a pair is too large for float16 from about 300 words a sentence.
    total = weights.sum(1, keepdim=True, dtype=torch.promote_types(weights.dtype, torch.float32))
    # A pair without any words keeps its weights 0; 0 / 0 would be NaN.
    return (weights / total.masked_fill(total == 0, 1)).to(weights.dtype)


def window_pool(rows: Tensor, width: int, weights: Tensor | None = None) -> Tensor:
    """Weighted sum over each `width` consecutive rows, without weights their mean: (B, T - width + 1, C)."""
    if weights is None:
        return rows.unfold(1, width, 1).mean(-1)
    return (rows * weights[..., None]).unfold(1, width, 1).sum(-1)


def all_pool(rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over all rows, (B, C)."""
    return (rows * weights[..., None]).sum(1)


def mean_weights(rows: Tensor, lengths: Tensor | None) -> Tensor:
    """The weights that make a sum the mean over the real rows, (B, T); without any real row they are 0."""
    if lengths is None:
        return rows.new_full(rows.shape[:2], 1 / rows.shape[1])
    real = (~padding(rows, lengths)).to(rows.dtype)
    return real / real.sum(1, keepdim=True).clamp(min=1)


def zero_past(rows: Tensor, lengths: Tensor | None) -> Tensor:
    """The rows with zeros past the lengths, whatever lay there."""
    return rows if lengths is None else rows.masked_fill(padding(rows, lengths)[..., None], 0)
