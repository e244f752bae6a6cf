"""Pairwise attention on tensor cores, exact at every distance. The backward is in pairwise_bwd.py.

    S[b, i, j] = 1 / (1 + d),    d² = ||q_i||² + ||a_j||² - 2 q_i·a_j         (far pairs: one product a tile)
                                 d² = sum_k (q_ik - a_jk)²                    (near pairs)

Near pairs, common offsets and the bound on the error: see distance.py. Up to DIRECT features all pairs are
computed from their differences.

A program owns a block of rows of q and walks a run of tiles of a, twice. The first walk is what most pairs
need: it loads tiles ahead, keeps the rows of q on the chip if they fit there, and stores 0 for a near pair,
which no distance gives. The second visits the tiles in which there is one, reads them back and stores near
pairs over the zeros.

For training the forward also stores the centre and W = S² / d, negated for near pairs and 0 where d = 0; the
backward multiplies dL/dS by |W|. W is in bfloat16 for rows of bfloat16 and else in float32.

Shapes: q (B, Q, D), a (B, A, D), S (B, Q, A), W (B, Q, A up to a multiple of 8), centre (B, D), lengths (B,).
Paper: Yin et al., "ABCNN", TACL 2016.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .distance import (
    DIRECT,
    centre_of,
    offset_and_size,
    score,
    slope_by_distance,
    squares_by_feature,
    without_near,
)
from .launch import MAX_STRIDE, launch, layout, packed, programs, rows, width
from .pairwise_parts import exponent_of, parts_of, power_of_two
from .pairwise_tiles import run_of, runs_of, second_walk, tiles_forward

# The exponents that a large feature is brought to where rows are split into one and into two parts, and the
# mean squares below which these lose too much of a row.
EXPONENT_HALF, EXPONENT_WHOLE = tl.constexpr(6), tl.constexpr(10)
LEAST_HALF, LEAST_WHOLE = tl.constexpr(2.0**-24), tl.constexpr(2.0**-4)
# Squares from which on a feature may be too large for float16.
MOST = tl.constexpr(65504.0**2)
# From so many rows on both sides they are prepared first: see pairwise_tiles.py.
PREPARED = 128


@triton.jit
def expand(
    x_ptr, y_ptr, rows_ptr, x_left, y_left, y_end, D, step_x, step_y, stride_y, inverse,
    PARTS: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """||x_i||² + ||y_j||² and d² of a tile, [BLOCK_M, BLOCK_N] each, of rows less their centre if CENTRED.

    PARTS: 0 for rows that are multiplied as they are. Else they are first multiplied by `inverse`, a power of
    two, and split into 1 or 2 parts in float16, see pairwise_parts.py; where that loses too much of a row, d²
    is NaN, and its squares are not.
    """
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    y_squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        in_x = (i < x_left)[:, None] & (k < D)[None, :]
        in_y = (j < y_left)[:, None] & (k < D)[None, :]
        x = tl.load(x_ptr + i[:, None] * step_x + k[None, :], in_x, other=0.0)
        y = tl.load(y_ptr + j[:, None] * step_y + k[None, :], in_y, other=0.0)
        if PARTS == 0:
            product = tl.dot(x, tl.trans(y), product)
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        else:
            x = x.to(tl.float32) * inverse
            y = y.to(tl.float32) * inverse
            if CENTRED:
                centre = centre_of(rows_ptr, k, D, y_end, stride_y) * inverse
                x -= centre[None, :]
                y -= centre[None, :]
            x_high = x.to(tl.float16)
            y_high = y.to(tl.float16)
            if PARTS == 1:
                product = tl.dot(x_high, tl.trans(y_high), product)
            else:  # the small products first: tensor cores cut what they add to a sum
                small = tl.dot((x - x_high.to(tl.float32)).to(tl.float16), tl.trans(y_high))
                small = tl.dot(x_high, tl.trans((y - y_high.to(tl.float32)).to(tl.float16)), small)
                product += tl.dot(x_high, tl.trans(y_high), small)
        x_squares += x * x
        y_squares += y * y
    of_x = tl.sum(x_squares, 1)
    of_y = tl.sum(y_squares, 1)
    squares = of_x[:, None] + of_y[None, :]
    if PARTS > 0:
        least = D * (LEAST_WHOLE if PARTS == 2 else LEAST_HALF)
        product += tl.where((of_x > 0.0) & (of_x < least) | (of_x > MOST), float("nan"), 0.0)[:, None]
        product += tl.where((of_y > 0.0) & (of_y < least) | (of_y > MOST), float("nan"), 0.0)[None, :]
    return squares, squares - 2.0 * product


@triton.jit
def far_pairs(
    x_ptr, y_ptr, s_ptr, w_ptr, M, N, D, x_left, y_end, first, end, step_x, stride_y, stride_w, size,
    PARTS: tl.constexpr, FEW: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLAG: tl.constexpr,
):  # fmt: skip
    """The first walk, to the column `end`. Returns a bit for each tile, of FLAG columns, with near pairs.

    The tile number t has the bit t % 64: the second walk may visit a tile in vain, but leaves none out.
    size: that of a large feature, from which the scale of parts is taken.
    """
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    step_y = stride_y.to(tl.int32)
    inverse, scale = 1.0, 1.0
    if PARTS > 0:
        # Other rows do not vanish, also where a row of the sample is not finite.
        exponent = tl.minimum(exponent_of(size), 40) - (EXPONENT_WHOLE if PARTS == 2 else EXPONENT_HALF)
        inverse, scale = power_of_two(-exponent), power_of_two(exponent)
    found = tl.full((), 0, tl.int64)
    for j0 in tl.range(first, end, BLOCK_N):
        y_left = y_end - j0
        y_at = y_ptr + j0 * stride_y
        if FEW:
            d = tl.sqrt(squares_by_feature(x_ptr, y_at, x_left, y_left, D, step_x, step_y, BLOCK_M, BLOCK_N))
        else:
            squares, d2 = expand(
                x_ptr, y_at, y_ptr, x_left, y_left, y_end, D, step_x, step_y, stride_y,
                inverse, PARTS, CENTRED, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            d2, some = without_near(d2, squares, x_left, y_left, BLOCK_M, BLOCK_N)
            found |= some.to(tl.int64) << (j0 // FLAG % 64)
            d = tl.sqrt(d2) * scale
        S = score(d, s_ptr.dtype.element_ty)
        if FEW:
            S = tl.where((i < x_left)[:, None] & (j < y_left)[None, :], S, 0.0)
        tl.store(s_ptr + j0 + i[:, None] * N + j[None, :], S, (i < M)[:, None] & (j < N - j0)[None, :])
        if w_ptr is not None:  # past the lengths it is never read
            w_at = w_ptr + j0 + i[:, None] * stride_w + j[None, :]
            W = slope_by_distance(d).to(w_ptr.dtype.element_ty)
            tl.store(w_at, W, (i < M)[:, None] & (j < stride_w - j0)[None, :])
    return found


@triton.jit(
    do_not_specialize=["M", "N", "D", "runs", "stride_xb", "stride_x", "stride_yb", "stride_y", "stride_w"]
)
def pairwise_fwd(
    x_ptr, y_ptr, x_lengths_ptr, y_lengths_ptr, s_ptr, w_ptr, centre_ptr,
    M, N, D, runs,
    stride_xb: tl.int64, stride_x: tl.int64, stride_yb: tl.int64, stride_y: tl.int64, stride_w,
    VEC_D: tl.constexpr, VEC_S: tl.constexpr, PARTS: tl.constexpr, FEW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A run of tiles of S, and of W and the centre where they are given, for x = q and y = a.

    FEW: D is at most DIRECT. PARTS: of rows without an offset, see `expand`; others have 1 at least.
    D and the strides of x and y are in units of VEC_D elements, N in VEC_S, the stride of W in 8.
    """
    tl.static_assert(BLOCK_M <= 128 and BLOCK_N <= 128, "offsets inside a tile are of 32 bits")
    D *= VEC_D
    N *= VEC_S
    stride_x *= VEC_D
    stride_y *= VEC_D
    stride_w *= 8
    b, i0, first, last, end, x_left, y_end = run_of(
        x_lengths_ptr, y_lengths_ptr, M, N, runs, BLOCK_M, BLOCK_N
    )
    x_ptr += b * stride_xb * VEC_D + i0 * stride_x
    y_ptr += b * stride_yb * VEC_D
    s_ptr += (b * M + i0) * N
    if w_ptr is not None:
        w_ptr += (b * M + i0) * stride_w
    step_x = stride_x.to(tl.int32)
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)

    if FEW:
        far_pairs(
            x_ptr, y_ptr, s_ptr, w_ptr, M - i0, N, D, x_left, y_end, first, end, step_x, stride_y, stride_w,
            0.0, 0, True, False, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_N,
        )  # fmt: skip
    else:
        centred, size = offset_and_size(y_ptr, D, y_end, stride_y)
        if centred:
            found = far_pairs(
                x_ptr, y_ptr, s_ptr, w_ptr, M - i0, N, D, x_left, y_end, first, end, step_x, stride_y,
                stride_w, size, 2 if PARTS == 2 else 1, False, True, BLOCK_M, BLOCK_N // 2, 16, BLOCK_N,
            )  # fmt: skip
        else:
            found = far_pairs(
                x_ptr, y_ptr, s_ptr, w_ptr, M - i0, N, D, x_left, y_end, first, end, step_x, stride_y,
                stride_w, size, PARTS, False, False, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_N,
            )  # fmt: skip
        # Every program of a sequence finds the same centre; the one that each of them has keeps it.
        if centre_ptr is not None and (first == 0) & (i0 == 0):
            for k0 in range(0, D, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                centre = tl.where(centred, centre_of(y_ptr, k, D, y_end, stride_y), 0.0)
                tl.store(centre_ptr + b * D + k, centre, k < D)
        second_walk(
            found, x_ptr, y_ptr, s_ptr, w_ptr, N, D, x_left, y_end, first, end, stride_x, stride_y, stride_w,
            BLOCK_M, BLOCK_N, BLOCK_P,
        )  # fmt: skip
    for j0 in tl.range(end, last, BLOCK_N):
        inside = (i < M - i0)[:, None] & (j < N - j0)[None, :]
        zero = tl.zeros((BLOCK_M, BLOCK_N), s_ptr.dtype.element_ty)
        tl.store(s_ptr + j0 + i[:, None] * N + j[None, :], zero, inside)


def takes_centre(q: Tensor) -> bool:
    """Whether the backward multiplies centred rows: not those of bfloat16, whose rounding is coarser."""
    return q.dtype != torch.bfloat16 and q.shape[2] > DIRECT


def kept_columns(columns: int) -> int:
    """Those of W, whose rows start at multiples of 16 bytes."""
    return -(-columns // 8) * 8


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of W: it is too large for float16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def attention_forward(
    q: Tensor,
    a: Tensor,
    q_lengths: Tensor | None,
    a_lengths: Tensor | None,
    precision: str = "float32",
    save: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """S, and with `save` what the backward needs of it: W and, if it `takes_centre`, the centre.

    q (B, Q, D), a (B, A, D): float32, float16 or bfloat16, any strides. precision "tf32" gives up exactness
    of far pairs in float32 for a third of the products.
    """
    (B, Q, D), A = q.shape, a.shape[1]
    if A >= MAX_STRIDE:
        raise ValueError(f"a must have fewer than 2**24 rows; got {A}: pairwise_attend takes more")
    S = q.new_empty(B, Q, A)
    W = q.new_empty(B, Q, kept_columns(A), dtype=kept_dtype(q.dtype)) if save else None
    if S.numel() == 0:
        return S, W, q.new_zeros(B, D, dtype=torch.float32) if save and takes_centre(q) else None
    number = 2 if q.dtype == torch.float32 and precision == "float32" else 1
    if D > DIRECT and min(Q, A) >= PREPARED:
        of_q, of_a, centre = parts_of(q, a, q_lengths, a_lengths, number=number)
        tiles_forward(of_q, of_a, S, W)
        return S, W, centre if save and takes_centre(q) else None
    centre = q.new_empty(B, D, dtype=torch.float32) if save and takes_centre(q) else None
    arch = config.architecture(q.device)
    tile = config.choose("pairwise_fwd", arch, q.dtype, {"Q": Q, "A": A, "D": D})
    options = tile.options
    x, y = rows(q), rows(a)
    vec_d, strides = layout(x, y, size=D)
    vec_s = width(S.element_size(), A)
    blocks = B * -(-Q // options["BLOCK_M"])
    runs = runs_of(blocks, A, q.device)
    with torch.cuda.device_of(q):
        launch(
            pairwise_fwd, programs(blocks * runs),
            (x, y, packed(q_lengths), packed(a_lengths), S, W, centre,
             Q, A // vec_s, D // vec_d, runs, *strides, 0 if W is None else W.stride(1) // 8),
            VEC_D=vec_d, VEC_S=vec_s, PARTS=number if q.dtype == torch.float32 else 0, FEW=D <= DIRECT,
            **options,
        )  # fmt: skip
    return S, W, centre
