"""Splits rows into parts that tensor cores multiply, once for all tiles of pairwise_tiles.py.

    x_i - centre = scale_i (high_i + low_i + what is lost)        high, low in float16, scale_i a power of two
    squares_i = ||x_i - centre||²

where the centre is that of y if its rows share an offset, and 0 if not (distance.py). Two parts hold the 24
bits of a float32, and their products run at twice the rate of TF32; of 16-bit rows there is no low part. The
scale brings the largest feature of a float32 row to 2^7: what float16 cannot hold below is 2^-31 of it. For
16-bit rows, of which fewer bits matter, one scale serves a whole sequence: that of a sample of the rows of y.

A row whose squares would overflow, or which that scale does not suit, cannot be expanded: its parts are 0 and
its squares NEAR, with which every pair of it is near.

In text most near pairs are of equal rows. Two numbers of 32 bits for each row, the sums over its features of
their mixed bits and of the squares of these, are its fingerprint: near rows with the same one are equal, but
for about one pair in 2^64.

Parts are padded with zeros to whole blocks of ROWS rows and FEATURES features, so that tiles need no masks
and load 16 bytes at a time.

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
from .launch import launch, layout, packed, programs, rows

ROWS = tl.constexpr(128)
FEATURES = tl.constexpr(64)
# Squares of a row all of whose pairs are near, and from where on those of others might overflow in a tile.
NEAR = tl.constexpr(-1e38)
LARGE = tl.constexpr(1e36)
# The exponents that the largest feature of a float32 row, or of a sample of 16-bit rows, is brought to, and
# what the largest feature of another 16-bit row must be then.
EXPONENT, SAMPLED_EXPONENT, LEAST = tl.constexpr(7), tl.constexpr(2), tl.constexpr(2.0**-12)


@triton.jit
def exponent_of(x):
    """That of a positive float32, between -90 and 120: powers of two of it can be inverted and multiplied."""
    return tl.minimum(tl.maximum(((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127, -90), 120)


@triton.jit
def power_of_two(exponent):
    """2^exponent in float32, from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["N", "D", "stride_b", "stride"])
def pairwise_centre(
    y_ptr, y_lengths_ptr, centre_ptr, scale_ptr, N, D, stride_b: tl.int64, stride: tl.int64,
    VEC_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The centre of a sequence, 0 if its rows share no offset, and the scale of 16-bit rows.

    Strides in units of VEC_D elements.
    """
    b = tl.program_id(0).to(tl.int64)
    D *= VEC_D
    stride *= VEC_D
    y_ptr += b * stride_b * VEC_D
    end = length_of(y_lengths_ptr, b, N)
    centred, size = offset_and_size(y_ptr, D, end, stride)
    # Its square is finite, also where a row of the sample is not.
    exponent = tl.minimum(tl.maximum(exponent_of(size), -60), 60)
    tl.store(scale_ptr + b, power_of_two(exponent - SAMPLED_EXPONENT))
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        centre = tl.zeros((BLOCK_K,), tl.float32)
        if centred:
            centre = centre_of(y_ptr, k, D, end, stride)
        tl.store(centre_ptr + b * D + k, centre, k < D)


@triton.jit
def chunk_of(x_ptr, centre_ptr, i, k, x_left, D, stride):
    """The features k of the rows i as they are, 0 past the end, and in float32 less their centre."""
    raw = tl.load(
        x_ptr + i[:, None] * stride + k[None, :], (i < x_left)[:, None] & (k < D)[None, :], other=0.0
    )
    return raw, raw.to(tl.float32) - tl.load(centre_ptr + k, k < D, other=0.0)[None, :]


@triton.jit
def add_bits(first, second, raw, k):
    """The sums of the fingerprint with the features k added.

    Floats differ in their upper bits, which a product loses: a shift carries them to the lower ones.
    """
    bits = raw.to(tl.float32).to(tl.uint32, bitcast=True) ^ (k.to(tl.uint32) * 0x9E3779B1)[None, :]
    bits ^= bits >> 15
    bits *= 0x85EBCA6B
    bits ^= bits >> 13
    return first + bits, second + bits * bits


@triton.jit(do_not_specialize=["x_programs", "M", "N", "D", "stride_xb", "stride_x", "stride_yb", "stride_y"])
def pairwise_parts(
    x_ptr, x_lengths_ptr, x_parts_ptr, x_squares_ptr, x_scale_ptr, x_prints_ptr,
    y_ptr, y_lengths_ptr, y_parts_ptr, y_squares_ptr, y_scale_ptr, y_prints_ptr,
    centre_ptr, x_programs, M, N, D,
    stride_xb: tl.int64, stride_x: tl.int64, stride_yb: tl.int64, stride_y: tl.int64,
    VEC_D: tl.constexpr, PARTS: tl.constexpr, HELD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one side: the first `x_programs` are of x, the others of y.

    HELD: the number of blocks of BLOCK_K features, if a row is loaded only once, or 0. D and the strides are
    in units of VEC_D elements.
    """
    tl.static_assert(ROWS % BLOCK_M == 0 and FEATURES % BLOCK_K == 0, "the parts are made of whole blocks")
    BY_ROW: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    D *= VEC_D
    if program >= x_programs:
        program -= x_programs
        tiles = tl.cdiv(N, ROWS) * (ROWS // BLOCK_M)
        b = (program // tiles).to(tl.int64)
        end = length_of(y_lengths_ptr, b, N)
        x_ptr, x_parts_ptr, x_squares_ptr = y_ptr, y_parts_ptr, y_squares_ptr
        x_scale_ptr, x_prints_ptr = y_scale_ptr, y_prints_ptr
        stride_xb, stride_x = stride_yb, stride_y
    else:
        tiles = tl.cdiv(M, ROWS) * (ROWS // BLOCK_M)
        b = (program // tiles).to(tl.int64)
        end = length_of(x_lengths_ptr, b, M)
    stride = stride_x * VEC_D
    i0 = program % tiles * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    x_left = end - i0
    x_ptr += b * stride_xb * VEC_D + i0 * stride
    centre_ptr += b * D
    features = tl.cdiv(D, FEATURES) * FEATURES
    row = b * tiles * BLOCK_M + i0
    x_parts_ptr += row * PARTS * features
    largest = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    first = tl.zeros((BLOCK_M, BLOCK_K), tl.uint32)
    second = tl.zeros((BLOCK_M, BLOCK_K), tl.uint32)
    held = ()
    if HELD > 0:
        for c in tl.static_range(HELD):
            k = c * BLOCK_K + tl.arange(0, BLOCK_K)
            raw, x = chunk_of(x_ptr, centre_ptr, i, k, x_left, D, stride)
            largest = tl.maximum(largest, tl.abs(x))
            squares += x * x
            first, second = add_bits(first, second, raw, k)
            held += (x,)
    else:
        for k0 in range(0, D, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            raw, x = chunk_of(x_ptr, centre_ptr, i, k, x_left, D, stride)
            largest = tl.maximum(largest, tl.abs(x))
            squares += x * x
            first, second = add_bits(first, second, raw, k)

    there = i < x_left
    sums = tl.where(there, tl.sum(squares, 1), 0.0)
    of_row = tl.where(there, tl.max(largest, 1), 0.0)
    too_large = sums > LARGE
    if BY_ROW:
        scale = power_of_two(exponent_of(of_row) - EXPONENT)
    else:
        scale = tl.zeros((BLOCK_M,), tl.float32) + tl.load(x_scale_ptr + b)
        brought = of_row / scale
        too_large |= (brought > 65504.0) | ((brought < LEAST) & (of_row > 0.0))
    # NaN stays in the squares: its pairs are NaN by themselves.
    expandable = there & (too_large == 0) & (sums == sums)
    inverse = 1.0 / scale
    if HELD > 0:
        for c in tl.static_range(HELD):
            at = x_parts_ptr + i[:, None] * (PARTS * features) + c * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
            store_parts(at, held[c], expandable, inverse, features, PARTS)
    else:
        for k0 in range(0, features, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            _, x = chunk_of(x_ptr, centre_ptr, i, k, x_left, D, stride)
            at = x_parts_ptr + i[:, None] * (PARTS * features) + k[None, :]
            store_parts(at, x, expandable, inverse, features, PARTS)
    tl.store(x_squares_ptr + row + i, tl.where(too_large, NEAR, sums))
    if BY_ROW:
        tl.store(x_scale_ptr + row + i, scale)
    x_prints_ptr += 2 * b * tiles * BLOCK_M + i0
    tl.store(x_prints_ptr + i, tl.sum(first, 1).to(tl.int32, bitcast=True))
    tl.store(x_prints_ptr + tiles * BLOCK_M + i, tl.sum(second, 1).to(tl.int32, bitcast=True))


@triton.jit
def store_parts(at, x, expandable, inverse, features, PARTS: tl.constexpr):
    x = tl.where(expandable[:, None], x * inverse[:, None], 0.0)
    high = x.to(tl.float16)
    tl.store(at, high)
    if PARTS == 2:
        tl.store(at + features, (x - high.to(tl.float32)).to(tl.float16))


class Parts(NamedTuple):
    """One side as the kernels of pairwise_tiles.py take it: the rows themselves, and what is multiplied."""

    rows: Tensor
    lengths: Tensor | None
    parts: Tensor
    squares: Tensor
    scale: Tensor
    prints: Tensor


# Rows of so many features are kept in registers between the two times that they are needed.
_HELD = 512


def parts_of(
    q: Tensor,
    a: Tensor,
    q_lengths: Tensor | None,
    a_lengths: Tensor | None,
    *,
    number: int,
) -> tuple[Parts, Parts, Tensor]:
    """The rows of q (B, Q, D) and a (B, A, D) in one or two parts, and the centre (B, D) that they lack."""
    (B, Q, D), A = q.shape, a.shape[1]
    same = q is a and q_lengths is a_lengths
    x, y = rows(q), rows(a)
    centre = q.new_empty(B, D, dtype=torch.float32)
    # That of 16-bit rows is the same for both sides.
    scale = None if q.dtype == torch.float32 else q.new_empty(B, dtype=torch.float32)
    y_side = _empty(y, packed(a_lengths), scale, number)
    x_side = y_side if same else _empty(x, packed(q_lengths), scale, number)
    tile = config.choose("pairwise_parts", config.architecture(q.device), q.dtype, {"M": A, "D": D})
    options = tile.options
    features = y_side.parts.shape[3]
    held = features // options["BLOCK_K"] if features <= _HELD else 0
    each = [side.squares.numel() // options["BLOCK_M"] for side in (x_side, y_side)]
    x_programs = 0 if same else each[0]
    vec, strides = layout(x, y, size=D)
    with torch.cuda.device_of(q):
        launch(
            pairwise_centre, programs(B),
            (y, y_side.lengths, centre, y_side.scale, A, D // vec, *strides[2:]),
            VEC_D=vec, BLOCK_K=128, enable_fp_fusion=True,
        )  # fmt: skip
        launch(
            pairwise_parts, programs(x_programs + each[1]),
            (*x_side, *y_side, centre, x_programs, Q, A, D // vec, *strides),
            VEC_D=vec, PARTS=number, HELD=held, **options,
        )  # fmt: skip
    return x_side, y_side, centre


def _empty(x: Tensor, lengths: Tensor | None, scale: Tensor | None, number: int) -> Parts:
    B, M, D = x.shape
    length = -(-M // ROWS.value) * ROWS.value
    features = -(-D // FEATURES.value) * FEATURES.value
    parts = x.new_empty(B, length, number, features, dtype=torch.float16)
    squares = x.new_empty(B, length, dtype=torch.float32)
    prints = x.new_empty(B, 2, length, dtype=torch.int32)
    return Parts(x, lengths, parts, squares, torch.empty_like(squares) if scale is None else scale, prints)
