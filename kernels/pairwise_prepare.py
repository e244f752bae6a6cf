"""The two sides of a streamed pairwise attention, copied once so that every tile reads what it multiplies.

    copy[b, i] = x[b, i] - centre[b]        squares[b, i] = ||copy[b, i]||²

where the centre is that of y if its rows share an offset, and 0 if not (distance.py). The copy is rounded as
the tensor cores round, its squares are those of the rounded numbers, and it is padded with zeros to whole
blocks of ROWS rows and FEATURES features, so that tiles need no masks and load 16 bytes at a time.

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
    tl.store(squares_ptr + i, tl.sum(squares, 1))


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
    """One side as the streaming kernels take it: the rows themselves, and their copy for products."""

    rows: Tensor
    lengths: Tensor | None
    copy: Tensor
    squares: Tensor

    @property
    def pointers(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        return self.rows, self.lengths, self.copy, self.squares


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
        return Side(x, x_lengths, x.new_empty(0), x.new_empty(0, dtype=torch.float32))  # never read
    length = triton.cdiv(M, ROWS) * ROWS
    copy = x.new_empty(B, length, triton.cdiv(D, FEATURES) * FEATURES)
    squares = x.new_empty(B, length, dtype=torch.float32)
    arch = config.architecture(x.device)
    tile = config.choose("pairwise_prepare", arch, x.dtype, {"M": M, "D": D})
    vec, strides = layout(x, y, size=D)
    with torch.cuda.device_of(x):
        pairwise_prepare[programs(B * length // tile.blocks["BLOCK_M"])](
            x, y, x_lengths, y_lengths, copy, squares,
            M, N, D // vec, *strides,
            VEC_D=vec, PREC=product_precision(x.dtype, precision, arch),
            **tile.options,
        )  # fmt: skip
    return Side(x, x_lengths, copy, squares)
