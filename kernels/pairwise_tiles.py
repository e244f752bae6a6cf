"""Pairwise attention of long sequences: tiles of S from rows that are prepared once (pairwise_parts.py).

    S[b, i, j] = 1 / (1 + d),    d² = squares_i + squares_j - 2 scale_i scale_j p_ij      (far pairs)
    p_ij = high_i·high_j + high_i·low_j + low_i·high_j                    (in 16 bits only high_i·high_j)

A program owns a block of rows of q and walks a run of tiles of a, twice. The first walk is what most pairs
need: it loads tiles ahead, keeps the rows of q on the chip if they fit there, and stores 0 for a near pair,
which no distance gives, unless its rows are equal by their fingerprints: then 1. The second visits the tiles
in which there are near pairs left, reads them back and stores these over the zeros, from their differences
(distance.py).

W as in pairwise.py. Shapes: q (B, Q, D), a (B, A, D), S (B, Q, A), W (B, Q, A up to a multiple of 8).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .distance import TAU, length_of, near_distances, near_words, pick, share, slope_by_distance
from .launch import launch, layout, multiprocessors, programs, width
from .pairwise_parts import FEATURES, ROWS, Parts

# The rows of q are loaded once a run: it has at least SHORT columns, and LONG ones cost next to nothing.
SHORT, LONG = 256, 1024
# The second walk reads so many columns at a time: a row's near ones are the bits of an integer.
NEAR = tl.constexpr(32)
# Keeps 1 / d finite; rows that are closer score 1.
_TINY = tl.constexpr(1e-36)


@triton.jit
def product_of(x_high, x_low, y_ptr, product, step, features, k, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """product [BLOCK_M, BLOCK_N] plus that of the features k.

    Two parts are added up from 0, the small products first, and then to the others in full precision: tensor
    cores cut what they add to a sum.
    """
    j = tl.arange(0, BLOCK_N)
    at = y_ptr + j[:, None] * step + k[None, :]
    y_high = tl.trans(tl.load(at))
    if PARTS == 1:
        return tl.dot(x_high, y_high, product)
    else:
        small = tl.dot(x_low, y_high)
        small = tl.dot(x_high, tl.trans(tl.load(at + features)), small)
        return product + tl.dot(x_high, y_high, small)


@triton.jit
def kept_rows(
    x_ptr,
    step,
    features,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,
):
    """HELD blocks of BLOCK_K features of both parts of BLOCK_M rows."""
    i = tl.arange(0, BLOCK_M)
    high = ()
    low = ()
    for c in tl.static_range(HELD):
        at = x_ptr + i[:, None] * step + c * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        high += (tl.load(at),)
        if PARTS == 2:
            low += (tl.load(at + features),)
    return high, low


@triton.jit
def near_pairs(
    x_ptr, y_ptr, s_ptr, w_ptr, N, D, x_left, y_left, step_x, step_y, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_NEAR: tl.constexpr,
):  # fmt: skip
    """BLOCK_NEAR columns of the second walk."""
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_NEAR)
    valid = (i < x_left)[:, None] & (j < y_left)[None, :]
    near = tl.load(s_ptr + i[:, None] * N + j[None, :], valid, other=1.0).to(tl.float32) == 0.0
    counts = tl.sum(near.to(tl.int32), 1)
    number = tl.sum(counts, 0)
    if number > 0:
        words = near_words(near, BLOCK_NEAR)
        most = tl.max(counts, 0)
        tl.debug_barrier()  # all threads have read the tile
        for p0 in tl.range(0, number, BLOCK_P, num_stages=1):
            p = p0 + tl.arange(0, BLOCK_P)
            live = p < number
            row, column = pick(words, counts, most, p, BLOCK_M)
            d = near_distances(x_ptr, y_ptr, row, column, live, D, step_x, step_y, BLOCK_P, BLOCK_K)
            tl.store(s_ptr + row * N + column, (1.0 / (1.0 + d)).to(s_ptr.dtype.element_ty), live)
            if w_ptr is not None:
                W = -slope_by_distance(d)
                tl.store(w_ptr + row * stride_w + column, W.to(w_ptr.dtype.element_ty), live)


@triton.jit
def second_walk(
    found, x_ptr, y_ptr, s_ptr, w_ptr, N, D, x_left, y_end, first, end, stride_x, stride_y, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The near pairs of the tiles of BLOCK_N columns whose bit is set in `found`."""
    if found != 0:
        tl.debug_barrier()  # a thread reads here what others have stored
        BLOCK_NEAR: tl.constexpr = min(NEAR, BLOCK_N)
        for j0 in tl.range(first, end, BLOCK_NEAR, num_stages=1):
            if (found >> (j0 // BLOCK_N % 64)) & 1 != 0:
                near_pairs(
                    x_ptr, y_ptr + j0 * stride_y, s_ptr + j0, None if w_ptr is None else w_ptr + j0,
                    N, D, x_left, y_end - j0, stride_x.to(tl.int32), stride_y.to(tl.int32), stride_w,
                    BLOCK_M, 64, BLOCK_P, BLOCK_NEAR,
                )  # fmt: skip


@triton.jit
def run_of(x_lengths_ptr, y_lengths_ptr, M, N, runs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What a program does: batch, first row, first and last column of its run, the column after its last tile
    with real rows of y, and how many rows of x and y are real, those of x from its first row on."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    run = tl.program_id(0) % runs
    i0 = tl.program_id(0) // runs % tiles_m * BLOCK_M
    b = (tl.program_id(0) // runs // tiles_m).to(tl.int64)
    first = share(run, tiles_n, runs) * BLOCK_N
    last = share(run + 1, tiles_n, runs) * BLOCK_N
    x_left = length_of(x_lengths_ptr, b, M) - i0
    y_end = length_of(y_lengths_ptr, b, N)
    if x_left <= 0:
        y_end = 0
    end = tl.maximum(tl.minimum(last, tl.cdiv(y_end, BLOCK_N) * BLOCK_N), first)
    return b, i0, first, last, end, x_left, y_end


@triton.jit(
    do_not_specialize=["M", "N", "D", "runs", "stride_xb", "stride_x", "stride_yb", "stride_y", "stride_w"]
)
def pairwise_tiles_fwd(
    x_ptr, x_lengths_ptr, x_parts_ptr, x_squares_ptr, x_scale_ptr, x_prints_ptr,
    y_ptr, y_lengths_ptr, y_parts_ptr, y_squares_ptr, y_scale_ptr, y_prints_ptr, s_ptr, w_ptr,
    M, N, D, runs,
    stride_xb: tl.int64, stride_x: tl.int64, stride_yb: tl.int64, stride_y: tl.int64, stride_w,
    VEC_D: tl.constexpr, VEC_S: tl.constexpr, PARTS: tl.constexpr, HELD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A run of tiles of S, and of W where it is given, for x = q and y = a.

    HELD: the number of blocks of BLOCK_K features, if those of x are kept, or 0. D and the strides of x and y
    are in units of VEC_D elements, N in VEC_S, the stride of W in 8.
    """
    tl.static_assert(ROWS % BLOCK_M == 0 and ROWS % BLOCK_N == 0, "the parts have whole blocks of rows")
    tl.static_assert(FEATURES % BLOCK_K == 0, "the parts have whole blocks of features")
    D *= VEC_D
    N *= VEC_S
    stride_x *= VEC_D
    stride_y *= VEC_D
    stride_w *= 8
    b, i0, first, last, end, x_left, y_end = run_of(
        x_lengths_ptr, y_lengths_ptr, M, N, runs, BLOCK_M, BLOCK_N
    )
    features = tl.cdiv(D, FEATURES) * FEATURES
    step = PARTS * features
    tile_step = step.to(tl.int64)
    x_rows = tl.cdiv(M, ROWS) * ROWS
    y_rows = tl.cdiv(N, ROWS) * ROWS
    x_row = b * x_rows + i0
    y_row = b * y_rows
    x_prints_ptr += 2 * b * x_rows + i0
    y_prints_ptr += 2 * b * y_rows
    x_parts_ptr += x_row * tile_step
    y_parts_ptr += y_row * tile_step
    s_ptr += (b * M + i0) * N
    if w_ptr is not None:
        w_ptr += (b * M + i0) * stride_w
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    x_squares = tl.load(x_squares_ptr + x_row + i)
    BY_ROW: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    if BY_ROW:
        x_scale = -2.0 * tl.load(x_scale_ptr + x_row + i)
    else:
        x_scale = -2.0 * tl.load(x_scale_ptr + b) * tl.load(y_scale_ptr + b)
    if HELD > 0:
        x_high, x_low = kept_rows(x_parts_ptr, step, features, PARTS, BLOCK_M, BLOCK_K, HELD)
    found = tl.full((), 0, tl.int64)  # the bit t % 64 for near pairs in the tile number t
    for j0 in tl.range(first, end, BLOCK_N):
        y_at = y_parts_ptr + j0 * tile_step
        y_squares = tl.load(y_squares_ptr + y_row + j0 + j)
        if BY_ROW:
            y_scale = tl.load(y_scale_ptr + y_row + j0 + j)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HELD > 0:
            for c in tl.static_range(HELD):
                k = c * BLOCK_K + tl.arange(0, BLOCK_K)
                product = product_of(
                    x_high[c], x_low[c] if PARTS == 2 else 0, y_at, product, step, features, k, PARTS, BLOCK_N
                )
        else:
            for k0 in tl.range(0, features, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                x_at = x_parts_ptr + i[:, None] * step + k[None, :]
                x_low_k = tl.load(x_at + features) if PARTS == 2 else 0
                product = product_of(tl.load(x_at), x_low_k, y_at, product, step, features, k, PARTS, BLOCK_N)
        squares = x_squares[:, None] + y_squares[None, :]
        if BY_ROW:
            d2 = squares + x_scale[:, None] * (product * y_scale[None, :])
        else:
            d2 = squares + x_scale * product
        beyond = d2 - TAU * squares  # negative for near pairs, NaN only for rows of NaN
        if w_ptr is None:
            d = tl.sqrt(d2)
        else:
            by_distance = tl.rsqrt(tl.maximum(d2, _TINY))
            d = d2 * by_distance
        root = tl.rsqrt(1.0 + d)
        if BY_ROW:  # with what float32 needs beyond an approximate root
            S = root * root
            S = tl.where(beyond < 0.0, 0.0, S * (2.0 - (1.0 + d) * S))
        else:
            root = tl.where(beyond < 0.0, 0.0, root)
            S = root * root
        if tl.min(beyond.to(tl.int32, bitcast=True)) < 0:
            near = beyond < 0.0
            # Rows whose squares overflow may hold infinity, whose distance to itself is NaN.
            same = near & (x_squares >= 0.0)[:, None]
            same &= tl.load(x_prints_ptr + i)[:, None] == tl.load(y_prints_ptr + j0 + j)[None, :]
            x_print = tl.load(x_prints_ptr + x_rows + i)
            same &= x_print[:, None] == tl.load(y_prints_ptr + y_rows + j0 + j)[None, :]
            S = tl.where(same, 1.0, S)
            if w_ptr is not None:
                by_distance = tl.where(near, 0.0, by_distance)
            left = tl.max((near & (same == 0)).to(tl.int32))
            found |= left.to(tl.int64) << (j0 // BLOCK_N % 64)
        inside = (i < M - i0)[:, None]
        tl.store(
            s_ptr + j0 + i[:, None] * N + j[None, :],
            S.to(s_ptr.dtype.element_ty),
            inside & (j < N - j0)[None, :],
        )
        if w_ptr is not None:  # past the lengths it is never read
            W = tl.where(d2 == 0.0, 0.0, S * S * by_distance).to(w_ptr.dtype.element_ty)
            tl.store(
                w_ptr + j0 + i[:, None] * stride_w + j[None, :], W, inside & (j < stride_w - j0)[None, :]
            )

    x_ptr += b * stride_xb * VEC_D + i0 * stride_x
    y_ptr += b * stride_yb * VEC_D
    second_walk(
        found, x_ptr, y_ptr, s_ptr, w_ptr, N, D, x_left, y_end, first, end, stride_x, stride_y, stride_w,
        BLOCK_M, BLOCK_N, BLOCK_P,
    )  # fmt: skip
    # Past the lengths: over what the walks have stored there.
    if (x_left < tl.minimum(BLOCK_M, M - i0)) | (y_end < tl.minimum(last, N)):
        tl.debug_barrier()
        zero = tl.zeros((BLOCK_M, BLOCK_N), s_ptr.dtype.element_ty)
        for j0 in tl.range(first, tl.minimum(last, N), BLOCK_N, num_stages=1):
            past = (i >= x_left)[:, None] | (j >= y_end - j0)[None, :]
            inside = (i < M - i0)[:, None] & (j < N - j0)[None, :]
            tl.store(s_ptr + j0 + i[:, None] * N + j[None, :], zero, past & inside)


def runs_of(blocks: int, columns: int, device: torch.device) -> int:
    """Into how many runs each block of rows is split: so that all processors are busy, and to the end."""
    occupied = max(2 * multiprocessors(device) // blocks, 1)
    balanced = min(-(-8 * multiprocessors(device) // blocks), columns // LONG)
    return min(max(occupied, balanced), -(-columns // SHORT))


def tiles_forward(x: Parts, y: Parts, S: Tensor, W: Tensor | None) -> None:
    """Fill S (B, Q, A), and W if it is there."""
    (B, Q, D), A, dtype = x.rows.shape, y.rows.shape[1], x.rows.dtype
    tile = config.choose("pairwise_tiles_fwd", config.architecture(S.device), dtype, {"Q": Q, "A": A, "D": D})
    options = tile.options
    number, features = x.parts.shape[2:]
    resident = options.pop("RESIDENT")
    if W is not None:  # which takes registers of its own: fewer columns, so more of them on their way
        options |= {"BLOCK_N": options["BLOCK_N"] // 2, "BLOCK_K": 32, "num_stages": 3}
        options.pop("maxnreg", None)
    held = features // options["BLOCK_K"] if number * features <= resident else 0
    vec_d, strides = layout(x.rows, y.rows, size=D)
    vec_s = width(S.element_size(), A)
    blocks = B * -(-Q // options["BLOCK_M"])
    runs = runs_of(blocks, A, S.device)
    with torch.cuda.device_of(S):
        launch(
            pairwise_tiles_fwd, programs(blocks * runs),
            (*x, *y, S, W,
             Q, A // vec_s, D // vec_d, runs, *strides, 0 if W is None else W.stride(1) // 8),
            VEC_D=vec_d, VEC_S=vec_s, PARTS=number, HELD=held, **options,
        )  # fmt: skip
