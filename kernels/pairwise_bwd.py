"""The gradient of pairwise attention, from what its forward (pairwise.py) saved.

With W = S² / d for far pairs, -S² / d for near ones and 0 where d = 0, and k = g |W| for g = dL/dS,

    dL/dx_i = sum_j k_ij (y_j - x_i) = (K y)_i - (sum_j k_ij) x_i

for (x, y) = (q, a) and again for (a, q). For far pairs K y is a product a tile, by the kernel here, or by
that of pairwise_bwd_short.py where all pairs of two sequences fit one tile. Near pairs are added from their
differences, by pairwise_bwd_near.py. A program owns its block of dL/dx and walks the tiles in order: no
atomics, the same bits in every run.

K and y are multiplied in bfloat16 where y is of that dtype, and else as the sum of two or three such numbers
each (pairwise_split.py). The sum of K is taken from what is multiplied.

Shapes: x (B, M, D), y (B, N, D), W (B, Q, A up to a multiple of 8), g (B, Q, A), centre (B, D), lengths (B,).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .distance import DIRECT, add_by_feature, length_of
from .launch import MAX_STRIDE, launch, layout, packed, programs, rows
from .pairwise_bwd_near import add_near
from .pairwise_bwd_short import SHORT, short_gradients
from .pairwise_slopes import far_slopes, kept_strides, load_pairs, of_pairs
from .pairwise_split import ALIGNED, add_product, in_parts, parts_for, split_rows


@triton.jit(
    do_not_specialize=[
        "M", "N", "D", "stride_xb", "stride_x", "stride_yb", "stride_y", "stride_cb", "stride_c",
        "stride_wb", "stride_w", "stride_gb", "stride_g",
    ]
)  # fmt: skip
def pairwise_bwd(
    x_ptr, y_ptr, copy_ptr, x_lengths_ptr, y_lengths_ptr, w_ptr, g_ptr, centre_ptr, found_ptr, dx_ptr,
    M, N, D,
    stride_xb: tl.int64, stride_x: tl.int64, stride_yb: tl.int64, stride_y: tl.int64,
    stride_cb: tl.int64, stride_c: tl.int64,
    stride_wb: tl.int64, stride_w: tl.int64, stride_gb: tl.int64, stride_g: tl.int64,
    VEC_D: tl.constexpr, VEC_C: tl.constexpr, VEC_G: tl.constexpr,
    FEW: tl.constexpr, TRANSPOSED: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """CHUNKS blocks of BLOCK_K columns of dL/dx for BLOCK_M rows of x.

    TRANSPOSED: x = a, so W and g have rows of y. copy: what is multiplied of y, in PARTS.
    Strides: of x and y in units of VEC_D elements, of the copy in VEC_C, of g in VEC_G, of W in ALIGNED.
    """
    D *= VEC_D
    stride_x *= VEC_D
    stride_y *= VEC_D
    stride_c *= VEC_C
    stride_w *= ALIGNED
    stride_g *= VEC_G
    # The programs of one block of rows come one after the other: they read the same W and g.
    tiles_k = tl.cdiv(D, CHUNKS * BLOCK_K)
    tiles = tl.cdiv(M, BLOCK_M) * tiles_k
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i0 = tile // tiles_k * BLOCK_M
    k0 = tile % tiles_k * (CHUNKS * BLOCK_K)
    x_left = length_of(x_lengths_ptr, b, M) - i0
    y_end = length_of(y_lengths_ptr, b, N)
    if x_left <= 0:
        y_end = 0
    copy_ptr += b * stride_cb * VEC_C + k0
    w_ptr += b * stride_wb * ALIGNED + of_pairs(i0, 0, stride_w, TRANSPOSED)
    g_ptr += b * stride_gb * VEC_G + of_pairs(i0, 0, stride_g, TRANSPOSED)
    step_c = stride_c.to(tl.int32)
    step_w = stride_w.to(tl.int32)
    step_g = stride_g.to(tl.int32)
    # Loads end where rows of W and g do, at multiples of their width; what is past a length is left out.
    g_end = (M if TRANSPOSED else N) // VEC_G * VEC_G
    features = tl.cdiv(D, VEC_C) * VEC_C
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_x = i < x_left
    # A bit for each tile in which the row has a near pair: for the tile number t that of t % 32.
    found = tl.zeros((BLOCK_M,), tl.int32)
    slopes = tl.zeros((BLOCK_M, 16), tl.float32)
    total = ()
    for _ in tl.static_range(CHUNKS):
        total += (tl.zeros((BLOCK_M, BLOCK_K), tl.float32),)
    for j0 in range(0, y_end, BLOCK_N):
        in_y = j < y_end - j0
        w_at = w_ptr + of_pairs(0, j0, stride_w, TRANSPOSED)
        g_at = g_ptr + of_pairs(0, j0, stride_g, TRANSPOSED)
        if TRANSPOSED:
            w = load_pairs(w_at, step_w - i0, y_end - j0, step_w, True, BLOCK_M, BLOCK_N)
            g = load_pairs(g_at, g_end - i0, y_end - j0, step_g, True, BLOCK_M, BLOCK_N)
        else:
            w = load_pairs(w_at, x_left, step_w - j0, step_w, False, BLOCK_M, BLOCK_N)
            g = load_pairs(g_at, x_left, g_end - j0, step_g, False, BLOCK_M, BLOCK_N)
        # Up to DIRECT features all pairs are taken from their differences.
        s = g * tl.abs(w) if FEW else far_slopes(w, g)
        if y_end - j0 < BLOCK_N:
            s = tl.where(in_y[None, :], s, 0.0)
        if FEW:
            x_at = x_ptr + b * stride_xb * VEC_D + i0 * stride_x
            y_at = y_ptr + b * stride_yb * VEC_D + j0 * stride_y
            total = (
                add_by_feature(
                    total[0],  # type: ignore[misc]
                    s, x_at, y_at, in_x, in_y, k, D, stride_x.to(tl.int32), stride_y.to(tl.int32),
                    BLOCK_M, BLOCK_N,
                ),
            )  # fmt: skip
        else:
            found |= (tl.min(w, 1) < 0.0).to(tl.int32) << (j0 // BLOCK_N % 32)
            s = (s.to(tl.bfloat16),) if PARTS == 1 else in_parts(s, PARTS)
            ones = tl.full((BLOCK_N, 16), 1.0, tl.bfloat16)
            for part in tl.static_range(PARTS):
                slopes = tl.dot(s[part], ones, slopes)
            added = ()
            for c in tl.static_range(CHUNKS):
                copy_at = copy_ptr + j0 * stride_c + j[:, None] * step_c + (c * BLOCK_K + k)[None, :]
                mask = in_y[:, None] & (c * BLOCK_K + k < features - k0)[None, :]
                y = ()
                for part in tl.static_range(PARTS):
                    y += (tl.load(copy_at + part * features, mask, other=0.0),)
                added += (add_product(total[c], s, y),)
            total = added
    if found_ptr is not None and k0 == 0:
        tl.store(found_ptr + tl.program_id(0) // tiles_k, tl.reduce_or(found, 0))
    slopes = tl.sum(slopes, 1) / 16
    step_x = stride_x.to(tl.int32)
    left = D - k0
    x_ptr += b * stride_xb * VEC_D + i0 * stride_x + k0
    dx_ptr += (b * M + i0) * D + k0
    for c in tl.static_range(CHUNKS):
        in_k = c * BLOCK_K + k < left
        dx = total[c]
        if not FEW:
            x_at = x_ptr + (i[:, None] * step_x + (c * BLOCK_K + k)[None, :])
            x = tl.load(x_at, (i < M - i0)[:, None] & in_k[None, :], other=0.0).to(tl.float32)
            if centre_ptr is not None:
                x -= tl.load(centre_ptr + b * D + k0 + c * BLOCK_K + k, in_k, other=0.0)[None, :]
            dx -= slopes[:, None] * x
        dx_at = dx_ptr + (i[:, None] * D + (c * BLOCK_K + k)[None, :])
        dx = tl.where(in_x[:, None], dx, 0.0)
        tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), (i < M - i0)[:, None] & in_k[None, :])


Gradients = tuple[Tensor | None, Tensor | None]


def attention_gradients(
    q: Tensor,
    a: Tensor,
    W: Tensor,
    centre: Tensor | None,
    g: Tensor,
    q_lengths: Tensor | None,
    a_lengths: Tensor | None,
    *,
    wanted: tuple[bool, bool] = (True, True),
    precision: str = "float32",
) -> Gradients:
    """dL/dq and dL/da, those that are wanted, for g = dL/dS (B, Q, A) and what `attention_forward` saved."""
    (B, Q, D), A = q.shape, a.shape[1]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if wanted[0] else None
    da = torch.empty_like(a, memory_format=torch.contiguous_format) if wanted[1] else None
    if B * Q * A == 0:
        return None if dq is None else dq.zero_(), None if da is None else da.zero_()
    g = g if g.stride(2) == 1 and g.stride(1) < MAX_STRIDE else g.contiguous()
    q, a = rows(q), rows(a)
    lengths = packed(q_lengths), packed(a_lengths)
    gradients = short_gradients if max(Q, A) <= SHORT and D > DIRECT else _long_gradients
    gradients(q, a, W, centre, g, *lengths, dq, da, precision)
    return dq, da


def _long_gradients(
    q: Tensor, a: Tensor, W: Tensor, centre: Tensor | None, g: Tensor,
    q_lengths: Tensor | None, a_lengths: Tensor | None, dq: Tensor | None, da: Tensor | None, precision: str,
) -> None:  # fmt: skip
    """dL/dq and dL/da, those that are given."""
    (B, Q, D), A = q.shape, a.shape[1]
    tile = config.choose("pairwise_bwd", config.architecture(q.device), q.dtype, {"Q": Q, "A": A, "D": D})
    few, options = D <= DIRECT, tile.options
    resident = options.pop("RESIDENT")
    if few:  # no products, so that more warps leave no spills
        options |= {"BLOCK_K": 2 * DIRECT, "num_warps": 8}
    vec_d, strides = layout(q, a, size=D)
    if vec_d * q.element_size() < 8:  # rows that are hardly aligned take registers of their own
        resident //= 2
    chunks = -(-D // options["BLOCK_K"])
    tiles_k = -(-chunks // max(resident // options["BLOCK_K"], 1))
    of_pairs = kept_strides(W)
    found: list[Tensor | None] = []
    sides = (q, a, q_lengths, a_lengths, dq), (a, q, a_lengths, q_lengths, da)
    for of_a, (x, y, x_lengths, y_lengths, dx) in enumerate(sides):
        M, N = x.shape[1], y.shape[1]
        blocks = B * -(-M // options["BLOCK_M"])
        found.append(None if few or dx is None else W.new_empty(blocks, dtype=torch.int32))
        if dx is None:
            continue
        vec_g, g_strides = layout(g, size=M if of_a else N)
        number, copy, vec_c = 1, y, vec_d
        if centre is not None:
            number, vec_c = parts_for(q.dtype, precision), ALIGNED.value
            copy = split_rows(y, y_lengths, centre, number)
        numbers = M, N, D // vec_d, *(strides[2:] + strides[:2] if of_a else strides)
        of_copy = (stride // vec_c for stride in copy.stride()[:2])
        with torch.cuda.device_of(x):
            launch(
                pairwise_bwd, programs(blocks * tiles_k),
                (x, y, copy, x_lengths, y_lengths, W, g, centre, found[of_a], dx,
                 *numbers, *of_copy, *of_pairs, *g_strides),
                VEC_D=vec_d, VEC_C=vec_c, VEC_G=vec_g, FEW=few, TRANSPOSED=bool(of_a),
                PARTS=number, CHUNKS=-(-chunks // tiles_k), **options,
            )  # fmt: skip
    if not few:
        add_near(
            q, a, W, g, found[0], found[1], dq, da, q_lengths, a_lengths, precision,
            options["BLOCK_M"], options["BLOCK_N"],
        )  # fmt: skip
