"""Pairwise attention that is never in memory: S @ v and the sums of S (backward: pairwise_stream_bwd.py).

    S_ij = 1 / (1 + ||x_i - y_j||)      O_i = sum_j S_ij v_j      r_i = sum_j S_ij      c_j = sum_i S_ij

A program owns a block of rows and makes one tile of S after the other, in registers: from one product of
tensor cores, near pairs (distance.py) left out of it and added from their differences. There is no softmax,
so the partial sums of separate ranges of columns simply add. Memory is O(Q + A), forward and backward.

Shapes: x (B, M, D), y (B, N, D), v (B, N, V), O (B, M, V), r (B, M), c (B, N).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .distance import DIRECT, length_of
from .launch import layout, multiprocessors, product_precision, programs, rows
from .numerics import as_multiplied
from .pairwise_prepare import FEATURES, ROWS, Side, padded, tile_scores

_STRIDES = ["stride_xb", "stride_x", "stride_yb", "stride_y"]


@triton.jit(do_not_specialize=["B", "M", "N", "D", "V", "splits", *_STRIDES, "stride_vb", "stride_v"])
def pairwise_stream_fwd(
    x_ptr, x_lengths_ptr, x_copy_ptr, x_squares_ptr, y_ptr, y_lengths_ptr, y_copy_ptr, y_squares_ptr,
    v_ptr, y_scale_ptr, o_ptr, r_ptr,
    B, M, N, D, V, splits,
    stride_xb: tl.int64, stride_x: tl.int64, stride_yb: tl.int64, stride_y: tl.int64,
    stride_vb: tl.int64, stride_v: tl.int64,
    VEC_D: tl.constexpr, VEC_V: tl.constexpr, PREC: tl.constexpr, FEW: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_V columns of S @ v for BLOCK_M rows, from one of `splits` ranges of the rows of y.

    o (splits, B, M, V); r (splits, B, M): the row sums, if given. NORMALIZE: o is divided by them. With
    y_scale (B, N) the columns of S are multiplied by it first.
    """
    D *= VEC_D
    stride_x *= VEC_D
    stride_y *= VEC_D
    V *= VEC_V
    stride_v *= VEC_V
    # The programs of one block of rows come one after the other.
    tiles_v = tl.cdiv(V, BLOCK_V)
    tiles_m = tl.cdiv(M, BLOCK_M)
    n = tl.program_id(0) % tiles_v * BLOCK_V + tl.arange(0, BLOCK_V)
    program = tl.program_id(0) // tiles_v
    i0 = program % tiles_m * BLOCK_M
    split = program // tiles_m % splits
    b = (program // tiles_m // splits).to(tl.int64)
    x_left = length_of(x_lengths_ptr, b, M) - i0
    y_end = length_of(y_lengths_ptr, b, N)
    features = padded(D, FEATURES)
    x_ptr += b * stride_xb * VEC_D + i0 * stride_x
    y_ptr += b * stride_yb * VEC_D
    v_ptr += b * stride_vb * VEC_V
    x_copy_ptr += (b * padded(M, ROWS) + i0) * features
    x_squares_ptr += b * padded(M, ROWS) + i0
    y_copy_ptr += b * padded(N, ROWS) * features
    y_squares_ptr += b * padded(N, ROWS)
    step_x = stride_x.to(tl.int32)
    step_y = stride_y.to(tl.int32)
    step_v = stride_v.to(tl.int32)
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    in_v = n < V
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    row_sums = tl.zeros((BLOCK_M,), tl.float32)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = split * tiles_n // splits * BLOCK_N
    last = tl.minimum((split + 1) * tiles_n // splits * BLOCK_N, y_end)
    if x_left <= 0:
        last = first
    for j0 in range(first, last, BLOCK_N):
        s = tile_scores(
            x_ptr, y_ptr + j0 * stride_y, x_copy_ptr, y_copy_ptr + j0 * features,
            x_squares_ptr, y_squares_ptr + j0, x_left, y_end - j0, D, features.to(tl.int32),
            step_x, step_y, PREC, FEW, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_P,
        )  # fmt: skip
        if y_scale_ptr is not None:
            s *= tl.load(y_scale_ptr + b * N + j0 + j, j < y_end - j0, other=0.0)[None, :]
        v_at = v_ptr + j0 * stride_v + j[:, None] * step_v + n[None, :]
        v = tl.load(v_at, (j < y_end - j0)[:, None] & in_v[None, :], other=0.0)
        if v.dtype == tl.float32:
            s = as_multiplied(s, PREC)
            v = as_multiplied(v, PREC)
        else:
            s = s.to(v.dtype)
        row_sums += tl.sum(s.to(tl.float32), 1)
        total = tl.dot(s, v, total, input_precision=PREC)
    if NORMALIZE:
        total /= tl.where(row_sums == 0.0, 1.0, row_sums)[:, None]
    out = (split * B + b) * M + i0
    inside = i < M - i0
    o_at = o_ptr + out * V + i[:, None] * V + n[None, :]
    tl.store(o_at, total.to(o_ptr.dtype.element_ty), inside[:, None] & in_v[None, :])
    if r_ptr is not None:
        tl.store(r_ptr + out + i, row_sums, inside & (tl.program_id(0) % tiles_v == 0))


@triton.jit(do_not_specialize=["B", "M", "N", "D", "splits_m", "splits_n", *_STRIDES])
def pairwise_stream_sums(
    x_ptr, x_lengths_ptr, x_copy_ptr, x_squares_ptr, y_ptr, y_lengths_ptr, y_copy_ptr, y_squares_ptr,
    r_ptr, c_ptr,
    B, M, N, D, splits_m, splits_n,
    stride_xb: tl.int64, stride_x: tl.int64, stride_yb: tl.int64, stride_y: tl.int64,
    VEC_D: tl.constexpr, PREC: tl.constexpr, FEW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Row and column sums of one of splits_m x splits_n rectangles of S.

    r (splits_n, B, M) and c (splits_m, B, N) are zeros at first; a program adds to its own part of c.
    """
    D *= VEC_D
    stride_x *= VEC_D
    stride_y *= VEC_D
    split_n = tl.program_id(0) % splits_n
    split_m = tl.program_id(0) // splits_n % splits_m
    b = (tl.program_id(0) // splits_n // splits_m).to(tl.int64)
    x_end = length_of(x_lengths_ptr, b, M)
    y_end = length_of(y_lengths_ptr, b, N)
    features = padded(D, FEATURES)
    x_ptr += b * stride_xb * VEC_D
    y_ptr += b * stride_yb * VEC_D
    x_copy_ptr += b * padded(M, ROWS) * features
    x_squares_ptr += b * padded(M, ROWS)
    y_copy_ptr += b * padded(N, ROWS) * features
    y_squares_ptr += b * padded(N, ROWS)
    r_ptr += (split_n * B + b) * M
    c_ptr += (split_m * B + b) * N
    step_x = stride_x.to(tl.int32)
    step_y = stride_y.to(tl.int32)
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    last_m = tl.minimum((split_m + 1) * tiles_m // splits_m * BLOCK_M, x_end)
    last_n = tl.minimum((split_n + 1) * tiles_n // splits_n * BLOCK_N, y_end)
    for i0 in range(split_m * tiles_m // splits_m * BLOCK_M, last_m, BLOCK_M):
        row_sums = tl.zeros((BLOCK_M,), tl.float32)
        for j0 in range(split_n * tiles_n // splits_n * BLOCK_N, last_n, BLOCK_N):
            s = tile_scores(
                x_ptr + i0 * stride_x, y_ptr + j0 * stride_y, x_copy_ptr + i0 * features,
                y_copy_ptr + j0 * features, x_squares_ptr + i0, y_squares_ptr + j0, x_end - i0, y_end - j0,
                D, features.to(tl.int32), step_x, step_y, PREC, FEW, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_P,
            )  # fmt: skip
            row_sums += tl.sum(s, 1)
            in_y = j < y_end - j0
            tl.debug_barrier()  # what another thread added in the rows above must be seen
            tl.store(c_ptr + j0 + j, tl.load(c_ptr + j0 + j, in_y, other=0.0) + tl.sum(s, 0), in_y)
        tl.store(r_ptr + i0 + i, row_sums, i < x_end - i0)


def _wanted(device: torch.device) -> int:
    """How many programs keep a device busy."""
    return 2 * multiprocessors(device)


def attend_forward(
    x: Side,
    y: Side,
    v: Tensor,
    *,
    y_scale: Tensor | None = None,
    normalize: bool = False,
    precision: str = "float32",
) -> tuple[Tensor, Tensor | None]:
    """S @ v (B, M, V) for v (B, N, V) of the dtype of x; y_scale (B, N) multiplies the columns of S first.

    With `normalize`, rows are divided by their sums r (B, M), which are returned too; both are in float32
    then, as the backward wants them.
    """
    (B, M, D), N, V = x.rows.shape, y.rows.shape[1], v.shape[2]
    dtype = torch.float32 if normalize else v.dtype
    if B * M * N * V == 0:
        return v.new_zeros(B, M, V, dtype=dtype), v.new_ones(B, M, dtype=dtype) if normalize else None
    arch = config.architecture(v.device)
    tile = config.choose("pairwise_stream_fwd", arch, v.dtype, {"M": M, "N": N, "D": D, "V": V})
    v = rows(v)
    vec_d, strides = layout(x.rows, y.rows, size=D)
    vec_v, v_strides = layout(v, size=V)
    tiles = B * triton.cdiv(M, tile.blocks["BLOCK_M"]) * triton.cdiv(V, tile.blocks["BLOCK_V"])
    splits = min(triton.cdiv(_wanted(v.device), tiles), triton.cdiv(N, tile.blocks["BLOCK_N"]))
    O = v.new_empty(splits, B, M, V, dtype=dtype if splits == 1 else torch.float32)
    r = v.new_empty(splits, B, M, dtype=torch.float32) if normalize else None
    with torch.cuda.device_of(v):
        pairwise_stream_fwd[programs(tiles * splits)](
            *x.pointers, *y.pointers, v, y_scale, O, r,
            B, M, N, D // vec_d, V // vec_v, splits, *strides, *v_strides,
            VEC_D=vec_d, VEC_V=vec_v, PREC=product_precision(v.dtype, precision, arch),
            FEW=D <= DIRECT, NORMALIZE=normalize and splits == 1,
            **tile.options,
        )  # fmt: skip
    if splits == 1:
        return O[0], None if r is None else r[0]
    O = O.sum(0)
    if r is not None:
        r = r.sum(0)
        O /= torch.where(r == 0, 1.0, r)[..., None]
    return O.to(dtype), r


def sums_forward(x: Side, y: Side, *, precision: str = "float32") -> tuple[Tensor, Tensor]:
    """Row sums (B, M) and column sums (B, N) of S, float32."""
    (B, M, D), N, dtype = x.rows.shape, y.rows.shape[1], x.rows.dtype
    if B * M * N == 0:
        return x.squares.new_zeros(B, M), x.squares.new_zeros(B, N)
    device = x.rows.device
    arch = config.architecture(device)
    tile = config.choose("pairwise_stream_sums", arch, dtype, {"M": M, "N": N, "D": D})
    each = math.isqrt(triton.cdiv(_wanted(device), B) - 1) + 1
    splits_m = min(each, triton.cdiv(M, tile.blocks["BLOCK_M"]))
    splits_n = min(each, triton.cdiv(N, tile.blocks["BLOCK_N"]))
    vec_d, strides = layout(x.rows, y.rows, size=D)
    r, c = x.squares.new_zeros(splits_n, B, M), x.squares.new_zeros(splits_m, B, N)
    with torch.cuda.device_of(r):
        pairwise_stream_sums[programs(B * splits_m * splits_n)](
            *x.pointers, *y.pointers, r, c,
            B, M, N, D // vec_d, splits_m, splits_n, *strides,
            VEC_D=vec_d, PREC=product_precision(dtype, precision, arch), FEW=D <= DIRECT,
            **tile.options,
        )  # fmt: skip
    return r.sum(0), c.sum(0)
