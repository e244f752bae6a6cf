"""Pairwise attention as functions: check the arguments, choose the path.

On CUDA that is the kernels, elsewhere `tiled.py`; float64 is for `tiled.py` everywhere.

``S[b, i, j] = 1 / (1 + ||q[b, i] - a[b, j]||)`` (Yin et al., "ABCNN", TACL 2016). Shapes: q (B, Q, D),
a (B, A, D), v (B, A, V), S (B, Q, A); q (Q, D) with a (A, D) is taken as one unbatched pair of sentences.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from . import ops

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
    unbatched = _check(q, a, q_lengths, a_lengths, impl, precision)
    if unbatched:
        q, a = q[None], a[None]
    S: Tensor
    if _takes_kernels(q, impl):
        S = _kernels().PairwiseAttention.apply(q, a, q_lengths, a_lengths, precision)
    else:
        S = ops.PairwiseAttention.apply(q, a, q_lengths, a_lengths)
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
    unbatched = _check(q, a, q_lengths, a_lengths, impl, precision)
    _check_rows("v", v, q)
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
    unbatched = _check(q, a, q_lengths, a_lengths, impl, precision)
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


def _no_kernels(q: Tensor) -> str | None:
    """Why the kernels cannot serve these inputs, or None if they can."""
    if q.dtype == torch.float64:
        return "the kernels take float32, float16 and bfloat16; got float64"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the kernels run on CUDA; got {q.device}"
    if not _has_triton():
        return "triton is not installed"
    if q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"the kernels need compute capability 8.0; got {torch.cuda.get_device_name(q.device)}"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _takes_kernels(q: Tensor, impl: str) -> bool:
    return impl == "triton" or (impl == "auto" and q.is_cuda and _no_kernels(q) is None)


def _check(
    q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None, impl: str, precision: str
) -> bool:
    """Raise for anything wrong; returns whether q and a are unbatched."""
    _check_rows("q", q, q)
    _check_rows("a", a, q)
    if q.dim() not in (2, 3):
        raise ValueError(f"q must have shape (B, Q, D) or (Q, D); got {tuple(q.shape)}")
    if a.dim() != q.dim():
        expected = "(B, A, D), as q is batched" if q.dim() == 3 else "(A, D), as q is unbatched"
        raise ValueError(f"a must have shape {expected}; got {tuple(a.shape)}")
    if q.dim() == 3 and a.shape[0] != q.shape[0]:
        raise ValueError(
            f"a must have the batch size of q, B = {q.shape[0]}; got {a.shape[0]}, shape {tuple(a.shape)}"
        )
    if a.shape[-1] != q.shape[-1]:
        message = (
            f"a must have the features of q, D = {q.shape[-1]}; got {a.shape[-1]}, shape {tuple(a.shape)}"
        )
        if a.shape[-2] == q.shape[-1]:
            message += "; a looks transposed: pass a.mT"
        elif a.shape[-1] == q.shape[-2]:
            message += "; q looks transposed: pass q.mT"
        raise ValueError(message)
    if q.shape[-1] == 0:
        raise ValueError(f"q must have at least one feature, D >= 1; got shape {tuple(q.shape)}")
    for name, lengths, rows, size in (("q_lengths", q_lengths, q, "Q"), ("a_lengths", a_lengths, a, "A")):
        if lengths is not None:
            _check_lengths(name, lengths, rows, size)
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl must be "auto", "triton" or "torch"; got {impl!r}')
    if precision not in ("float32", "tf32"):
        raise ValueError(f'precision must be "float32" or "tf32"; got {precision!r}')
    if impl == "triton" and (reason := _no_kernels(q)) is not None:
        raise ValueError(f'impl="triton" cannot serve this call: {reason}; use "auto" or "torch"')
    return q.dim() == 2


def _check_rows(name: str, rows: Tensor, like: Tensor) -> None:
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(rows).__name__}")
    if not (rows.is_cpu or rows.is_cuda):
        raise ValueError(f"{name} must be on a CPU or CUDA device; got {rows.device}")
    if rows is like:
        if rows.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16; got {rows.dtype}")
        return
    if rows.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of q, {like.dtype}; got {rows.dtype}")
    if rows.device != like.device:
        raise ValueError(f"{name} must be on the device of q, {like.device}; got {rows.device}")


def _check_lengths(name: str, lengths: Tensor, rows: Tensor, size: str) -> None:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of integers; got {type(lengths).__name__}")
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers; got {lengths.dtype}")
    if rows.dim() == 2:
        raise ValueError(
            f"{name} goes with batched input; got {name} with unbatched rows of shape {tuple(rows.shape)}"
        )
    if lengths.shape != rows.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({rows.shape[0]},), one length a sequence; got {tuple(lengths.shape)}"
        )
    if lengths.device != rows.device:
        raise ValueError(f"{name} must be on the device of q, {rows.device}; got {lengths.device}")
    if torch.compiler.is_compiling() or not lengths.numel():
        return
    # Looking at the values would make a device wait; there, wrong lengths are cut to what is possible.
    if lengths.device.type != "cpu":
        if os.environ.get("GATEMATCH_DEBUG") == "1":
            torch._assert_async(((lengths >= 0) & (lengths <= rows.shape[1])).all())
    else:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > rows.shape[1]:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} must lie between 0 and {size} = {rows.shape[1]}; got {wrong}")
