"""The part of the gradient of pairwise attention that comes from near pairs.

    dL/dx_i += sum_p [row_p = i] k_p (y_p - x_p),    k_p = g_p |W_p|

for the pairs p with W < 0: differences first, and the sum over p is a product with a one-hot matrix, its
order fixed. The kernels for far pairs say in `found` where there are any: most programs end after a look at
it.

Shapes are those of pairwise_bwd.py; found (B, blocks of rows of x).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .distance import add_to_rows, differences, length_of, near_words, pick
from .launch import layout, product_precision, programs
from .pairwise_slopes import kept_strides, load_pairs, of_pairs
from .pairwise_split import ALIGNED

# Near pairs are looked for in so many columns at a time: those of a row are the bits of an integer.
NEAR = tl.constexpr(32)


@triton.jit(
    do_not_specialize=[
        "M", "N", "D", "stride_xb", "stride_x", "stride_yb", "stride_y", "stride_wb", "stride_w", "stride_gb",
        "stride_g",
    ]
)  # fmt: skip
def pairwise_bwd_near(
    x_ptr, y_ptr, x_lengths_ptr, y_lengths_ptr, w_ptr, g_ptr, found_ptr, dx_ptr,
    M, N, D,
    stride_xb: tl.int64, stride_x: tl.int64, stride_yb: tl.int64, stride_y: tl.int64,
    stride_wb: tl.int64, stride_w: tl.int64, stride_gb: tl.int64, stride_g: tl.int64,
    VEC_D: tl.constexpr, VEC_G: tl.constexpr, PREC: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Add to BLOCK_K columns of BLOCK_M rows of dL/dx. Arguments as in pairwise_bwd.

    Tiles of BLOCK_N columns are visited if their bit is set in `found`, that of tile number t being t % 32.
    """
    D *= VEC_D
    stride_x *= VEC_D
    stride_y *= VEC_D
    stride_w *= ALIGNED
    stride_g *= VEC_G
    tiles_k = tl.cdiv(D, BLOCK_K)
    found = tl.load(found_ptr + tl.program_id(0) // tiles_k)
    if found != 0:
        tiles_m = tl.cdiv(M, BLOCK_M)
        k0 = tl.program_id(0) % tiles_k * BLOCK_K
        i0 = tl.program_id(0) // tiles_k % tiles_m * BLOCK_M
        b = (tl.program_id(0) // tiles_k // tiles_m).to(tl.int64)
        x_left = length_of(x_lengths_ptr, b, M) - i0
        y_end = length_of(y_lengths_ptr, b, N)
        x_ptr += b * stride_xb * VEC_D + i0 * stride_x + k0
        y_ptr += b * stride_yb * VEC_D + k0
        w_ptr += b * stride_wb * ALIGNED + of_pairs(i0, 0, stride_w, TRANSPOSED)
        g_ptr += b * stride_gb * VEC_G + of_pairs(i0, 0, stride_g, TRANSPOSED)
        dx_ptr += (b * M + i0) * D + k0
        step_x = stride_x.to(tl.int32)
        step_y = stride_y.to(tl.int32)
        step_w = stride_w.to(tl.int32)
        step_g = stride_g.to(tl.int32)
        i = tl.arange(0, BLOCK_M)
        k = tl.arange(0, BLOCK_K)
        in_k = k < D - k0
        dx_at = dx_ptr + i[:, None] * D + k[None, :]
        mask = (i < x_left)[:, None] & in_k[None, :]
        dx = tl.load(dx_at, mask, other=0.0).to(tl.float32)
        # These loops hold too much to be pipelined: there is rarely more than one turn.
        for j0 in tl.range(0, y_end, NEAR, num_stages=1):
            if (found >> (j0 // BLOCK_N % 32)) & 1 != 0:
                y_at = y_ptr + j0 * stride_y
                w_at = w_ptr + of_pairs(0, j0, stride_w, TRANSPOSED)
                g_at = g_ptr + of_pairs(0, j0, stride_g, TRANSPOSED)
                near = load_pairs(w_at, x_left, y_end - j0, step_w, TRANSPOSED, BLOCK_M, NEAR) < 0.0
                counts = tl.sum(near.to(tl.int32), 1)
                number = tl.sum(counts, 0)
                words = near_words(near, NEAR)
                most = tl.max(counts, 0)
                for p0 in tl.range(0, number, BLOCK_P, num_stages=1):
                    p = p0 + tl.arange(0, BLOCK_P)
                    live = p < number
                    row, column = pick(words, counts, most, p, BLOCK_M)
                    w = tl.load(w_at + of_pairs(row, column, step_w, TRANSPOSED), live, other=0.0)
                    g = tl.load(g_at + of_pairs(row, column, step_g, TRANSPOSED), live, other=0.0)
                    step = differences(
                        y_at, x_ptr, column, row, k, live[:, None] & in_k[None, :], step_y, step_x
                    )
                    step *= (-w.to(tl.float32) * g.to(tl.float32))[:, None]
                    dx = add_to_rows(dx, row, step, PREC, BLOCK_M)
        tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask)


def add_near(
    x: Tensor, y: Tensor, W: Tensor, g: Tensor, found: Tensor, dx: Tensor,
    x_lengths: Tensor | None, y_lengths: Tensor | None,
    *, of_a: bool, precision: str, BLOCK_M: int, BLOCK_N: int,
) -> None:  # fmt: skip
    """To the dx of far pairs, x being q, or a if `of_a`. `found` is of such blocks and tiles."""
    (B, M, D), N = x.shape, y.shape[1]
    arch = config.architecture(x.device)
    tile = config.choose("pairwise_bwd_near", arch, x.dtype, {"Q": M, "A": N, "D": D})
    vec_d, strides = layout(x, y, size=D)
    vec_g, g_strides = layout(g)
    grid = programs(B * triton.cdiv(M, BLOCK_M) * triton.cdiv(D, tile.blocks["BLOCK_K"]))
    with torch.cuda.device_of(x):
        pairwise_bwd_near[grid](
            x, y, x_lengths, y_lengths, W, g, found, dx,
            M, N, D // vec_d, *strides, *kept_strides(W), *g_strides,
            VEC_D=vec_d, VEC_G=vec_g, PREC=product_precision(x.dtype, precision, arch), TRANSPOSED=of_a,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **tile.options,
        )  # fmt: skip
