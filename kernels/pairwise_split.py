"""Numbers of float32 as the sum of two of bfloat16, for products on tensor cores.

    x = upper + lower,    x y = upper_x upper_y + upper_x lower_y + lower_x upper_y

Both are right to 2^-18 of their size, and tensor cores multiply bfloat16 twice as fast as TF32, from rows in
any order. Rows that many programs multiply are split once, into a copy of both parts beside each other.

Shapes: x (B, M, D), centre (B, D), lengths (B,), copy (B, M, 2 D') where D' is D up to a multiple of ALIGNED.
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
def in_two(x):
    """A float32 x as the sum of two numbers of bfloat16, the first x to nearest. NaN is in the second."""
    upper = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return upper.to(tl.bfloat16), (x - upper).to(tl.bfloat16)


@triton.jit
def add_product(total, k, y):
    """total + k y, of one or two parts each."""
    if len(y) == 2:
        total = tl.dot(k[0], y[1], total)
        total = tl.dot(k[1], y[0], total)
    return tl.dot(k[0], y[0], total)


@triton.jit(do_not_specialize=["M", "D", "stride_xb", "stride_x"])
def pairwise_split(
    x_ptr, lengths_ptr, centre_ptr, copy_ptr, M, D, stride_xb: tl.int64, stride_x: tl.int64,
    VEC_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of x less their centre, in two parts beside each other. Strides in units of VEC_D."""
    D *= VEC_D
    stride_x *= VEC_D
    features = tl.cdiv(D, ALIGNED) * ALIGNED
    tiles = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i0 = tl.program_id(0) % tiles * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    live = i < length_of(lengths_ptr, b, M) - i0
    x_ptr += b * stride_xb * VEC_D + i0 * stride_x
    copy_ptr += (b * M + i0) * 2 * features
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + i[:, None] * stride_x + k[None, :], live[:, None] & (k < D)[None, :], other=0.0)
        centre = tl.load(centre_ptr + b * D + k, k < D, other=0.0)
        upper, lower = in_two(x.to(tl.float32) - centre[None, :])
        copy_at = copy_ptr + i[:, None] * (2 * features) + k[None, :]
        mask = live[:, None] & (k < features)[None, :]
        tl.store(copy_at, upper, mask)
        tl.store(copy_at + features, lower, mask)


def split_rows(x: Tensor, lengths: Tensor | None, centre: Tensor) -> Tensor:
    """x (B, M, D) less its centre in two parts, (B, M, 2 times D up to a multiple of ALIGNED)."""
    B, M, D = x.shape
    copy = x.new_empty(B, M, 2 * (D + -D % ALIGNED.value), dtype=torch.bfloat16)
    tile = config.choose("pairwise_split", config.architecture(x.device), x.dtype, {"M": M, "D": D})
    vec, strides = layout(x, size=D)
    with torch.cuda.device_of(x):
        launch(
            pairwise_split, programs(B * -(-M // tile.blocks["BLOCK_M"])),
            (x, lengths, centre, copy, M, D // vec, *strides), VEC_D=vec, **tile.options,
        )  # fmt: skip
    return copy
