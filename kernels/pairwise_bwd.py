"""The gradient of pairwise attention, from what its forward (pairwise.py) saved.

With W = S² / d for far pairs, -S² / d for near ones and 0 where d = 0, and k = g |W| for g = dL/dS,

    dL/dx_i = (K y)_i - (sum_j k_ij) x_i                  (far pairs: one product a tile, k rounded once)
    dL/dx_i = sum_p [row_p = i] k_p (y_p - x_p)           (near pairs: differences first; the sum over p is
                                                           a product with a one-hot matrix, its order fixed)

for (x, y) = (q, a) and again for (a, q). A program owns its block of dL/dx and walks the tiles in order, once
for the far pairs and, if there are any, once for the near ones (one walk would need more registers than there
are): no atomics, the same bits in every run.

Shapes: x (B, M, D), y (B, N, D), W (B, Q, A up to a multiple of 8), g (B, Q, A), centre (B, D), lengths (B,).
"""

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
    near_words,
    pick,
)
from .launch import MAX_STRIDE, layout, packed, product_precision, programs, rows
from .numerics import as_multiplied

_STRIDES = ["stride_xb", "stride_x", "stride_yb", "stride_y"]


@triton.jit
def of_pairs(i, j, stride, TRANSPOSED: tl.constexpr):
    """Where the pairs (i, j) of x and y are in a matrix with rows of x, or of y if TRANSPOSED."""
    if TRANSPOSED:
        return j * stride + i
    else:
        return i * stride + j


@triton.jit(do_not_specialize=["M", "N", "D", *_STRIDES, "stride_wb", "stride_w", "stride_gb", "stride_g"])
def pairwise_bwd(
    x_ptr, y_ptr, x_lengths_ptr, y_lengths_ptr, w_ptr, g_ptr, centre_ptr, dx_ptr,
    M, N, D,
    stride_xb: tl.int64, stride_x: tl.int64, stride_yb: tl.int64, stride_y: tl.int64,
    stride_wb: tl.int64, stride_w: tl.int64, stride_gb: tl.int64, stride_g: tl.int64,
    VEC_D: tl.constexpr, VEC_G: tl.constexpr, PREC: tl.constexpr, FEW: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """BLOCK_K columns of dL/dx for BLOCK_M rows of x.

    TRANSPOSED: x = a, so W and g have rows of y. Strides: of x and y in units of VEC_D elements, of g in
    VEC_G, of W in 8.
    """
    D *= VEC_D
    stride_x *= VEC_D
    stride_y *= VEC_D
    stride_w *= 8
    stride_g *= VEC_G
    # The programs of one block of rows come one after the other: they read the same W and g.
    tiles_k = tl.cdiv(D, BLOCK_K)
    tiles = tl.cdiv(M, BLOCK_M) * tiles_k
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i0 = tile // tiles_k * BLOCK_M
    k = tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    x_left = length_of(x_lengths_ptr, b, M) - i0
    y_end = length_of(y_lengths_ptr, b, N)
    x_ptr += b * stride_xb * VEC_D + i0 * stride_x
    y_ptr += b * stride_yb * VEC_D
    w_ptr += b * stride_wb * 8 + of_pairs(i0, 0, stride_w, TRANSPOSED)
    g_ptr += b * stride_gb * VEC_G + of_pairs(i0, 0, stride_g, TRANSPOSED)
    step_x = stride_x.to(tl.int32)
    step_y = stride_y.to(tl.int32)
    step_w = stride_w.to(tl.int32)
    step_g = stride_g.to(tl.int32)
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    in_x = i < x_left
    in_k = k < D
    slopes = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    near_pairs = tl.zeros((BLOCK_M,), tl.int32)
    centre = tl.zeros((BLOCK_K,), tl.float32)
    if x_left <= 0:
        y_end = 0
    if centre_ptr is not None:
        centre = tl.load(centre_ptr + b * D + k, in_k & (y_end > 0), other=0.0)
    for j0 in range(0, y_end, BLOCK_N):
        in_y = j < y_end - j0
        valid = in_x[:, None] & in_y[None, :]
        w_at = w_ptr + of_pairs(0, j0, stride_w, TRANSPOSED)
        g_at = g_ptr + of_pairs(0, j0, stride_g, TRANSPOSED)
        w = tl.load(w_at + of_pairs(i[:, None], j[None, :], step_w, TRANSPOSED), valid, other=0.0)
        g = tl.load(g_at + of_pairs(i[:, None], j[None, :], step_g, TRANSPOSED), valid, other=0.0)
        w = w.to(tl.float32)
        s = tl.where(w < 0.0, 0.0, g.to(tl.float32) * w)
        y_at = y_ptr + j0 * stride_y
        if FEW:
            total = add_by_feature(total, s, x_ptr, y_at, in_x, in_y, k, D, step_x, step_y, BLOCK_M, BLOCK_N)
        else:
            y = tl.load(y_at + j[:, None] * step_y + k[None, :], in_y[:, None] & in_k[None, :], other=0.0)
            if y.dtype == tl.bfloat16:
                s = s.to(tl.bfloat16)
            else:  # slopes may be too large for float16
                y = y.to(tl.float32)
                if centre_ptr is not None:
                    y = tl.where(in_y[:, None], y - centre[None, :], 0.0)
                y = as_multiplied(y, PREC)
                s = as_multiplied(s, PREC)
            slopes += tl.sum(s.to(tl.float32), 1)
            total = tl.dot(s, y, total, input_precision=PREC)
            near_pairs += tl.sum((w < 0.0).to(tl.int32), 1)
    if not FEW:
        x = tl.load(x_ptr + i[:, None] * step_x + k[None, :], in_x[:, None] & in_k[None, :], other=0.0)
        total -= slopes[:, None] * (x.to(tl.float32) - centre[None, :])
        if tl.sum(near_pairs, 0) > 0:
            # These loops hold too much to be pipelined: there is rarely more than one turn.
            for j0 in tl.range(0, y_end, BLOCK_N, num_stages=1):
                valid = in_x[:, None] & (j < y_end - j0)[None, :]
                w_at = w_ptr + of_pairs(0, j0, stride_w, TRANSPOSED)
                g_at = g_ptr + of_pairs(0, j0, stride_g, TRANSPOSED)
                y_at = y_ptr + j0 * stride_y
                w = tl.load(w_at + of_pairs(i[:, None], j[None, :], step_w, TRANSPOSED), valid, other=0.0)
                near = w.to(tl.float32) < 0.0
                counts = tl.sum(near.to(tl.int32), 1)
                number = tl.sum(counts, 0)
                if number > 0:
                    words = near_words(near, BLOCK_N)
                    most = tl.max(counts, 0)
                    for p0 in tl.range(0, number, BLOCK_P, num_stages=1):
                        p = p0 + tl.arange(0, BLOCK_P)
                        live = p < number
                        row, column = pick(words, counts, most, p, BLOCK_M)
                        near_w = tl.load(w_at + of_pairs(row, column, step_w, TRANSPOSED), live, other=0.0)
                        near_g = tl.load(g_at + of_pairs(row, column, step_g, TRANSPOSED), live, other=0.0)
                        mask = live[:, None] & in_k[None, :]
                        step = differences(y_at, x_ptr, column, row, k, mask, step_y, step_x)
                        step *= (-near_w.to(tl.float32) * near_g.to(tl.float32))[:, None]
                        total = add_to_rows(total, row, step, PREC, BLOCK_M)
    dx_at = dx_ptr + (b * M + i0) * D + i[:, None] * D + k[None, :]
    tl.store(dx_at, total.to(dx_ptr.dtype.element_ty), (i < M - i0)[:, None] & in_k[None, :])


def attention_gradient(
    x: Tensor,
    y: Tensor,
    W: Tensor,
    centre: Tensor | None,
    g: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    *,
    of_a: bool,
    precision: str = "float32",
) -> Tensor:
    """dL/dx for g = dL/dS (B, Q, A) and what `attention_forward` saved; x is q, or a if `of_a`."""
    (B, M, D), N = x.shape, y.shape[1]
    if B * M * N == 0:
        return x.new_zeros(x.shape)
    dx = x.new_empty(x.shape)
    arch = config.architecture(x.device)
    tile = config.choose("pairwise_bwd", arch, x.dtype, {"Q": M, "A": N, "D": D})
    x, y = rows(x), rows(y)
    g = g if g.stride(2) == 1 and g.stride(1) < MAX_STRIDE else g.contiguous()
    vec_d, strides = layout(x, y, size=D)
    vec_g, g_strides = layout(g)
    grid = programs(B * triton.cdiv(M, tile.blocks["BLOCK_M"]) * triton.cdiv(D, tile.blocks["BLOCK_K"]))
    with torch.cuda.device_of(x):
        pairwise_bwd[grid](
            x, y, packed(x_lengths), packed(y_lengths), W, g, centre, dx,
            M, N, D // vec_d, *strides, *(stride // 8 for stride in W.stride()[:2]), *g_strides,
            VEC_D=vec_d, VEC_G=vec_g, PREC=product_precision(x.dtype, precision, arch),
            FEW=D <= DIRECT, TRANSPOSED=of_a,
            **tile.options,
        )  # fmt: skip
    return dx
