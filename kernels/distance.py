"""What the pairwise kernels share: distances of a tile from one product, and its near pairs one by one.

    d² = ||x_i||² + ||y_j||² - 2 x_i·y_j          (far pairs)
    d² = sum_k (x_ik - y_jk)²                     (near pairs)

The first form carries an error of c ε (||x_i||² + ||y_j||²), so every pair with
d² < TAU (||x_i||² + ||y_j||²) is **near** and computed from the difference itself. The error left in
S = 1 / (1 + d) is c ε / (8 TAU).

Near pairs are few, but in text every tile has some, so their cost must follow their number. Each row of a
tile [BLOCK_M, BLOCK_N] packs its near columns into the bits of one integer, a running count over the rows
numbers the pairs row by row, and `pick` finds row and column of any of these numbers. There is no list in
memory, no atomic and no capacity to overflow, and the order is fixed: what is summed over the pairs is the
same in every run.

An offset common to all rows changes no distance but would make every pair near. Where the mean of SAMPLES
rows is large beside their spread, it is subtracted from both sides.
"""

import triton
import triton.language as tl

from .numerics import as_multiplied

# With c <= 13, as on an H200 up to 4096 features (11 on the CPU), the error left in float32 is 8e-7.
TAU = tl.constexpr(1 / 8)
# Up to so many features every pair is computed from the difference.
DIRECT = 8
SAMPLES = tl.constexpr(8)
# The mean of SAMPLES unrelated rows has 1 / SAMPLES of their mean square; more than this share is an offset.
OFFSET = tl.constexpr(0.75)


@triton.jit
def length_of(lengths_ptr, b, size):
    """How many of a sequence's rows are real, whatever the lengths hold."""
    if lengths_ptr is None:
        return size
    else:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), size).to(tl.int32)


@triton.jit
def share(part, tiles, parts):
    """The first of `tiles` in one of so many parts: part * tiles // parts may take more than 32 bits."""
    return part * (tiles // parts) + tl.minimum(part, tiles % parts)


@triton.jit
def sample(rows_ptr, k, D, end, stride):
    """SAMPLES of the first `end` rows, evenly spread: [SAMPLES, len(k)]."""
    row = tl.arange(0, SAMPLES).to(tl.int64) * end // SAMPLES
    return tl.load(rows_ptr + row[:, None] * stride + k[None, :], (k < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def centre_of(rows_ptr, k, D, end, stride):
    """The features k of the centre of rows that have an offset: [len(k)]."""
    return tl.sum(sample(rows_ptr, k, D, end, stride), 0) / SAMPLES


@triton.jit
def has_offset(rows_ptr, D, end, stride):
    """Whether the rows share a large offset; fewer than SAMPLES would always seem to."""
    centred, _ = offset_and_size(rows_ptr, D, end, stride)
    return centred


@triton.jit
def offset_and_size(rows_ptr, D, end, stride):
    """Whether the rows share a large offset, and the largest feature of a sample of them without it."""
    BLOCK: tl.constexpr = 128
    of_centre = tl.zeros((BLOCK,), tl.float32)
    of_rows = tl.zeros((SAMPLES, BLOCK), tl.float32)
    largest = tl.zeros((SAMPLES, BLOCK), tl.float32)
    largest_centred = tl.zeros((SAMPLES, BLOCK), tl.float32)
    for k0 in range(0, D, BLOCK):
        x = sample(rows_ptr, k0 + tl.arange(0, BLOCK), D, end, stride)
        centre = tl.sum(x, 0) / SAMPLES
        of_centre += centre * centre
        of_rows += x * x
        largest = tl.maximum(largest, tl.abs(x))
        largest_centred = tl.maximum(largest_centred, tl.abs(x - centre[None, :]))
    centred = (tl.sum(of_centre, 0) > OFFSET / SAMPLES * tl.sum(tl.sum(of_rows, 1), 0)) & (end >= SAMPLES)
    return centred, tl.max(tl.max(tl.where(centred, largest_centred, largest), 1), 0)


@triton.jit
def squares_by_feature(
    x_ptr, y_ptr, x_left, y_left, D, step_x, step_y, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """d² of a tile [BLOCK_M, BLOCK_N] from the differences, one feature after the other."""
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    d2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D):
        x = tl.load(x_ptr + i * step_x + k, i < x_left, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + j * step_y + k, j < y_left, other=0.0).to(tl.float32)
        step = x[:, None] - y[None, :]
        d2 += step * step
    return d2


@triton.jit
def is_near(d2, squares, valid):
    """Which pairs to take from the difference: also NaN, from norms that overflow, but not rows of NaN."""
    return ((d2 >= TAU * squares).to(tl.int32) == 0) & (squares == squares) & valid


@triton.jit
def without_near(d2, squares, x_left, y_left, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """d² of a tile with infinity for near pairs and past the lengths, and whether there are near pairs.

    To look costs a subtraction and a maximum: as an unsigned integer, a float that is negative or NaN is
    larger than infinity. So are some pairs that are not near, as those with rows of NaN: they stay.
    """
    largest = tl.max((d2 - TAU * squares).to(tl.uint32, bitcast=True))
    some = largest > 0x7F800000
    if some | (x_left < BLOCK_M) | (y_left < BLOCK_N):
        valid = (tl.arange(0, BLOCK_M) < x_left)[:, None] & (tl.arange(0, BLOCK_N) < y_left)[None, :]
        near = ((d2 >= TAU * squares).to(tl.int32) == 0) & (squares >= 0.0)
        d2 = tl.where(near | (valid == 0), float("inf"), d2)
    return d2, some


@triton.jit
def score(d, dtype: tl.constexpr):
    """S of a far pair's distance, in `dtype`.

    The square of an approximate 1 / sqrt(1 + d) is wrong by a few roundings of float32, which are lost in
    those of 16 bits, and takes fewer instructions than a division.
    """
    if dtype == tl.float32:
        return 1.0 / (1.0 + d)
    else:
        root = tl.rsqrt(1.0 + d)
        return (root * root).to(dtype)


@triton.jit
def slope_by_distance(d):
    """W = S² / d, so that dL/dx_i = sum_j g_ij W_ij (y_j - x_i) for g = dL/dS; 0 where d = 0 (subgradient).

    As in `score`, from an approximate root: a few roundings of float32.
    """
    root = tl.rsqrt(d * (1.0 + d) * (1.0 + d))
    return tl.where(d == 0.0, 0.0, root * root)


@triton.jit
def differences(x_ptr, y_ptr, row, column, k, mask, step_x, step_y):
    """The features k of x_row - y_column, [P, len(k)], 0 where masked."""
    x = tl.load(x_ptr + row[:, None] * step_x + k[None, :], mask, other=0.0).to(tl.float32)
    return x - tl.load(y_ptr + column[:, None] * step_y + k[None, :], mask, other=0.0).to(tl.float32)


@triton.jit
def near_distances(
    x_ptr, y_ptr, row, column, live, D, step_x, step_y, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr
):
    """||x_row - y_column|| of BLOCK_P pairs from their differences, 0 where they are not live."""
    squares = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        step = differences(x_ptr, y_ptr, row, column, k, live[:, None] & (k < D)[None, :], step_x, step_y)
        squares += step * step
    return tl.sqrt(tl.sum(squares, 1))


@triton.jit
def near_words(near, BLOCK_N: tl.constexpr):
    """The marked columns of each row as the bits of one integer: near [BLOCK_M, BLOCK_N] -> [BLOCK_M]."""
    tl.static_assert(BLOCK_N <= 64, "the columns of a row must fit the bits of an integer")
    if BLOCK_N > 32:
        bit = tl.full((BLOCK_N,), 1, tl.int64) << tl.arange(0, BLOCK_N).to(tl.int64)
    else:
        bit = tl.full((BLOCK_N,), 1, tl.int32) << tl.arange(0, BLOCK_N)
    return tl.sum(tl.where(near, bit[None, :], 0), 1)


@triton.jit
def pick(words, counts, most, p, BLOCK_M: tl.constexpr):
    """Row and column in the tile of the pairs number p [P], counted row by row.

    words, counts [BLOCK_M]: marked columns of each row, as bits and how many; most: the largest count.
    Past the last pair the row is BLOCK_M - 1 and the column means nothing.
    """
    end = tl.cumsum(counts, 0)
    row = tl.minimum(tl.sum((end[None, :] <= p[:, None]).to(tl.int32), 1), BLOCK_M - 1)
    turn = p - tl.gather(end - counts, row, 0)  # number of the pair inside its row
    word = tl.gather(words, row, 0)
    for t in range(0, most - 1):  # drop as many of the lowest set bits
        word = tl.where(t < turn, word & (word - 1), word)
    lowest = (word & -word).to(tl.float32)  # a power of two, whose exponent is the column
    return row, ((lowest.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def slope(g, d):
    """k = g S² / d for g = dL/dS, so that dL/dx_i = sum_j k_ij (y_j - x_i); 0 where d = 0 (subgradient)."""
    return tl.where(d == 0.0, 0.0, g / (d * (1.0 + d) * (1.0 + d)))


@triton.jit
def add_by_feature(
    total, s, x_ptr, y_ptr, in_x, in_y, k, D, step_x, step_y, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """total [BLOCK_M, len(k)] plus sum_j s_ij (y_j - x_i) for the slopes s of a tile, feature by feature."""
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    for f in range(0, D):
        x = tl.load(x_ptr + i * step_x + f, in_x, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + j * step_y + f, in_y, other=0.0).to(tl.float32)
        steps = tl.sum(s * (y[None, :] - x[:, None]), 1)
        total += tl.where((k == f)[None, :], steps[:, None], 0.0)
    return total


@triton.jit
def add_to_rows(total, row, values, PREC: tl.constexpr, BLOCK_M: tl.constexpr):
    """total [BLOCK_M, K] with values [P, K] added to its rows row [P], always in the same order.

    A product with a one-hot matrix: that is exact in any precision, so values in two parts need two passes.
    A value that is not finite makes its row NaN, and no other: 0 times it would be NaN as well.
    """
    in_row = tl.arange(0, BLOCK_M)[:, None] == row[None, :]  # [BLOCK_M, P]
    finite = tl.abs(values) < float("inf")
    lost = tl.sum(tl.where(finite, 0, 1), 1)  # [P]
    values = tl.where(finite, values, 0.0)
    one_hot = in_row.to(tl.float32)
    if PREC == "ieee":
        total = tl.dot(one_hot, values, total, input_precision="ieee")
    else:
        upper = as_multiplied(values, "tf32")
        total = tl.dot(one_hot, values - upper, total, input_precision="tf32")
        total = tl.dot(one_hot, upper, total, input_precision="tf32")
    lost_rows = tl.sum(tl.where(in_row, lost[None, :], 0), 1)
    return tl.where(lost_rows[:, None] > 0, float("nan"), total)
