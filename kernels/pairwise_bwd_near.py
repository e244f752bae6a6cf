"""The part of the gradient of pairwise attention that comes from near pairs.

    dL/dx_i += sum_p [row_p = i] k_p (y_p - x_p),    k_p = g_p |W_p|

for the pairs p with W < 0: differences first, and the sum over p is a product with a one-hot matrix, its
order fixed. The kernels for far pairs say in `found` in which blocks of rows there are any. Where there are
none, a launch must cost next to nothing: a few programs look at many words of `found` each. It adds to a
gradient that is already rounded: in 16 bits, rows with near pairs are rounded twice.

Shapes are those of pairwise_bwd.py; found (B, blocks of rows of x).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .distance import add_to_rows, differences, length_of, near_words, pick
from .launch import launch, layout, multiprocessors, product_precision, programs
from .pairwise_slopes import kept_strides, load_pairs, of_pairs
from .pairwise_split import ALIGNED

# Near pairs are looked for in so many columns at a time: those of a row are the bits of an integer.
NEAR = tl.constexpr(32)
# Words of `found` that a program looks at at once.
WORDS = tl.constexpr(128)
# Programs for each multiprocessor, which runs one at a time: more of them even out their work.
PROGRAMS = 4


@triton.jit
def near_rows(
    x_ptr, y_ptr, x_lengths_ptr, y_lengths_ptr, w_ptr, g_ptr, found, dx_ptr, block, k0,
    M, N, D, stride_xb, stride_x, stride_yb, stride_y, stride_wb, stride_w, stride_gb, stride_g,
    PREC: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Add to BLOCK_K columns of BLOCK_M rows of dL/dx. Arguments as in pairwise_bwd, strides in elements.

    Tiles of BLOCK_N columns are visited if their bit is set in `found`, that of tile number t being t % 32.
    """
    tl.static_assert(NEAR <= BLOCK_N, "the bit of a tile is that of whole groups of NEAR columns")
    tiles_m = tl.cdiv(M, BLOCK_M)
    i0 = block % tiles_m * BLOCK_M
    b = (block // tiles_m).to(tl.int64)
    x_left = length_of(x_lengths_ptr, b, M) - i0
    y_end = length_of(y_lengths_ptr, b, N)
    x_ptr += b * stride_xb + i0 * stride_x + k0
    y_ptr += b * stride_yb + k0
    w_ptr += b * stride_wb + of_pairs(i0, 0, stride_w, TRANSPOSED)
    g_ptr += b * stride_gb + of_pairs(i0, 0, stride_g, TRANSPOSED)
    dx_ptr += (b * M + i0) * D + k0
    step_x = stride_x.to(tl.int32)
    step_y = stride_y.to(tl.int32)
    step_w = stride_w.to(tl.int32)
    step_g = stride_g.to(tl.int32)
    i = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    in_k = k < D - k0
    dx_at = dx_ptr + i[:, None] * D + k[None, :]
    mask = (i < x_left)[:, None] & in_k[None, :]
    dx = tl.load(dx_at, mask, other=0.0).to(tl.float32)
    # These loops hold too much to be pipelined: there is rarely more than one turn.
    for j0 in tl.range(0, y_end, NEAR, num_stages=1):
        if (found >> (j0 // BLOCK_N % 32)) & 1 != 0:
            y_at = y_ptr + j0 * stride_y
            w_at = w_ptr + of_pairs(0, j0, stride_w, TRANSPOSED)
            g_at = g_ptr + of_pairs(0, j0, stride_g, TRANSPOSED)
            near = load_pairs(w_at, x_left, y_end - j0, step_w, TRANSPOSED, BLOCK_M, NEAR) < 0.0
            counts = tl.sum(near.to(tl.int32), 1)
            number = tl.sum(counts, 0)
            words = near_words(near, NEAR)
            most = tl.max(counts, 0)
            for p0 in tl.range(0, number, BLOCK_P, num_stages=1):
                p = p0 + tl.arange(0, BLOCK_P)
                live = p < number
                row, column = pick(words, counts, most, p, BLOCK_M)
                w = tl.load(w_at + of_pairs(row, column, step_w, TRANSPOSED), live, other=0.0)
                g = tl.load(g_at + of_pairs(row, column, step_g, TRANSPOSED), live, other=0.0)
                step = differences(y_at, x_ptr, column, row, k, live[:, None] & in_k[None, :], step_y, step_x)
                step *= (-w.to(tl.float32) * g.to(tl.float32))[:, None]
                dx = add_to_rows(dx, row, step, PREC, BLOCK_M)
    tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask)


@triton.jit
def marked_rows(
    x_ptr, y_ptr, x_lengths_ptr, y_lengths_ptr, w_ptr, g_ptr, found_ptr, dx_ptr, group, groups, k0,
    B, M, N, D, stride_xb, stride_x, stride_yb, stride_y, stride_wb, stride_w, stride_gb, stride_g,
    PREC: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`near_rows` of those blocks, of every `groups` from the number `group` on, in which there are any."""
    blocks = B * tl.cdiv(M, BLOCK_M)
    t = tl.arange(0, WORDS)
    for first in tl.range(group, blocks, groups * WORDS, num_stages=1):
        words = tl.load(found_ptr + first + t * groups, t * groups < blocks - first, other=0)
        left = words != 0
        for _ in tl.range(0, tl.sum(left.to(tl.int32), 0), num_stages=1):
            turn = tl.min(tl.where(left, t, WORDS), 0)
            left = left & (t > turn)
            found = tl.sum(tl.where(t == turn, words, 0), 0)
            near_rows(
                x_ptr, y_ptr, x_lengths_ptr, y_lengths_ptr, w_ptr, g_ptr, found, dx_ptr,
                first + turn * groups, k0,
                M, N, D, stride_xb, stride_x, stride_yb, stride_y, stride_wb, stride_w, stride_gb, stride_g,
                PREC, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_P,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "groups", "B", "Q", "A", "D", "stride_qb", "stride_q", "stride_ab", "stride_a", "stride_wb",
        "stride_w", "stride_gb", "stride_g",
    ]
)  # fmt: skip
def pairwise_bwd_near(
    q_ptr, a_ptr, q_lengths_ptr, a_lengths_ptr, w_ptr, g_ptr, of_q_ptr, of_a_ptr, dq_ptr, da_ptr,
    groups, B, Q, A, D,
    stride_qb: tl.int64, stride_q: tl.int64, stride_ab: tl.int64, stride_a: tl.int64,
    stride_wb: tl.int64, stride_w: tl.int64, stride_gb: tl.int64, stride_g: tl.int64,
    VEC_D: tl.constexpr, VEC_G: tl.constexpr, PREC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Add to dL/dq and dL/da, those that are given; of_q, of_a: `found` of their blocks.

    Strides of q and a, and D, in units of VEC_D elements, of g in VEC_G, of W in ALIGNED.
    """
    D *= VEC_D
    stride_qb *= VEC_D
    stride_q *= VEC_D
    stride_ab *= VEC_D
    stride_a *= VEC_D
    stride_wb *= ALIGNED
    stride_w *= ALIGNED
    stride_gb *= VEC_G
    stride_g *= VEC_G
    # The programs of one block come one after the other: they read the same W and g.
    tiles_k = tl.cdiv(D, BLOCK_K)
    k0 = tl.program_id(0) % tiles_k * BLOCK_K
    group = tl.program_id(0) // tiles_k
    if dq_ptr is not None:
        if group < groups:
            marked_rows(
                q_ptr, a_ptr, q_lengths_ptr, a_lengths_ptr, w_ptr, g_ptr, of_q_ptr, dq_ptr, group, groups, k0,
                B, Q, A, D,
                stride_qb, stride_q, stride_ab, stride_a, stride_wb, stride_w, stride_gb, stride_g,
                PREC, False, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_P,
            )  # fmt: skip
        group -= groups
    if da_ptr is not None:  # noqa: SIM102 - that is known when it is compiled
        if group >= 0:
            marked_rows(
                a_ptr, q_ptr, a_lengths_ptr, q_lengths_ptr, w_ptr, g_ptr, of_a_ptr, da_ptr, group, groups, k0,
                B, A, Q, D,
                stride_ab, stride_a, stride_qb, stride_q, stride_wb, stride_w, stride_gb, stride_g,
                PREC, True, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_P,
            )  # fmt: skip


def add_near(
    q: Tensor, a: Tensor, W: Tensor, g: Tensor, of_q: Tensor | None, of_a: Tensor | None,
    dq: Tensor | None, da: Tensor | None, q_lengths: Tensor | None, a_lengths: Tensor | None,
    precision: str, BLOCK_M: int, BLOCK_N: int,
) -> None:  # fmt: skip
    """To dq and da of far pairs, those that are given. `found` of each is of such blocks and tiles."""
    (B, Q, D), A = q.shape, a.shape[1]
    arch = config.architecture(q.device)
    tile = config.choose("pairwise_bwd_near", arch, q.dtype, {"Q": Q, "A": A, "D": D})
    vec_d, strides = layout(q, a, size=D)
    vec_g, g_strides = layout(g)
    blocks = B * -(-max(Q, A) // BLOCK_M)
    each = (2 if dq is not None and da is not None else 1) * -(-D // tile.blocks["BLOCK_K"])
    # An odd step from block to block: it takes a program to other rows in every sequence.
    groups = min(PROGRAMS * multiprocessors(q.device) // each | 1, blocks)
    with torch.cuda.device_of(q):
        launch(
            pairwise_bwd_near, programs(groups * each),
            (q, a, q_lengths, a_lengths, W, g, of_q, of_a, dq, da,
             groups, B, Q, A, D // vec_d, *strides, *kept_strides(W), *g_strides),
            VEC_D=vec_d, VEC_G=vec_g, PREC=product_precision(q.dtype, precision, arch),
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **tile.options,
        )  # fmt: skip
