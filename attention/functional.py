"""Pairwise attention as functions: check the arguments, choose the path.

On CUDA that is the kernels, elsewhere `tiled.py`; float64 is for `tiled.py` everywhere.

``S[b, i, j] = 1 / (1 + ||q[b, i] - a[b, j]||)`` (Yin et al., "ABCNN", TACL 2016). Shapes: q (B, Q, D),
a (B, A, D), v (B, A, V), S (B, Q, A); q (Q, D) with a (A, D) is taken as one unbatched pair of sentences.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gatematch.kernels.launch import obstacle

from . import ops
from .checks import check_pair, check_rows


def pairwise_attention(
    q: Tensor,
    a: Tensor,
    q_lengths: Tensor | None = None,
    a_lengths: Tensor | None = None,
    *,
    impl: str = "auto",
    precision: str = "float32",
) -> Tensor:
    """Pairwise attention ``S[b, i, j] = 1 / (1 + ||q[b, i] - a[b, j]||)``, in the graph and batched.

    Exact at every distance: float32 within 1e-6 of the true value, float16 and bfloat16 within one
    rounding. Equal rows score exactly 1 and pass no gradient to each other.

    Args:
        q: (B, Q, D) or (Q, D); float64, float32, float16 or bfloat16.
        a: (B, A, D) or (A, D), dtype and device of q.
        q_lengths: (B,) integers on the device of q, how many rows of each q are real; the others score 0,
            whatever they hold, and get no gradient.
        a_lengths: the same for a.
        impl: "auto": the Triton kernels on CUDA, "torch" elsewhere and for float64. "triton": the kernels,
            or an error that says why not. "torch": PyTorch's own operations, tile by tile, on any device.
        precision: "float32", or "tf32" to allow the kernels, for float32 inputs, a third of the products:
            scores of rows that are not close are then off by up to 1e-3. Other paths and dtypes stay exact.

    Returns:
        S, (B, Q, A) or (Q, A), in the dtype of q, under autocast too.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device, shape or value, by name.
    """
    unbatched = check_pair(q, a, q_lengths, a_lengths)
    _check_path(impl, precision, q, a)
    if unbatched:
        q, a = q[None], a[None]
    S: Tensor
    if _takes_kernels(q, impl):
        S = _kernels().attention(q, a, q_lengths, a_lengths, precision)
    else:
        S = ops.attention(q, a, q_lengths, a_lengths)
    return S[0] if unbatched else S


def pairwise_attend(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    normalize: str | None = None,
    *,
    q_lengths: Tensor | None = None,
    a_lengths: Tensor | None = None,
    impl: str = "auto",
    precision: str = "float32",
) -> Tensor:
    """``S @ v`` without S in memory: peak memory is O(Q + A), forward and backward.

    Args:
        q, a, q_lengths, a_lengths, impl, precision: as for :func:`pairwise_attention`.
        v: (B, A, V) or (A, V), dtype and device of q; rows past `a_lengths` count as 0.
        normalize: None, or "rows" to divide row i by ``sum_j S[b, i, j]`` (rows without any pair give 0).

    Returns:
        (B, Q, V) or (Q, V), in the dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device, shape or value, by name.
    """
    unbatched = check_pair(q, a, q_lengths, a_lengths)
    _check_path(impl, precision, q, a, v)
    check_rows("v", v, q)
    if v.dim() != a.dim() or v.shape[:-1] != a.shape[:-1]:
        expected = ", ".join(map(str, a.shape[:-1]))
        raise ValueError(
            f"v must have shape ({expected}, V), one row for each row of a; got {tuple(v.shape)}"
        )
    if normalize not in (None, "rows"):
        raise ValueError(f'normalize must be None or "rows"; got {normalize!r}')
    if unbatched:
        q, a, v = q[None], a[None], v[None]
    O: Tensor
    if _takes_kernels(q, impl):
        O = _kernels().PairwiseAttend.apply(q, a, v, q_lengths, a_lengths, normalize, precision)
    else:
        O = ops.PairwiseAttend.apply(q, a, v, q_lengths, a_lengths, normalize)
    return O[0] if unbatched else O


def pairwise_sums(
    q: Tensor,
    a: Tensor,
    q_lengths: Tensor | None = None,
    a_lengths: Tensor | None = None,
    *,
    impl: str = "auto",
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """Row sums and column sums of S without S in memory (the weights of ABCNN-2's pooling).

    Args:
        q, a, q_lengths, a_lengths, impl, precision: as for :func:`pairwise_attention`.

    Returns:
        ``S.sum(2)`` (B, Q) and ``S.sum(1)`` (B, A), or (Q,) and (A,), in the dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device, shape or value, by name.
    """
    unbatched = check_pair(q, a, q_lengths, a_lengths)
    _check_path(impl, precision, q, a)
    if unbatched:
        q, a = q[None], a[None]
    if _takes_kernels(q, impl):
        r, c = _kernels().PairwiseSums.apply(q, a, q_lengths, a_lengths, precision)
    else:
        r, c = ops.PairwiseSums.apply(q, a, q_lengths, a_lengths)
    return (r[0], c[0]) if unbatched else (r, c)


def _kernels() -> ModuleType:
    """The ops of the kernels: imported when they are first used, since they need Triton."""
    from . import triton_ops

    return triton_ops


def _takes_kernels(q: Tensor, impl: str) -> bool:
    return impl == "triton" or (impl == "auto" and q.is_cuda and obstacle(q) is None)


def _check_path(impl: str, precision: str, q: Tensor, *others: Tensor) -> None:
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl must be "auto", "triton" or "torch"; got {impl!r}')
    if precision not in ("float32", "tf32"):
        raise ValueError(f'precision must be "float32" or "tf32"; got {precision!r}')
    if impl == "triton" and (reason := obstacle(q)) is not None:
        raise ValueError(f'impl="triton" cannot serve this call: {reason}; use "auto" or "torch"')
    # The operations underneath would lose the tangents without a word; a compiler does not see them.
    if forward_ad._current_level >= 0 and (
        torch.compiler.is_compiling()
        or any(forward_ad.unpack_dual(x).tangent is not None for x in (q, *others))
    ):
        raise NotImplementedError("pairwise attention has no forward-mode derivative in this version")
