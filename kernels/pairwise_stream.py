"""Pairwise attention that is never in memory: S @ v and the sums of S (backward: pairwise_stream_bwd.py).

    S_ij = 1 / (1 + ||x_i - y_j||)      O_i = sum_j S_ij v_j      r_i = sum_j S_ij      c_j = sum_i S_ij

A program owns a block of rows and makes one tile of S after the other, in registers, from one product of
tensor cores. It takes near pairs (distance.py) as 0 there and notes their tiles, and adds them from their
differences in a second walk over those tiles alone: what most tiles never need takes no registers of the
first one. There is no softmax, so the partial sums of separate ranges of columns simply add. Memory is
O(Q + A), forward and backward.

Shapes: x (B, M, D), y (B, N, D), v (B, N, V), O (B, M, V), r (B, M), c (B, N).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .distance import DIRECT, length_of, share, squares_by_feature
from .launch import layout, multiprocessors, product_precision, programs
from .numerics import as_multiplied
from .pairwise_prepare import (
    FEATURES,
    INFINITY,
    NEAR,
    ROWS,
    Side,
    aligned,
    block_of,
    blocks_held,
    either,
    far_scores,
    far_squares,
    fitting,
    held_copies,
    in_whole_blocks,
    near_scores,
    padded,
    shared_out,
    tile_product,
    tile_scores,
)

_STRIDES = ["stride_xb", "stride_x", "stride_yb", "stride_y"]


# A product with so many columns of ones adds up rows of numbers as they are multiplied, in few instructions.
ONES = tl.constexpr(16)


@triton.jit
def add_row_sums(sums, S):
    """sums [M, ONES], the same in every column, plus the row sums of S [M, N]."""
    if S.dtype == tl.float32:
        return sums + tl.sum(S, 1)[:, None]
    else:
        return tl.dot(S, tl.full((S.shape[1], ONES), 1.0, S.dtype), sums)


@triton.jit
def add_products(
    totals, S, v_ptr, n0, V, y_left, step_v,
    VEC_V: tl.constexpr, PREC: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """totals, PARTS blocks [M, BLOCK_V], plus S [M, N] @ v for the columns from n0 on; S as multiplied."""
    if v_ptr.dtype.element_ty == tl.float32:
        S = as_multiplied(S, PREC)
    else:
        S = S.to(v_ptr.dtype.element_ty)
    sums = ()
    for c in tl.static_range(PARTS):
        n = n0 + c * BLOCK_V + tl.arange(0, BLOCK_V)
        v = block_of(v_ptr, n, V, y_left, step_v, VEC_V, PREC, S.shape[1])
        sums += (tl.dot(S, v, totals[c], input_precision=PREC),)
    return sums, S


@triton.jit(do_not_specialize=["B", "M", "N", "D", "V", "splits", *_STRIDES, "stride_vb", "stride_v"])
def pairwise_stream_fwd(
    x_ptr, x_lengths_ptr, x_copy_ptr, x_squares_ptr, y_ptr, y_lengths_ptr, y_copy_ptr, y_squares_ptr,
    v_ptr, y_scale_ptr, o_ptr, r_ptr,
    B, M, N, D, V, splits,
    stride_xb: tl.int64, stride_x: tl.int64, stride_yb: tl.int64, stride_y: tl.int64,
    stride_vb: tl.int64, stride_v: tl.int64,
    VEC_D: tl.constexpr, VEC_V: tl.constexpr, PREC: tl.constexpr, FEW: tl.constexpr, NORMALIZE: tl.constexpr,
    HELD: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """PARTS blocks of BLOCK_V columns of S @ v for BLOCK_M rows, from one of `splits` ranges of rows of y.

    o (splits, B, M, V); r (splits, B, M): the row sums, if given. NORMALIZE: o is divided by them. With
    y_scale (B, N') the columns of S are multiplied by it first. HELD: the number of blocks of BLOCK_K
    features, if those of x are kept, or 0.
    """
    tl.static_assert(NEAR <= BLOCK_N, "the bit of a tile is that of whole groups of NEAR columns")
    D *= VEC_D
    stride_x *= VEC_D
    stride_y *= VEC_D
    stride_v *= VEC_V
    # The programs of one block of rows come one after the other.
    tiles_v = tl.cdiv(V, PARTS * BLOCK_V)
    tiles_m = tl.cdiv(M, BLOCK_M)
    n0 = tl.program_id(0) % tiles_v * (PARTS * BLOCK_V)
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
    if y_scale_ptr is not None:
        y_scale_ptr += b * padded(N, ROWS)
    step = features.to(tl.int32)
    step_x = stride_x.to(tl.int32)
    step_y = stride_y.to(tl.int32)
    step_v = stride_v.to(tl.int32)
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    totals = ()
    for c in tl.static_range(PARTS):  # noqa: B007
        totals += (tl.zeros((BLOCK_M, BLOCK_V), tl.float32),)
    sums = tl.zeros((BLOCK_M, ONES), tl.float32)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = share(split, tiles_n, splits) * BLOCK_N
    last = tl.minimum(share(split + 1, tiles_n, splits) * BLOCK_N, y_end)
    if x_left <= 0:
        last = first
    x = ()
    x_squares = tl.zeros((BLOCK_M,), tl.float32)
    found = tl.zeros((BLOCK_M,), tl.int32)
    if not FEW:
        x_squares = tl.load(x_squares_ptr + i)
        x = held_copies(x_copy_ptr, HELD, BLOCK_M, BLOCK_K)
    # The first walk takes near pairs as 0 and notes their tiles: a bit for each, number t in the bit t % 32.
    for j0 in range(first, last, BLOCK_N):
        y_left = y_end - j0
        if FEW:
            d2 = squares_by_feature(
                x_ptr, y_ptr + j0 * stride_y, x_left, y_left, D, step_x, step_y, BLOCK_M, BLOCK_N
            )
            d2 = tl.where((j < y_left)[None, :], d2, float("inf"))
        else:
            product, _ = tile_product(
                x, x_copy_ptr, y_copy_ptr + j0 * features, step, PREC, HELD, BLOCK_M, BLOCK_N, BLOCK_K
            )
            d2, past = far_squares(product, x_squares, tl.load(y_squares_ptr + j0 + j))
            found |= (past > INFINITY).to(tl.int32) << (j0 // BLOCK_N % 32)
        S = far_scores(d2, v_ptr.dtype.element_ty)
        if y_scale_ptr is not None:
            S *= tl.load(y_scale_ptr + j0 + j)[None, :]
        totals, S = add_products(
            totals, S, v_ptr + j0 * stride_v, n0, V, y_left, step_v, VEC_V, PREC, PARTS, BLOCK_V
        )
        if r_ptr is not None:
            sums = add_row_sums(sums, S)
    if not FEW:
        y_sums = tl.zeros((NEAR,), tl.float32)
        visited = tl.reduce(found, 0, either)
        if visited != 0:
            for j0 in tl.range(first, last, NEAR, num_stages=1):
                if (visited >> (j0 // BLOCK_N % 32)) & 1 != 0:
                    y_left = y_end - j0
                    y_squares = tl.load(y_squares_ptr + j0 + tl.arange(0, NEAR))
                    y_sums += y_squares
                    S = near_scores(
                        x_ptr, y_ptr + j0 * stride_y, x_copy_ptr, y_copy_ptr + j0 * features,
                        x_squares, y_squares, x_left, y_left, D, step, step_x, step_y,
                        PREC, BLOCK_M, NEAR, BLOCK_K, BLOCK_P,
                    )  # fmt: skip
                    if y_scale_ptr is not None:
                        S *= tl.load(y_scale_ptr + j0 + tl.arange(0, NEAR))[None, :]
                    totals, S = add_products(
                        totals, S, v_ptr + j0 * stride_v, n0, V, y_left, step_v, VEC_V, PREC, PARTS, BLOCK_V
                    )
                    if r_ptr is not None:
                        sums = add_row_sums(sums, S)
        # Neither walk has taken the pairs of rows of NaN.
        squares = x_squares + tl.sum(y_sums, 0)
        lost = tl.where((squares != squares) & (first < last), float("nan"), 0.0)
    row_sums = tl.sum(sums, 1) / ONES
    if not FEW:
        row_sums += lost
    out = (split * B + b) * M + i0
    inside = i < M - i0
    for c in tl.static_range(PARTS):
        total = totals[c]
        if not FEW:
            total += lost[:, None]
        if NORMALIZE:
            total /= tl.where(row_sums == 0.0, 1.0, row_sums)[:, None]
        total = tl.where((i < x_left)[:, None], total, 0.0)
        n = n0 + c * BLOCK_V + tl.arange(0, BLOCK_V)
        o_at = o_ptr + out * V + i[:, None] * V + n[None, :]
        tl.store(o_at, total.to(o_ptr.dtype.element_ty), inside[:, None] & (n < V)[None, :])
    if r_ptr is not None:
        row_sums = tl.where(i < x_left, row_sums, 0.0)
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
    # Without `share`, which spills here on sm_80: of so few parts 32 bits hold the products.
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
    v = aligned(v)
    vec_d, strides = layout(x.rows, y.rows, size=D)
    vec_v, v_strides = layout(v)
    options = fitting(tile, D)
    held = blocks_held(D, options.pop("RESIDENT"), options["BLOCK_K"])
    groups, options["PARTS"] = shared_out(triton.cdiv(V, options["BLOCK_V"]), options["PARTS"])
    tiles = B * triton.cdiv(M, options["BLOCK_M"]) * groups
    splits = min(triton.cdiv(_wanted(v.device), tiles), triton.cdiv(N, tile.blocks["BLOCK_N"]))
    O = v.new_empty(splits, B, M, V, dtype=dtype if splits == 1 else torch.float32)
    r = v.new_empty(splits, B, M, dtype=torch.float32) if normalize else None
    with torch.cuda.device_of(v):
        pairwise_stream_fwd[programs(tiles * splits)](
            *x.pointers, *y.pointers, v, in_whole_blocks(y_scale), O, r,
            B, M, N, D // vec_d, V, splits, *strides, *v_strides,
            VEC_D=vec_d, VEC_V=vec_v, PREC=product_precision(v.dtype, precision, arch),
            FEW=D <= DIRECT, NORMALIZE=normalize and splits == 1, HELD=held,
            **options,
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
