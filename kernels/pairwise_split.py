"""Splits float32 numbers into sums of bfloat16 numbers, for products on tensor cores.

    x = x_0 + x_1 + x_2,    x y = x_0 y_0 + (x_0 y_1 + x_1 y_0) + (x_0 y_2 + x_1 y_1 + x_2 y_0)

Three parts have all the 24 bits of a float32, and what their six products leave out is below its rounding.
Two parts and three products are right to 2^-16. Tensor cores multiply bfloat16 twice as fast as TF32, from
rows in any order, and no number is too large or too small for it, as it may be for float16.

Rows that many programs multiply are split once, into a copy of their parts beside each other.

Shapes: x (B, M, D), centre (B, D), lengths (B,), copy (B, M, PARTS D') where D' is D up to a multiple of
ALIGNED.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .distance import length_of
from .launch import launch, layout, programs

# Rows of a copy, and of W, start at multiples of so many elements.
ALIGNED = tl.constexpr(8)


@triton.jit
def in_parts(x, PARTS: tl.constexpr):
    """A float32 x in two or three parts, the first x to nearest. NaN is in all but the first."""
    upper = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    rest = x - upper
    parts = upper.to(tl.bfloat16), rest.to(tl.bfloat16)
    if PARTS == 3:
        parts += ((rest - parts[1].to(tl.float32)).to(tl.bfloat16),)
    return parts


@triton.jit
def add_product(total, k, y):
    """total + k y, of up to three parts each, the small products first."""
    for order in tl.static_range(len(y) - 1, -1, -1):
        for part in tl.static_range(order + 1):
            total = tl.dot(k[part], y[order - part], total)
    return total


@triton.jit(do_not_specialize=["M", "D", "stride_xb", "stride_x"])
def pairwise_split(
    x_ptr, lengths_ptr, centre_ptr, copy_ptr, M, D, stride_xb: tl.int64, stride_x: tl.int64,
    VEC_D: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of x less their centre, in PARTS beside each other. Strides in units of VEC_D."""
    tl.static_assert(BLOCK_M <= 128, "offsets inside a tile are of 32 bits")
    D *= VEC_D
    stride_x *= VEC_D
    features = tl.cdiv(D, ALIGNED) * ALIGNED
    tiles = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i0 = tl.program_id(0) % tiles * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    live = i < length_of(lengths_ptr, b, M) - i0
    x_ptr += b * stride_xb * VEC_D + i0 * stride_x
    copy_ptr += (b * M + i0) * PARTS * features
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + i[:, None] * stride_x + k[None, :], live[:, None] & (k < D)[None, :], other=0.0)
        centre = tl.load(centre_ptr + b * D + k, k < D, other=0.0)
        parts = in_parts(x.to(tl.float32) - centre[None, :], PARTS)
        copy_at = copy_ptr + i[:, None] * (PARTS * features) + k[None, :]
        mask = live[:, None] & (k < features)[None, :]
        for part in tl.static_range(PARTS):
            tl.store(copy_at + part * features, parts[part], mask)


def parts_for(dtype: torch.dtype, precision: str) -> int:
    """Into how many parts rows are split so that products are as right as results of that dtype can be."""
    return 3 if dtype == torch.float32 and precision == "float32" else 2


def split_rows(x: Tensor, lengths: Tensor | None, centre: Tensor, number: int) -> Tensor:
    """x (B, M, D) less its centre in so many parts, (B, M, number times D up to a multiple of ALIGNED)."""
    B, M, D = x.shape
    copy = x.new_empty(B, M, number * (D + -D % ALIGNED.value), dtype=torch.bfloat16)
    tile = config.choose("pairwise_split", config.architecture(x.device), x.dtype, {"M": M, "D": D})
    vec, strides = layout(x, size=D)
    with torch.cuda.device_of(x):
        launch(
            pairwise_split, programs(B * -(-M // tile.blocks["BLOCK_M"])),
            (x, lengths, centre, copy, M, D // vec, *strides), VEC_D=vec, PARTS=number, **tile.options,
        )  # fmt: skip
    return copy
