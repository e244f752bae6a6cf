"""The two sides of a streamed pairwise attention, copied once so that every tile reads what it multiplies.

    copy[b, i] = x[b, i] - centre[b]        squares[b, i] = ||copy[b, i]||²

where the centre is that of y if its rows share an offset, and 0 if not (distance.py). The copy is rounded as
the tensor cores round, its squares are those of the rounded numbers, and it is padded with zeros to whole
blocks of ROWS rows and FEATURES features, so that tiles need no masks and load 16 bytes at a time. Squares
past the lengths are infinite: S is 0 there.

Shapes: x (B, M, D), y (B, N, D), copy (B, M', D'), squares (B, M').
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .distance import (
    DIRECT,
    TAU,
    add_to_rows,
    centre_of,
    has_offset,
    is_near,
    length_of,
    near_distances,
    near_words,
    pick,
    squares_by_feature,
)
from .launch import layout, packed, product_precision, programs, rows
from .numerics import as_multiplied

ROWS = tl.constexpr(128)
FEATURES = tl.constexpr(64)
# The least square, so that no far pair has a distance of 0; a float32 that is larger as bits is NaN or < 0.
TINY = tl.constexpr(1e-37)
INFINITY = tl.constexpr(0x7F800000)
# Near pairs are looked for in so many columns at a time: those of a row are the bits of an integer.
NEAR = tl.constexpr(32)


@triton.jit(do_not_specialize=["M", "N", "D", "stride_xb", "stride_x", "stride_yb", "stride_y"])
def pairwise_prepare(
    x_ptr, y_ptr, x_lengths_ptr, y_lengths_ptr, copy_ptr, squares_ptr,
    M, N, D,
    stride_xb: tl.int64, stride_x: tl.int64, stride_yb: tl.int64, stride_y: tl.int64,
    VEC_D: tl.constexpr, PREC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of the copy and their squares. Strides in units of VEC_D elements."""
    tl.static_assert(ROWS % BLOCK_M == 0 and FEATURES % BLOCK_K == 0, "the copy is made of whole blocks")
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
    features = padded(D, FEATURES)
    copy_ptr += (b * tiles * BLOCK_M + i0) * features
    squares_ptr += b * tiles * BLOCK_M + i0
    centred = has_offset(y_ptr, D, y_end, stride_y)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k0 in range(0, features, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = (i < x_left)[:, None] & (k < D)[None, :]
        x = tl.load(x_ptr + i[:, None] * stride_x + k[None, :], mask, other=0.0).to(tl.float32)
        if centred:
            x = tl.where(mask, x - centre_of(y_ptr, k, D, y_end, stride_y)[None, :], 0.0)
        x = x.to(copy_ptr.dtype.element_ty)
        if x.dtype == tl.float32:
            x = as_multiplied(x, PREC)
        tl.store(copy_ptr + i[:, None] * features + k[None, :], x)
        squares += x.to(tl.float32) * x.to(tl.float32)
    squares = tl.sum(squares, 1)
    squares = tl.where(squares < TINY, TINY, squares)
    tl.store(squares_ptr + i, tl.where(i < x_left, squares, float("inf")))


@triton.jit
def padded(size, BLOCK: tl.constexpr):
    """A size up to whole blocks."""
    return (tl.cdiv(size, BLOCK) * BLOCK).to(tl.int64)


@triton.jit
def tile_distances(
    x_ptr, y_ptr, x_copy_ptr, y_copy_ptr, x_squares_ptr, y_squares_ptr,
    x_left, y_left, D, features, step_x, step_y,
    PREC: tl.constexpr, FEW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d of the tile [BLOCK_M, BLOCK_N] at these pointers, and which of its pairs are near and which far."""
    tl.static_assert(ROWS % BLOCK_M == 0 and ROWS % BLOCK_N == 0, "the copies have whole blocks of rows")
    tl.static_assert(FEATURES % BLOCK_K == 0, "the copies have whole blocks of features")
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    valid = (i < x_left)[:, None] & (j < y_left)[None, :]
    if FEW:
        d2 = squares_by_feature(x_ptr, y_ptr, x_left, y_left, D, step_x, step_y, BLOCK_M, BLOCK_N)
        near = tl.zeros((BLOCK_M, BLOCK_N), tl.int1)
    else:
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, features, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(x_copy_ptr + i[:, None] * features + k[None, :])
            y = tl.load(y_copy_ptr + j[:, None] * features + k[None, :])
            product = tl.dot(x, tl.trans(y), product, input_precision=PREC)
        squares = tl.load(x_squares_ptr + i)[:, None] + tl.load(y_squares_ptr + j)[None, :]
        d2 = squares - 2.0 * product
        near = is_near(d2, squares, valid)
    return tl.sqrt(d2), near, valid & (near == 0)


@triton.jit
def held_copies(copy_ptr, HELD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_M rows of a copy in HELD blocks of BLOCK_K features, all that they have."""
    i = tl.arange(0, BLOCK_M)
    held = ()
    for c in tl.static_range(HELD):
        k = c * BLOCK_K + tl.arange(0, BLOCK_K)
        held += (tl.load(copy_ptr + i[:, None] * (HELD * BLOCK_K) + k[None, :]),)
    return held


@triton.jit
def tile_product(
    x, x_copy_ptr, y_copy_ptr, features,
    PREC: tl.constexpr, HELD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x·y of a tile [BLOCK_M, BLOCK_N]; of x from `held_copies` if HELD, and then the blocks of y too."""
    tl.static_assert(ROWS % BLOCK_M == 0 and ROWS % BLOCK_N == 0, "the copies have whole blocks of rows")
    tl.static_assert(FEATURES % BLOCK_K == 0, "the copies have whole blocks of features")
    j = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    held = ()
    if HELD > 0:
        for c in tl.static_range(HELD):
            y = tl.load(y_copy_ptr + j[:, None] * (HELD * BLOCK_K) + (c * BLOCK_K + k)[None, :])
            product = tl.dot(x[c], tl.trans(y), product, input_precision=PREC)
            held += (y,)
    else:
        i = tl.arange(0, BLOCK_M)
        for k0 in range(0, features, BLOCK_K):
            rows_x = tl.load(x_copy_ptr + i[:, None] * features + (k0 + k)[None, :])
            rows_y = tl.load(y_copy_ptr + j[:, None] * features + (k0 + k)[None, :])
            product = tl.dot(rows_x, tl.trans(rows_y), product, input_precision=PREC)
    return product, held


@triton.jit
def block_of(rows_ptr, n, V, left, step, VEC: tl.constexpr, PREC: tl.constexpr, BLOCK: tl.constexpr):
    """The columns n of the first BLOCK rows, as they are multiplied; 0 past `left` rows and V columns.

    Rows are filled up with zeros to a multiple of VEC columns.
    """
    i = tl.arange(0, BLOCK)
    inside = (i < left)[:, None] & (n < tl.cdiv(V, VEC) * VEC)[None, :]
    x = tl.load(rows_ptr + i[:, None] * step + n[None, :], inside, other=0.0)
    if x.dtype == tl.float32:
        x = as_multiplied(x, PREC)
    return x


@triton.jit
def far_squares(product, x_squares, y_squares):
    """d² of a tile, infinity for near pairs, and for each row a number above INFINITY if it has near pairs.

    As an unsigned integer, a float that is negative or NaN is larger than infinity. NaN, from norms that
    overflow or rows of NaN, count as near. Where a square is infinite and the product is not, so is d².
    """
    squares = x_squares[:, None] + y_squares[None, :]
    # d² - TAU * squares, in operations that no compiler may fuse otherwise: both walks must agree.
    past = tl.fma(product, -2.0, (1.0 - TAU) * squares).to(tl.uint32, bitcast=True)
    d2 = tl.fma(product, -2.0, squares)
    return tl.where(past > INFINITY, float("inf"), d2), tl.max(past, 1)


@triton.jit
def near_of(product, x_squares, y_squares, x_left, y_left, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which pairs of a tile `far_squares` has left out, but for those of rows of NaN and past the lengths.

    Exactly those, though its tile was wider and its x may have been held: each element of `product` adds up
    the same numbers in the same order, BLOCK_K features at a time and in a block as many as an instruction
    takes; tests/test_kernels_compile.py reads that from what is compiled. mma.sync is the same instruction
    for every width. wgmma is another for 64 columns than for 32, and no manual says that both round alike:
    tests/test_gpu.py compares their bits.
    """
    squares = x_squares[:, None] + y_squares[None, :]
    past = tl.fma(product, -2.0, (1.0 - TAU) * squares).to(tl.uint32, bitcast=True)
    valid = (tl.arange(0, BLOCK_M) < x_left)[:, None] & (tl.arange(0, BLOCK_N) < y_left)[None, :]
    return (past > INFINITY) & (squares == squares) & valid


@triton.jit
def far_scores(d2, dtype: tl.constexpr):
    """S of far pairs in float32, as exact as `dtype` holds it; 0 where d² is infinite.

    The square of an approximate 1 / sqrt(1 + d) takes fewer instructions than a division. It is wrong by a
    few roundings of float32; a step of Newton's method makes that one.
    """
    e = 1.0 + tl.sqrt(d2)
    root = tl.rsqrt(e)
    S = root * root
    if dtype == tl.float32:
        S = tl.where(S == 0.0, 0.0, tl.fma(S, tl.fma(S, -e, 1.0), S))
    return S


@triton.jit
def either(x, y):
    return x | y


@triton.jit
def near_scores(
    x_ptr, y_ptr, x_copy_ptr, y_copy_ptr, x_squares, y_squares, x_left, y_left, D, features, step_x, step_y,
    PREC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """S of the near pairs of a tile from their differences, and 0 for the others."""
    product, _ = tile_product((), x_copy_ptr, y_copy_ptr, features, PREC, 0, BLOCK_M, BLOCK_N, BLOCK_K)
    near = near_of(product, x_squares, y_squares, x_left, y_left, BLOCK_M, BLOCK_N)
    counts = tl.sum(near.to(tl.int32), 1)
    number = tl.sum(counts, 0)
    S = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    words = near_words(near, BLOCK_N)
    most = tl.max(counts, 0)
    for p0 in tl.range(0, number, BLOCK_P, num_stages=1):
        p = p0 + tl.arange(0, BLOCK_P)
        live = p < number
        row, column = pick(words, counts, most, p, BLOCK_M)
        d = near_distances(x_ptr, y_ptr, row, column, live, D, step_x, step_y, BLOCK_P, FEATURES)
        there = (tl.arange(0, BLOCK_N)[None, :] == column[:, None]) & live[:, None]
        S = add_to_rows(S, row, tl.where(there, (1.0 / (1.0 + d))[:, None], 0.0), PREC, BLOCK_M)
    return S


@triton.jit
def tile_scores(
    x_ptr, y_ptr, x_copy_ptr, y_copy_ptr, x_squares_ptr, y_squares_ptr,
    x_left, y_left, D, features, step_x, step_y,
    PREC: tl.constexpr, FEW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """S of the tile [BLOCK_M, BLOCK_N] at these pointers, near pairs from their differences."""
    d, near, far = tile_distances(
        x_ptr, y_ptr, x_copy_ptr, y_copy_ptr, x_squares_ptr, y_squares_ptr, x_left, y_left, D, features,
        step_x, step_y, PREC, FEW, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    S = tl.where(far, 1.0 / (1.0 + d), 0.0)
    if not FEW:
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
                    x_ptr, y_ptr, row, column, live, D, step_x, step_y, BLOCK_P, 2 * BLOCK_K
                )
                there = (tl.arange(0, BLOCK_N)[None, :] == column[:, None]) & live[:, None]
                near_S = tl.where(there, (1.0 / (1.0 + near_d))[:, None], 0.0)
                S = add_to_rows(S, row, near_S, PREC, BLOCK_M)
    return S


class Side(NamedTuple):
    """One side as the streaming kernels take it: the rows themselves, and their copy for products.

    Rows of more than DIRECT features are `aligned`, and of `size` features before that.
    """

    rows: Tensor
    lengths: Tensor | None
    copy: Tensor
    squares: Tensor
    size: int

    @property
    def pointers(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        return self.rows, self.lengths, self.copy, self.squares


def aligned(v: Tensor) -> Tensor:
    """v (B, N, V) in rows that start at multiples of 16 bytes, filled up with zeros to as many."""
    v, vec = rows(v), 16 // v.element_size()
    whole = v.shape[2] % vec == 0 and layout(v)[0] == vec
    return v if whole else torch.nn.functional.pad(v, (0, -v.shape[2] % vec))


def in_whole_blocks(numbers: Tensor | None) -> Tensor | None:
    """Numbers of rows (B, M) filled up with zeros to whole blocks of ROWS."""
    return None if numbers is None else torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % ROWS.value))


def fitting(tile: config.Config, D: int) -> dict[str, int]:
    """The options of a launch; differences of few features take more registers than their product would."""
    narrow = {"BLOCK_N": min(tile.blocks["BLOCK_N"], 32)} if D <= DIRECT else {}
    return {**tile.options, **narrow}


def blocks_held(D: int, resident: int, block: int) -> int:
    """How many blocks of features a program keeps of the rows of x: all of them or none."""
    features = triton.cdiv(D, FEATURES.value) * FEATURES.value
    return features // block if DIRECT < D <= resident else 0


def shared_out(blocks: int, most: int) -> tuple[int, int]:
    """Among how many programs blocks are shared out evenly, at most so many each, and how many each has."""
    programs = triton.cdiv(blocks, most)
    return programs, triton.cdiv(blocks, programs)


def prepare(
    q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None, precision: str
) -> tuple[Side, Side]:
    """Both sides of a call; one copy serves both where they are the same."""
    a_side = _side(a, a, a_lengths, a_lengths, precision)
    same = q is a and q_lengths is a_lengths
    return (a_side if same else _side(q, a, q_lengths, a_lengths, precision)), a_side


def _side(x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, precision: str) -> Side:
    (B, M, D), N = x.shape, y.shape[1]
    x, y, x_lengths, y_lengths = rows(x), rows(y), packed(x_lengths), packed(y_lengths)
    if D <= DIRECT or B * M * N == 0:
        return Side(x, x_lengths, x.new_empty(0), x.new_empty(0, dtype=torch.float32), D)  # never read
    x, y = aligned(x), aligned(y)
    length = triton.cdiv(M, ROWS) * ROWS
    copy = x.new_empty(B, length, triton.cdiv(D, FEATURES) * FEATURES)
    squares = x.new_empty(B, length, dtype=torch.float32)
    arch = config.architecture(x.device)
    tile = config.choose("pairwise_prepare", arch, x.dtype, {"M": M, "D": D})
    vec, strides = layout(x, y)
    with torch.cuda.device_of(x):
        pairwise_prepare[programs(B * length // tile.blocks["BLOCK_M"])](
            x, y, x_lengths, y_lengths, copy, squares,
            M, N, x.shape[2] // vec, *strides,
            VEC_D=vec, PREC=product_precision(x.dtype, precision, arch),
            **tile.options,
        )  # fmt: skip
    return Side(x, x_lengths, copy, squares, D)
