"""What the arguments of pairwise attention must be, before any kernel runs.

Shapes: q (B, Q, D), a (B, A, D), or unbatched (Q, D), (A, D); lengths (B,).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gatematch.torch_private import forward_mode, transformed

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_pair(q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None) -> bool:
    """Raise for anything wrong; returns whether q and a are unbatched."""
    check_rows("q", q, q)
    check_rows("a", a, q)
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
    return q.dim() == 2


def check_rows(name: str, rows: Tensor, like: Tensor) -> None:
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(rows).__name__}")
    if not (rows.is_cpu or rows.is_cuda):
        raise ValueError(f"{name} must be on a CPU or CUDA device; got {rows.device}")
    if rows is like:
        check_dtype(name, rows.dtype)
        return
    if rows.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of q, {like.dtype}; got {rows.dtype}")
    if rows.device != like.device:
        raise ValueError(f"{name} must be on the device of q, {like.device}; got {rows.device}")


def check_weighted(name: str, rows: Tensor, weight: Tensor) -> None:
    """Rows that weights multiply are on their device, in their dtype; autocast unites all but float64."""
    if rows.device != weight.device:
        raise ValueError(f"{name} must be on the device of the weights, {weight.device}; got {rows.device}")
    dtypes = {rows.dtype, weight.dtype}
    if len(dtypes) > 1 and (torch.float64 in dtypes or not torch.is_autocast_enabled(rows.device.type)):
        raise TypeError(f"{name} must have the dtype of the weights, {weight.dtype}; got {rows.dtype}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16; got {dtype}")


def check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int; got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")


def check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool; got {type(value).__name__}")


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
    # What is traced or batched has no values to look at.
    if torch.compiler.is_compiling() or transformed() or forward_mode() or not lengths.numel():
        return
    # torch has no order of its wider unsigned integers, hence long(). Looking at the values would make a
    # device wait; there, wrong lengths are cut to what is possible.
    if lengths.device.type == "cpu":
        low, high = map(int, lengths.long().aminmax())
        if low < 0 or high > rows.shape[1]:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} must lie between 0 and {size} = {rows.shape[1]}; got {wrong}")
    elif os.environ.get("GATEMATCH_DEBUG") == "1":
        values = lengths.long()
        torch._assert_async(((values >= 0) & (values <= rows.shape[1])).all())
