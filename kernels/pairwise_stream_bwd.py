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
)
from .launch import layout, product_precision, programs, rows
from .numerics import as_multiplied
from .pairwise_prepare import FEATURES, ROWS, Side, padded, tile_distances

_STRIDES = [f"stride_{of}" for of in ("xb", "x", "yb", "y", "ub", "u", "vb", "v")]


@triton.jit
def shifted_and_scaled(P, x_shift_ptr, y_shift_ptr, x_scale_ptr, y_scale_ptr, x_at, y_at, in_x, in_y):
    """P with what belongs to its rows (x_at, in_x) and its columns (y_at, in_y), where that is given."""
    if x_shift_ptr is not None:
        P += tl.load(x_shift_ptr + x_at, in_x, other=0.0)
    if y_shift_ptr is not None:
        P += tl.load(y_shift_ptr + y_at, in_y, other=0.0)
    if x_scale_ptr is not None:
        P *= tl.load(x_scale_ptr + x_at, in_x, other=0.0)
    if y_scale_ptr is not None:
        P *= tl.load(y_scale_ptr + y_at, in_y, other=0.0)
    return P


@triton.jit(do_not_specialize=["M", "N", "D", "V", *_STRIDES])
def pairwise_stream_bwd(
    x_ptr, x_lengths_ptr, x_copy_ptr, x_squares_ptr, y_ptr, y_lengths_ptr, y_copy_ptr, y_squares_ptr,
    u_ptr, v_ptr, x_shift_ptr, y_shift_ptr, x_scale_ptr, y_scale_ptr, dx_ptr,
    M, N, D, V,
    stride_xb: tl.int64, stride_x: tl.int64, stride_yb: tl.int64, stride_y: tl.int64,
    stride_ub: tl.int64, stride_u: tl.int64, stride_vb: tl.int64, stride_v: tl.int64,
    VEC_D: tl.constexpr, VEC_V: tl.constexpr, PREC: tl.constexpr, FEW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of dL/dx for BLOCK_M rows of x. Without u and v their product is 0."""
    D *= VEC_D
    stride_x *= VEC_D
    stride_y *= VEC_D
    V *= VEC_V
    stride_u *= VEC_V
    stride_v *= VEC_V
    # The programs of one block of rows come one after the other.
    tiles_d = tl.cdiv(D, BLOCK_D)
    tiles_m = tl.cdiv(M, BLOCK_M)
    k = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
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
    x_row = b * M + i0
    y_row = b * N
    in_x = i < x_left
    in_k = k < D
    slopes = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    near_pairs = tl.zeros((BLOCK_M,), tl.int32)
    if x_left <= 0:
        y_end = 0
    for j0 in range(0, y_end, BLOCK_N):
        in_y = j < y_end - j0
        y_at = y_ptr + j0 * stride_y
        y_copy_at = y_copy_ptr + j0 * features
        P = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if u_ptr is not None:
            for n0 in range(0, V, BLOCK_V):
                n = n0 + tl.arange(0, BLOCK_V)
                in_v = (n < V)[None, :]
                v_at = v_ptr + j0 * stride_v + j[:, None] * step_v + n[None, :]
                u = tl.load(u_ptr + i[:, None] * step_u + n[None, :], in_x[:, None] & in_v, other=0.0)
                v = tl.load(v_at, in_y[:, None] & in_v, other=0.0)
                if u.dtype == tl.float32:
                    u = as_multiplied(u, PREC)
                    v = as_multiplied(v, PREC)
                P = tl.dot(u, tl.trans(v), P, input_precision=PREC)
        P = shifted_and_scaled(
            P, x_shift_ptr, y_shift_ptr, x_scale_ptr, y_scale_ptr,
            x_row + i[:, None], y_row + j0 + j[None, :], in_x[:, None], in_y[None, :],
        )  # fmt: skip
        d, near, far = tile_distances(
            x_ptr, y_at, x_copy_ptr, y_copy_at, x_squares_ptr, y_squares_ptr + j0,
            x_left, y_end - j0, D, step, step_x, step_y, PREC, FEW, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        s = tl.where(far, slope(P, d), 0.0)
        if FEW:
            total = add_by_feature(total, s, x_ptr, y_at, in_x, in_y, k, D, step_x, step_y, BLOCK_M, BLOCK_N)
        else:
            near_pairs += tl.sum(near.to(tl.int32), 1)
            y = tl.load(y_copy_at + j[:, None] * step + k[None, :], (k < step)[None, :], other=0.0)
            if y.dtype == tl.bfloat16:
                s = s.to(tl.bfloat16)
            else:  # slopes may be too large for float16
                y = y.to(tl.float32)
                s = as_multiplied(s, PREC)
            slopes += tl.sum(s.to(tl.float32), 1)
            total = tl.dot(s, y, total, input_precision=PREC)
    if not FEW:
        x = tl.load(x_copy_ptr + i[:, None] * step + k[None, :], (k < step)[None, :], other=0.0)
        total -= slopes[:, None] * x.to(tl.float32)
        if tl.sum(near_pairs, 0) > 0:
            for j0 in tl.range(0, y_end, BLOCK_N, num_stages=1):
                y_at = y_ptr + j0 * stride_y
                d, near, far = tile_distances(
                    x_ptr, y_at, x_copy_ptr, y_copy_ptr + j0 * features, x_squares_ptr, y_squares_ptr + j0,
                    x_left, y_end - j0, D, step, step_x, step_y, PREC, FEW, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                counts = tl.sum(near.to(tl.int32), 1)
                number = tl.sum(counts, 0)
                if number > 0:
                    words = near_words(near, BLOCK_N)
                    most = tl.max(counts, 0)
                    for p0 in tl.range(0, number, BLOCK_P, num_stages=1):
                        p = p0 + tl.arange(0, BLOCK_P)
                        live = p < number
                        row, column = pick(words, counts, most, p, BLOCK_M)
                        near_d = near_distances(
                            x_ptr, y_at, row, column, live, D, step_x, step_y, BLOCK_P, 2 * BLOCK_K
                        )
                        near_P = tl.zeros((BLOCK_P,), tl.float32)
                        if u_ptr is not None:
                            for n0 in range(0, V, BLOCK_V):
                                n = n0 + tl.arange(0, BLOCK_V)
                                mask = live[:, None] & (n < V)[None, :]
                                v_at = v_ptr + j0 * stride_v + column[:, None] * step_v + n[None, :]
                                u = tl.load(u_ptr + row[:, None] * step_u + n[None, :], mask, other=0.0)
                                v = tl.load(v_at, mask, other=0.0)
                                near_P += tl.sum(u.to(tl.float32) * v.to(tl.float32), 1)
                        near_P = shifted_and_scaled(
                            near_P, x_shift_ptr, y_shift_ptr, x_scale_ptr, y_scale_ptr,
                            x_row + row, y_row + j0 + column, live, live,
                        )  # fmt: skip
                        mask = live[:, None] & in_k[None, :]
                        parts = differences(y_at, x_ptr, column, row, k, mask, step_y, step_x)
                        parts *= slope(near_P, near_d)[:, None]
                        total = add_to_rows(total, row, parts, PREC, BLOCK_M)
    dx_at = dx_ptr + (b * M + i0) * D + i[:, None] * D + k[None, :]
    tl.store(dx_at, total.to(dx_ptr.dtype.element_ty), (i < M - i0)[:, None] & in_k[None, :])


class Upstream(NamedTuple):
    """What makes P of the rows of one side: (B, M, V), (B, M), (B, M), each None if it is not there."""

    product: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None


def stream_gradient(
    x: Side, y: Side, of_x: Upstream, of_y: Upstream, *, precision: str = "float32"
) -> Tensor:
    """dL/dx (B, M, D) in the dtype of x; see the equations above."""
    (B, M, D), N, dtype = x.rows.shape, y.rows.shape[1], x.rows.dtype
    if B * M * N == 0:
        return x.rows.new_zeros(B, M, D)
    dx = x.rows.new_empty(B, M, D)
    arch = config.architecture(dx.device)
    vec_d, strides = layout(x.rows, y.rows, size=D)
    u, v, V, vec_v, v_strides = None, None, 0, 1, [0, 0, 0, 0]
    if of_x.product is not None and of_y.product is not None:
        u, v, V = rows(of_x.product), rows(of_y.product), of_y.product.shape[2]
        vec_v, v_strides = layout(u, v, size=V)
    tile = config.choose("pairwise_stream_bwd", arch, dtype, {"M": M, "N": N, "D": D, "V": V})
    tiles = B * triton.cdiv(M, tile.blocks["BLOCK_M"]) * triton.cdiv(D, tile.blocks["BLOCK_D"])
    with torch.cuda.device_of(dx):
        pairwise_stream_bwd[programs(tiles)](
            *x.pointers, *y.pointers, u, v, of_x.shift, of_y.shift, of_x.scale, of_y.scale, dx,
            M, N, D // vec_d, V // vec_v, *strides, *v_strides,
            VEC_D=vec_d, VEC_V=vec_v, PREC=product_precision(dtype, precision, arch),
            FEW=D <= DIRECT,
            **tile.options,
        )  # fmt: skip
    return dx
