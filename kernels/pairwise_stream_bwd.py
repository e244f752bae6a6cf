"""The backward of S @ v and of the sums of S (pairwise_stream.py): the tiles are made again, none is kept.

With P = dL/dS, which is u_i·v_j for O = S @ v with u = dL/dO, and g_i + h_j for the sums, in general

    P_ij = (u_i·v_j + x_shift_i + y_shift_j) x_scale_i y_scale_j
    dL/dx_i = sum_j k_ij (y_j - x_i),    k = P S² / d          (k = 0 where d = 0)
            = (K y)_i - (sum_j k_ij) x_i                       (far pairs)

for (x, y) = (q, a) and, u and v changing places, for (a, q): two passes instead of atomics, the same bits in
every run. dL/dv = Sᵀ @ u is the forward itself. A program walks its tiles once for the far pairs and, if
there are any, once more for the near ones: one walk would need more registers than there are.

Shapes: x (B, M, D), y (B, N, D), u (B, M, V), v (B, N, V), shifts and scales (B, M) and (B, N) in float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .distance import (
    DIRECT,
    add_by_feature,
    add_to_rows,
    differences,
    length_of,
    near_distances,
    near_words,
    pick,
    slope,
    squares_by_feature,
)
from .launch import layout, product_precision, programs
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
    far_squares,
    fitting,
    held_copies,
    in_whole_blocks,
    near_of,
    padded,
    shared_out,
    tile_product,
)

_STRIDES = [f"stride_{of}" for of in ("xb", "x", "yb", "y", "ub", "u", "vb", "v")]


@triton.jit
def shifted_and_scaled(P, x_shift_ptr, y_shift_ptr, y_scale_ptr, x_at, y_at):
    """P with what belongs to its rows x_at and its columns y_at, but for x_scale."""
    if x_shift_ptr is not None:
        P += tl.load(x_shift_ptr + x_at)
    if y_shift_ptr is not None:
        P += tl.load(y_shift_ptr + y_at)
    if y_scale_ptr is not None:
        P *= tl.load(y_scale_ptr + y_at)
    return P


@triton.jit
def far_slopes(P, d2, dtype: tl.constexpr):
    """P S² / d of far pairs, as exact as `dtype` holds it; 0 where d² is infinite. No far d² is 0."""
    d2 = tl.minimum(d2, 1e38)
    inverse = tl.rsqrt(d2)
    e = tl.fma(d2, inverse, 1.0)
    root = tl.rsqrt(e)
    S = root * root
    if dtype == tl.float32:
        S = tl.fma(S, tl.fma(S, -e, 1.0), S)
    return P * (inverse * (S * S))


@triton.jit(do_not_specialize=["M", "N", "D", "V", *_STRIDES])
def pairwise_stream_bwd(
    x_ptr, x_lengths_ptr, x_copy_ptr, x_squares_ptr, y_ptr, y_lengths_ptr, y_copy_ptr, y_squares_ptr,
    u_ptr, v_ptr, x_shift_ptr, y_shift_ptr, x_scale_ptr, y_scale_ptr, dx_ptr,
    M, N, D, V,
    stride_xb: tl.int64, stride_x: tl.int64, stride_yb: tl.int64, stride_y: tl.int64,
    stride_ub: tl.int64, stride_u: tl.int64, stride_vb: tl.int64, stride_v: tl.int64,
    VEC_D: tl.constexpr, VEC_V: tl.constexpr, PREC: tl.constexpr, FEW: tl.constexpr,
    HELD: tl.constexpr, HELD_V: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """PARTS blocks of BLOCK_K columns of dL/dx for BLOCK_M rows of x. Without u and v their product is 0.

    HELD, HELD_V: the number of blocks of BLOCK_K features of x and of BLOCK_V columns of u, if those are
    kept, or 0. Shifts and scales are (B, M') and (B, N').
    """
    tl.static_assert(ROWS % BLOCK_M == 0 and ROWS % BLOCK_N == 0, "the copies have whole blocks of rows")
    tl.static_assert(FEATURES % BLOCK_K == 0, "the copies have whole blocks of features")
    tl.static_assert(NEAR <= BLOCK_N, "the bit of a tile is that of whole groups of NEAR columns")
    D *= VEC_D
    stride_x *= VEC_D
    stride_y *= VEC_D
    stride_u *= VEC_V
    stride_v *= VEC_V
    # The programs of one block of rows come one after the other.
    tiles_d = tl.cdiv(D, PARTS * BLOCK_K)
    tiles_m = tl.cdiv(M, BLOCK_M)
    k0 = tl.program_id(0) % tiles_d * (PARTS * BLOCK_K)
    i0 = tl.program_id(0) // tiles_d % tiles_m * BLOCK_M
    b = (tl.program_id(0) // tiles_d // tiles_m).to(tl.int64)
    x_left = length_of(x_lengths_ptr, b, M) - i0
    y_end = length_of(y_lengths_ptr, b, N)
    features = padded(D, FEATURES)
    x_ptr += b * stride_xb * VEC_D + i0 * stride_x
    y_ptr += b * stride_yb * VEC_D
    x_copy_ptr += (b * padded(M, ROWS) + i0) * features
    x_squares_ptr += b * padded(M, ROWS) + i0
    y_copy_ptr += b * padded(N, ROWS) * features
    y_squares_ptr += b * padded(N, ROWS)
    if u_ptr is not None:
        u_ptr += b * stride_ub * VEC_V + i0 * stride_u
        v_ptr += b * stride_vb * VEC_V
    step_x = stride_x.to(tl.int32)
    step_y = stride_y.to(tl.int32)
    step_u = stride_u.to(tl.int32)
    step_v = stride_v.to(tl.int32)
    step = features.to(tl.int32)
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_V)
    x_row = b * padded(M, ROWS) + i0
    y_row = b * padded(N, ROWS)
    in_x = i < x_left
    slopes = tl.zeros((BLOCK_M,), tl.float32)
    totals = ()
    for c in tl.static_range(PARTS):  # noqa: B007
        totals += (tl.zeros((BLOCK_M, BLOCK_K), tl.float32),)
    if x_left <= 0:
        y_end = 0
    x = ()
    u = ()
    x_squares = tl.zeros((BLOCK_M,), tl.float32)
    found = tl.zeros((BLOCK_M,), tl.int32)
    if not FEW:
        x_squares = tl.load(x_squares_ptr + i)
        x = held_copies(x_copy_ptr, HELD, BLOCK_M, BLOCK_K)
    for c in tl.static_range(HELD_V):
        u += (block_of(u_ptr, c * BLOCK_V + n, V, x_left, step_u, VEC_V, PREC, BLOCK_M),)
    # The first walk takes slopes of near pairs as 0 and notes their tiles, as that of pairwise_stream_fwd.
    for j0 in range(0, y_end, BLOCK_N):
        y_left = y_end - j0
        in_y = j < y_left
        y_at = y_ptr + j0 * stride_y
        y_copy_at = y_copy_ptr + j0 * features
        if FEW:
            d2 = squares_by_feature(x_ptr, y_at, x_left, y_left, D, step_x, step_y, BLOCK_M, BLOCK_N)
            d2 = tl.where(in_x[:, None] & in_y[None, :] & (d2 != 0.0), d2, float("inf"))
        else:
            product, y = tile_product(x, x_copy_ptr, y_copy_at, step, PREC, HELD, BLOCK_M, BLOCK_N, BLOCK_K)
            d2, past = far_squares(product, x_squares, tl.load(y_squares_ptr + j0 + j))
            found |= (past > INFINITY).to(tl.int32) << (j0 // BLOCK_N % 32)
        P = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HELD_V > 0:
            for c in tl.static_range(HELD_V):
                v = block_of(v_ptr + j0 * stride_v, c * BLOCK_V + n, V, y_left, step_v, VEC_V, PREC, BLOCK_N)
                P = tl.dot(u[c], tl.trans(v), P, input_precision=PREC)
        elif u_ptr is not None:
            for n0 in range(0, V, BLOCK_V):
                of_x = block_of(u_ptr, n0 + n, V, x_left, step_u, VEC_V, PREC, BLOCK_M)
                of_y = block_of(v_ptr + j0 * stride_v, n0 + n, V, y_left, step_v, VEC_V, PREC, BLOCK_N)
                P = tl.dot(of_x, tl.trans(of_y), P, input_precision=PREC)
        P = shifted_and_scaled(
            P, x_shift_ptr, y_shift_ptr, y_scale_ptr, x_row + i[:, None], y_row + j0 + j[None, :]
        )
        s = far_slopes(P, d2, x_ptr.dtype.element_ty)
        sums = ()
        if FEW:
            for c in tl.static_range(PARTS):
                sums += (
                    add_by_feature(
                        totals[c], s, x_ptr, y_at, in_x, in_y, k0 + c * BLOCK_K + k, D, step_x, step_y,
                        BLOCK_M, BLOCK_N,
                    ),
                )  # fmt: skip
        else:
            slopes += tl.sum(s, 1)
            if y_copy_ptr.dtype.element_ty == tl.bfloat16:
                s = s.to(tl.bfloat16)
            else:  # slopes may be too large for float16
                s = as_multiplied(s, PREC)
            for c in tl.static_range(PARTS):
                if HELD == PARTS:
                    block = y[c]
                else:
                    at = k0 + c * BLOCK_K + k
                    block = tl.load(
                        y_copy_at + j[:, None] * step + at[None, :], (at < step)[None, :], other=0.0
                    )
                if s.dtype == tl.float32:
                    block = block.to(tl.float32)
                sums += (tl.dot(s, block, totals[c], input_precision=PREC),)
        totals = sums
    if not FEW:
        y_sums = tl.zeros((NEAR,), tl.float32)
        sums = ()
        for c in tl.static_range(PARTS):
            at = k0 + c * BLOCK_K + k
            rows_x = tl.load(x_copy_ptr + i[:, None] * step + at[None, :], (at < step)[None, :], other=0.0)
            sums += (totals[c] - slopes[:, None] * rows_x.to(tl.float32),)
        totals = sums
        visited = tl.reduce(found, 0, either)
        if visited != 0:
            for j0 in tl.range(0, y_end, NEAR, num_stages=1):
                if (visited >> (j0 // BLOCK_N % 32)) & 1 != 0:
                    y_at = y_ptr + j0 * stride_y
                    y_squares = tl.load(y_squares_ptr + j0 + tl.arange(0, NEAR))
                    y_sums += y_squares
                    product, _ = tile_product(
                        (), x_copy_ptr, y_copy_ptr + j0 * features, step, PREC, 0, BLOCK_M, NEAR, BLOCK_K
                    )
                    near = near_of(product, x_squares, y_squares, x_left, y_end - j0, BLOCK_M, NEAR)
                    counts = tl.sum(near.to(tl.int32), 1)
                    number = tl.sum(counts, 0)
                    words = near_words(near, NEAR)
                    most = tl.max(counts, 0)
                    for p0 in tl.range(0, number, BLOCK_P, num_stages=1):
                        p = p0 + tl.arange(0, BLOCK_P)
                        live = p < number
                        row, column = pick(words, counts, most, p, BLOCK_M)
                        near_d = near_distances(
                            x_ptr, y_at, row, column, live, D, step_x, step_y, BLOCK_P, FEATURES
                        )
                        near_P = tl.zeros((BLOCK_P,), tl.float32)
                        if u_ptr is not None:
                            for n0 in range(0, V, BLOCK_V):
                                mask = live[:, None] & (n0 + n < V)[None, :]
                                v_at = v_ptr + j0 * stride_v + column[:, None] * step_v + (n0 + n)[None, :]
                                of_x = tl.load(
                                    u_ptr + row[:, None] * step_u + (n0 + n)[None, :], mask, other=0.0
                                )
                                of_y = tl.load(v_at, mask, other=0.0)
                                near_P += tl.sum(of_x.to(tl.float32) * of_y.to(tl.float32), 1)
                        column_at = y_row + j0 + tl.where(live, column, 0)
                        near_P = shifted_and_scaled(
                            near_P, x_shift_ptr, y_shift_ptr, y_scale_ptr, x_row + row, column_at
                        )
                        near_s = slope(near_P, near_d)[:, None]
                        sums = ()
                        for c in tl.static_range(PARTS):
                            at = k0 + c * BLOCK_K + k
                            mask = live[:, None] & (at < D)[None, :]
                            parts = differences(y_at, x_ptr, column, row, at, mask, step_y, step_x)
                            sums += (add_to_rows(totals[c], row, parts * near_s, PREC, BLOCK_M),)
                        totals = sums
        # Neither walk has taken the pairs of rows of NaN.
        squares = x_squares + tl.sum(y_sums, 0)
        lost = tl.where((squares != squares) & (y_end > 0), float("nan"), 0.0)
    for c in tl.static_range(PARTS):
        total = totals[c]
        if not FEW:
            total += lost[:, None]
        if x_scale_ptr is not None:
            total *= tl.load(x_scale_ptr + x_row + i)[:, None]
        total = tl.where(in_x[:, None], total, 0.0)
        at = k0 + c * BLOCK_K + k
        dx_at = dx_ptr + (b * M + i0) * D + i[:, None] * D + at[None, :]
        tl.store(dx_at, total.to(dx_ptr.dtype.element_ty), (i < M - i0)[:, None] & (at < D)[None, :])


class Upstream(NamedTuple):
    """What makes P of the rows of one side: (B, M, V), (B, M), (B, M), each None if it is not there."""

    product: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None


def stream_gradient(
    x: Side, y: Side, of_x: Upstream, of_y: Upstream, *, precision: str = "float32"
) -> Tensor:
    """dL/dx (B, M, D) in the dtype of x; see the equations above. The rows of both sides may be filled up."""
    (B, M, D), N, dtype = x.rows.shape, y.rows.shape[1], x.rows.dtype
    if B * M * N == 0:
        return x.rows.new_zeros(B, M, x.size)
    dx = x.rows.new_empty(B, M, D)
    arch = config.architecture(dx.device)
    vec_d, strides = layout(x.rows, y.rows, size=D)
    u, v, V, vec_v, v_strides = None, None, 0, 1, [0, 0, 0, 0]
    if of_x.product is not None and of_y.product is not None:
        V = of_y.product.shape[2]
        u, v = aligned(of_x.product), aligned(of_y.product)
        vec_v, v_strides = layout(u, v)
    tile = config.choose("pairwise_stream_bwd", arch, dtype, {"M": M, "N": N, "D": D, "V": V})
    options = fitting(tile, D)
    resident = options.pop("RESIDENT")
    groups, options["PARTS"] = shared_out(triton.cdiv(D, options["BLOCK_K"]), options["PARTS"])
    tiles = B * triton.cdiv(M, options["BLOCK_M"]) * groups
    with torch.cuda.device_of(dx):
        pairwise_stream_bwd[programs(tiles)](
            *x.pointers, *y.pointers, u, v,
            *map(in_whole_blocks, (of_x.shift, of_y.shift, of_x.scale, of_y.scale)), dx,
            M, N, D // vec_d, V, *strides, *v_strides,
            VEC_D=vec_d, VEC_V=vec_v, PREC=product_precision(dtype, precision, arch),
            FEW=D <= DIRECT, HELD=blocks_held(D, resident, options["BLOCK_K"]),
            HELD_V=triton.cdiv(V, options["BLOCK_V"]) if resident >= V else 0,
            **options,
        )  # fmt: skip
    return dx if x.size == D else dx[..., : x.size].contiguous()
