"""Pairwise attention as functions: check the arguments, choose who computes the call.

The kernels compute it on CUDA, `tiled.py` elsewhere and in float64. Forward mode, and ``torch.func`` inside
torch.compile, use `reference.py`.

``S[b, i, j] = 1 / (1 + ||q[b, i] - a[b, j]||)`` (Yin et al., "ABCNN", TACL 2016). Shapes: q (B, Q, D),
a (B, A, D), v (B, A, V), S (B, Q, A); q (Q, D) with a (A, D) is taken as one unbatched pair of sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatematch.checks import (
    FLOATING,
    GivenLengths,
    check_alike,
    check_choice,
    check_dtype,
    check_lengths,
    check_shape,
    check_tensor,
    has_nested,
)
from gatematch.plan import who_computes
from gatematch.torch_private import surroundings

from . import eager, ops


def pairwise_attention(
    q: Tensor,
    a: Tensor,
    q_lengths: GivenLengths | None = None,
    a_lengths: GivenLengths | None = None,
    *,
    impl: str = "auto",
    precision: str = "float32",
) -> Tensor:
    """Pairwise attention ``S[b, i, j] = 1 / (1 + ||q[b, i] - a[b, j]||)``, in the graph and batched.

    Exact at every distance: float32 within 1e-6 of the true value, float16 and bfloat16 within one
    rounding. Equal rows score exactly 1 and pass no gradient to each other.

    With `impl="triton"`, and with "auto" on CUDA, distances beyond 1.8e19, whose squares overflow float32,
    score 0, and those beyond 4e12, whose cubes do, pass no gradient; "torch" computes them.

    Args:
        q: (B, Q, D) or (Q, D); float64, float32, float16 or bfloat16.
        a: (B, A, D) or (A, D), dtype and device of q.
        q_lengths: (B,) integers, a tensor on q's device or on the CPU, or a list, tuple or array (compiled or
            traced, a tensor): how many rows of each q are real; the others score 0, whatever they hold, and
            get no gradient.
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
    unbatched, q_lengths, a_lengths = check_pair(q, a, q_lengths, a_lengths)
    return checked_attention(q, a, q_lengths, a_lengths, unbatched, impl, precision)


def checked_attention(
    q: Tensor,
    a: Tensor,
    q_lengths: Tensor | None,
    a_lengths: Tensor | None,
    unbatched: bool,
    impl: str = "auto",
    precision: str = "float32",
) -> Tensor:
    """`pairwise_attention` of a pair that `check_pair` has passed, with what it returned."""
    path = _path((q, a, q_lengths, a_lengths), impl, precision)
    if unbatched:
        q, a = q[None], a[None]
    S: Tensor
    if path == "eager":
        S = eager.attention(q, a, q_lengths, a_lengths)
    elif path == "reference":
        S = ops.by_reference(ops.attention, q, a, q_lengths, a_lengths)
    else:
        S = ops.attention(q, a, q_lengths, a_lengths, path, precision)[0]
    return S[0] if unbatched else S


def pairwise_attend(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    normalize: str | None = None,
    *,
    q_lengths: GivenLengths | None = None,
    a_lengths: GivenLengths | None = None,
    impl: str = "auto",
    precision: str = "float32",
) -> Tensor:
    """``S @ v`` without S in memory: peak memory is O(Q + A), forward and backward.

    Second derivatives and ``torch.func`` inside of what is compiled take O(Q·A·(D + V)); forward mode
    takes that of a few rows of q at a time.

    The Triton kernels take S of distances beyond 1.8e19 as 0: see `pairwise_attention`.

    Args:
        q: (B, Q, D) or (Q, D), as for `pairwise_attention`.
        a: (B, A, D) or (A, D).
        v: (B, A, V) or (A, V), dtype and device of q; rows past `a_lengths` count as 0.
        normalize: None, or "rows" to divide row i by ``sum_j S[b, i, j]`` (rows without any pair give 0).
        q_lengths: (B,) integers; rows past them give 0.
        a_lengths: (B,) integers; rows past them are left out.
        impl: as for `pairwise_attention`.
        precision: as for `pairwise_attention`.

    Returns:
        (B, Q, V) or (Q, V), in the dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device, shape or value, by name.
    """
    unbatched, q_lengths, a_lengths = check_pair(q, a, q_lengths, a_lengths)
    check_tensor("v", v)
    check_alike("v", v, "q", q)
    check_shape("v", v, (*a.shape[:-1], None))
    check_choice("normalize", normalize, (None, "rows"))
    path = _path((q, a, q_lengths, a_lengths, v), impl, precision)
    if unbatched:
        q, a, v = q[None], a[None], v[None]
    O: Tensor
    if path == "eager":
        O = eager.PairwiseAttend.apply(q, a, v, q_lengths, a_lengths, normalize == "rows")
    elif path == "reference":
        options = {"v": v, "normalize": normalize == "rows"}
        O = ops.by_reference(ops.attend, q, a, q_lengths, a_lengths, **options)
    else:
        O = ops.attend(q, a, v, q_lengths, a_lengths, normalize == "rows", path, precision)[0].to(v.dtype)
    return O[0] if unbatched else O


def pairwise_sums(
    q: Tensor,
    a: Tensor,
    q_lengths: GivenLengths | None = None,
    a_lengths: GivenLengths | None = None,
    *,
    impl: str = "auto",
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """Row sums and column sums of S without S in memory (the weights of ABCNN-2's pooling).

    The Triton kernels take S of distances beyond 1.8e19 as 0: see `pairwise_attention`.

    Args:
        q: (B, Q, D) or (Q, D), as for `pairwise_attention`.
        a: (B, A, D) or (A, D).
        q_lengths: (B,) integers; rows past them are left out of the column sums, and their own sums are 0.
        a_lengths: the same for a.
        impl: as for `pairwise_attention`.
        precision: as for `pairwise_attention`.

    Returns:
        ``S.sum(2)`` (B, Q) and ``S.sum(1)`` (B, A), or (Q,) and (A,), in the dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device, shape or value, by name.
    """
    unbatched, q_lengths, a_lengths = check_pair(q, a, q_lengths, a_lengths)
    path = _path((q, a, q_lengths, a_lengths), impl, precision)
    if unbatched:
        q, a = q[None], a[None]
    if path == "eager":
        r, c = eager.PairwiseSums.apply(q, a, q_lengths, a_lengths)
    elif path == "reference":
        r, c = ops.by_reference(ops.sums, q, a, q_lengths, a_lengths)
    else:
        r, c = ops.sums(q, a, q_lengths, a_lengths, path, precision)
        r, c = r.to(q.dtype), c.to(q.dtype)
    return (r[0], c[0]) if unbatched else (r, c)


def _path(given: Sequence[Any], impl: str, precision: str) -> str:
    """Who computes a call, see plan.py; the ops know "triton" and "torch" by these names too."""
    if type(precision) is not str or precision not in ("float32", "tf32"):
        check_choice("precision", precision, ("float32", "tf32"))
    return who_computes(given[0], impl, surroundings(given, given))


def check_pair(
    q: Tensor, a: Tensor, q_lengths: GivenLengths | None, a_lengths: GivenLengths | None
) -> tuple[bool, Tensor | None, Tensor | None]:
    """Raise for anything wrong; whether q and a are unbatched, and the lengths on their device."""
    try:
        strided = q.layout is a.layout is torch.strided
        dtype, shape, other = q.dtype, q.shape, a.shape
    except AttributeError:  # no tensor
        strided = False
    except RuntimeError:
        if not has_nested((q, a)):
            raise
        strided = False
    if not strided or not isinstance(q, Tensor) or not isinstance(a, Tensor):
        check_tensor("q", q)
        check_tensor("a", a)
    cpu = q.is_cpu
    if not (cpu or q.is_cuda):
        raise ValueError(f"q: expected device cpu or cuda, got {q.device}")
    # `is_cpu` costs a third of comparing devices.
    if dtype not in FLOATING or a.dtype != dtype or not (a.is_cpu if cpu else a.device == q.device):
        check_dtype("q", dtype)
        check_alike("a", a, "q", q)
    rank = len(shape)
    if rank not in (2, 3):
        raise ValueError(f"q: expected shape (B, Q, D) or (Q, D), got {tuple(shape)}")
    if shape[-1] == 0:
        raise ValueError(f"q: expected at least one feature, got shape {tuple(shape)}")
    if len(other) != rank or other[-1] != shape[-1] or (rank == 3 and other[0] != shape[0]):
        transposed = len(other) == rank and other[-1] == shape[-2]
        expected = (*shape[:-2], None, shape[-1])
        check_shape("a", a, expected, "; q looks transposed" if transposed else "")
    if q_lengths is not None:
        q_lengths = _lengths(q_lengths, "q", q)
    if a_lengths is not None:
        a_lengths = _lengths(a_lengths, "a", a)
    return rank == 2, q_lengths, a_lengths


def _lengths(lengths: GivenLengths, like: str, rows: Tensor) -> Tensor:
    """Checked, and on the device of the rows; the host does not wait for the copy."""
    found = check_lengths(f"{like}_lengths", lengths, like, rows, size=like.upper())
    return found.to(rows.device, non_blocking=True)
