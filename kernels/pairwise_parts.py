"""Rows as tensor cores multiply them, prepared once for all tiles of pairwise_tiles.py.

    x_i - centre = scale_i (high_i + low_i + what is lost)        high, low in float16, scale_i a power of two
    squares_i = ||x_i - centre||²

where the centre is that of y if its rows share an offset, and 0 if not (distance.py). Two parts hold the 24 bits
of a float32, and their products run at twice the rate of TF32; of 16-bit rows there is no low part. The scale
brings the largest feature of a float32 row to 2^7: what float16 cannot hold below is 2^-31 of it. For 16-bit
rows, of which fewer bits matter, one scale serves a whole sequence: that of a sample of the rows of y.

A row whose squares would overflow, or which that scale does not suit, cannot be expanded: its parts are 0 and its
squares NEAR, with which every pair of it is near.

In text most near pairs are of equal rows. Two numbers of 32 bits for each row, sums over its features of mixed
bits times constants, are its fingerprint: near rows with the same one are equal, but for one pair in 2^64.

Parts are padded with zeros to whole blocks of ROWS rows and FEATURES features, so that tiles need no masks and
load 16 bytes at a time.

Shapes: x (B, M, D), y (B, N, D), parts (B, M', PARTS, D'), squares (B, M'), scale (B, M') of float32 and (B,)
of 16-bit rows, fingerprints (B, 2, M'), centre (B, D).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .distance import centre_of, length_of, offset_and_size
from .launch import layout, packed, programs, rows

ROWS = tl.constexpr(128)
FEATURES = tl.constexpr(64)
# Squares of a row all of whose pairs are near, and from where on those of others might overflow in a tile.
NEAR = tl.constexpr(-1e38)
LARGE = tl.constexpr(1e36)
# The exponents that the largest feature of a float32 row, or of a sample of 16-bit rows, is brought to, and what
# the largest feature of another 16-bit row must be then.
EXPONENT, SAMPLED_EXPONENT, LEAST = tl.constexpr(7), tl.constexpr(2), tl.constexpr(2.0**-12)


@triton.jit
def exponent_of(x):
    """That of a positive float32, between -90 and 120: powers of two of it can be inverted and multiplied."""
    return tl.minimum(tl.maximum(((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127, -90), 120)


@triton.jit
def power_of_two(exponent):
    """2^exponent in float32, from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def mixed(bits):
    """32 bits of which each depends on many: floats differ in their upper bits, which products lose."""
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit(do_not_specialize=["M", "N", "D", "stride_xb", "stride_x", "stride_yb", "stride_y"])
def pairwise_parts(
    x_ptr, y_ptr, x_lengths_ptr, y_lengths_ptr, parts_ptr, squares_ptr, scale_ptr, prints_ptr, centre_ptr,
    M, N, D,
    stride_xb: tl.int64, stride_x: tl.int64, stride_yb: tl.int64, stride_y: tl.int64,
    VEC_D: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of the parts, their squares and scales, and the centre if it is given.

    Strides in units of VEC_D elements.
    """
    BY_ROW: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    tl.static_assert(ROWS % BLOCK_M == 0 and FEATURES % BLOCK_K == 0, "the parts are made of whole blocks")
    D *= VEC_D
    stride_x *= VEC_D
    stride_y *= VEC_D
    tiles = tl.cdiv(M, ROWS) * (ROWS // BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i0 = tl.program_id(0) % tiles * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    x_left = length_of(x_lengths_ptr, b, M) - i0
    y_end = length_of(y_lengths_ptr, b, N)
    x_ptr += b * stride_xb * VEC_D + i0 * stride_x
    y_ptr += b * stride_yb * VEC_D
    features = tl.cdiv(D, FEATURES) * FEATURES
    row = b * tiles * BLOCK_M + i0
    parts_ptr += row * PARTS * features
    centred, size = offset_and_size(y_ptr, D, y_end, stride_y)
    largest = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    first = tl.zeros((BLOCK_M, BLOCK_K), tl.uint32)
    second = tl.zeros((BLOCK_M, BLOCK_K), tl.uint32)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = raw_rows(x_ptr, i, k, x_left, D, stride_x)
        bits = mixed(x.to(tl.float32).to(tl.uint32, bitcast=True))
        first += bits * mixed(2 * k.to(tl.uint32) + 1)[None, :]
        second += bits * mixed(0x5BD1E995 + 2 * k.to(tl.uint32))[None, :]
        x = centred_rows(x, y_ptr, i, k, x_left, y_end, D, stride_y, centred)
        largest = tl.maximum(largest, tl.abs(x))
        squares += x * x
    sums = tl.sum(squares, 1)
    of_row = tl.max(largest, 1)
    too_large = sums > LARGE
    if BY_ROW:
        exponent = exponent_of(of_row) - EXPONENT
    else:
        exponent = tl.full((BLOCK_M,), 0, tl.int32) + (exponent_of(size) - SAMPLED_EXPONENT)
        brought = of_row * power_of_two(-exponent)
        too_large |= (brought > 65504.0) | ((brought < LEAST) & (of_row > 0.0))
    # NaN stays in the squares: its pairs are NaN by themselves.
    expandable = (too_large == 0) & (sums == sums)
    sums = tl.where(too_large, NEAR, sums)
    inverse = power_of_two(-exponent)
    for k0 in range(0, features, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = raw_rows(x_ptr, i, k, x_left, D, stride_x)
        x = centred_rows(x, y_ptr, i, k, x_left, y_end, D, stride_y, centred)
        x = tl.where(expandable[:, None], x * inverse[:, None], 0.0)
        high = x.to(tl.float16)
        at = parts_ptr + i[:, None] * (PARTS * features) + k[None, :]
        tl.store(at, high)
        if PARTS == 2:
            tl.store(at + features, (x - high.to(tl.float32)).to(tl.float16))
    tl.store(squares_ptr + row + i, sums)
    prints_ptr += 2 * b * tiles * BLOCK_M + i0
    tl.store(prints_ptr + i, tl.sum(first, 1).to(tl.int32, bitcast=True))
    tl.store(prints_ptr + tiles * BLOCK_M + i, tl.sum(second, 1).to(tl.int32, bitcast=True))
    if BY_ROW:
        tl.store(scale_ptr + row + i, power_of_two(exponent))
    else:
        tl.store(scale_ptr + b + i, power_of_two(exponent), (i == 0) & (i0 == 0))
    if centre_ptr is not None and i0 == 0:
        for k0 in range(0, D, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            centre = tl.where(centred, centre_of(y_ptr, k, D, y_end, stride_y), 0.0)
            tl.store(centre_ptr + b * D + k, centre, k < D)


@triton.jit
def raw_rows(x_ptr, i, k, x_left, D, stride_x):
    """The features k of the rows i of x, 0 past the end."""
    mask = (i < x_left)[:, None] & (k < D)[None, :]
    return tl.load(x_ptr + i[:, None] * stride_x + k[None, :], mask, other=0.0)


@triton.jit
def centred_rows(x, y_ptr, i, k, x_left, y_end, D, stride_y, centred):
    """What `raw_rows` returns, less the centre if there is one: in float32."""
    x = x.to(tl.float32)
    if centred:
        mask = (i < x_left)[:, None] & (k < D)[None, :]
        x = tl.where(mask, x - centre_of(y_ptr, k, D, y_end, stride_y)[None, :], 0.0)
    return x


class Parts(NamedTuple):
    """One side as the kernels of pairwise_tiles.py take it: the rows themselves, and what is multiplied."""

    rows: Tensor
    lengths: Tensor | None
    parts: Tensor
    squares: Tensor
    scale: Tensor
    prints: Tensor


def parts_of(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    centre: Tensor | None,
    *,
    number: int,
) -> Parts:
    """The rows of x (B, M, D) in one or two parts, less the centre of y, which is written to `centre`."""
    (B, M, D), N = x.shape, y.shape[1]
    x, y, x_lengths, y_lengths = rows(x), rows(y), packed(x_lengths), packed(y_lengths)
    length = triton.cdiv(M, ROWS.value) * ROWS.value
    features = triton.cdiv(D, FEATURES.value) * FEATURES.value
    parts = x.new_empty(B, length, number, features, dtype=torch.float16)
    squares = x.new_empty(B, length, dtype=torch.float32)
    scale = torch.empty_like(squares) if x.dtype == torch.float32 else squares.new_empty(B)
    prints = x.new_empty(B, 2, length, dtype=torch.int32)
    tile = config.choose("pairwise_parts", config.architecture(x.device), x.dtype, {"M": M, "D": D})
    vec, strides = layout(x, y, size=D)
    with torch.cuda.device_of(x):
        pairwise_parts[programs(B * length // tile.blocks["BLOCK_M"])](
            x, y, x_lengths, y_lengths, parts, squares, scale, prints, centre,
            M, N, D // vec, *strides, VEC_D=vec, PARTS=number, **tile.options,
        )  # fmt: skip
    return Parts(x, x_lengths, parts, squares, scale, prints)
