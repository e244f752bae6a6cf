"""The gradient of pairwise attention where all pairs of two sequences fit a tile: both sides by one program.

Equations and shapes are those of pairwise_bwd.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .distance import length_of
from .launch import launch, layout, programs
from .pairwise_bwd_near import add_near
from .pairwise_slopes import far_slopes, kept_strides, load_pairs
from .pairwise_split import ALIGNED, add_product, in_parts, parts_for

# Sequences of up to so many rows.
SHORT = 64


@triton.jit(
    do_not_specialize=[
        "Q", "A", "D", "stride_qb", "stride_q", "stride_ab", "stride_a", "stride_wb", "stride_w", "stride_gb",
        "stride_g",
    ]
)  # fmt: skip
def pairwise_bwd_short(
    q_ptr, a_ptr, q_lengths_ptr, a_lengths_ptr, w_ptr, g_ptr, centre_ptr, found_ptr, dq_ptr, da_ptr,
    Q, A, D,
    stride_qb: tl.int64, stride_q: tl.int64, stride_ab: tl.int64, stride_a: tl.int64,
    stride_wb: tl.int64, stride_w: tl.int64, stride_gb: tl.int64, stride_g: tl.int64,
    VEC_D: tl.constexpr, VEC_G: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Those of dL/dq and dL/da that are given, of two sequences of up to BLOCK rows.

    PARTS and strides are as in pairwise_bwd, and `found` is whether there is a near pair.
    """
    D *= VEC_D
    b = tl.program_id(0).to(tl.int64)
    q_left = length_of(q_lengths_ptr, b, Q)
    a_left = length_of(a_lengths_ptr, b, A)
    q_ptr += b * stride_qb * VEC_D
    a_ptr += b * stride_ab * VEC_D
    w_ptr += b * stride_wb * ALIGNED
    g_ptr += b * stride_gb * VEC_G
    step_q = (stride_q * VEC_D).to(tl.int32)
    step_a = (stride_a * VEC_D).to(tl.int32)
    step_w = (stride_w * ALIGNED).to(tl.int32)
    step_g = (stride_g * VEC_G).to(tl.int32)
    if centre_ptr is not None:
        centre_ptr += b * D
    if dq_ptr is not None:
        dq_ptr += b * Q * D
    if da_ptr is not None:
        da_ptr += b * A * D
    i = tl.arange(0, BLOCK)
    in_q = i < q_left
    in_a = i < a_left
    w = load_pairs(w_ptr, q_left, step_w, step_w, False, BLOCK, BLOCK)
    g = load_pairs(g_ptr, q_left, A // VEC_G * VEC_G, step_g, False, BLOCK, BLOCK)
    s = tl.where(in_a[None, :], far_slopes(w, g), 0.0)
    near = tl.min(tl.min(tl.where(in_a[None, :], w, 0.0), 1), 0) < 0.0
    tl.store(found_ptr + b, near.to(tl.int32))
    of_q = (s.to(tl.bfloat16),) if PARTS == 1 else in_parts(s, PARTS)
    of_a = ()
    s = tl.zeros((BLOCK, BLOCK), tl.float32)
    for part in tl.static_range(PARTS):
        of_a += (tl.trans(of_q[part]),)
        s += of_q[part].to(tl.float32)
    slopes_q = tl.sum(s, 1)[:, None]
    slopes_a = tl.sum(s, 0)[:, None]
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        in_k = (k < D)[None, :]
        q = tl.load(q_ptr + i[:, None] * step_q + k[None, :], in_q[:, None] & in_k, other=0.0)
        a = tl.load(a_ptr + i[:, None] * step_a + k[None, :], in_a[:, None] & in_k, other=0.0)
        if centre_ptr is None:
            q_parts = (q,)
            a_parts = (a,)
            q = q.to(tl.float32)
            a = a.to(tl.float32)
        else:
            centre = tl.load(centre_ptr + k, k < D, other=0.0)[None, :]
            q = tl.where(in_q[:, None], q.to(tl.float32) - centre, 0.0)
            a = tl.where(in_a[:, None], a.to(tl.float32) - centre, 0.0)
            q_parts = in_parts(q, PARTS)
            a_parts = in_parts(a, PARTS)
        if dq_ptr is not None:
            # Past the lengths 0 has been multiplied by all others, which may be NaN.
            dq = tl.where(in_q[:, None], add_product(-slopes_q * q, of_q, a_parts), 0.0)
            at = dq_ptr + i[:, None] * D + k[None, :]
            tl.store(at, dq.to(dq_ptr.dtype.element_ty), (i < Q)[:, None] & in_k)
        if da_ptr is not None:
            da = tl.where(in_a[:, None], add_product(-slopes_a * a, of_a, q_parts), 0.0)
            at = da_ptr + i[:, None] * D + k[None, :]
            tl.store(at, da.to(da_ptr.dtype.element_ty), (i < A)[:, None] & in_k)


def short_gradients(
    q: Tensor, a: Tensor, W: Tensor, centre: Tensor | None, g: Tensor,
    q_lengths: Tensor | None, a_lengths: Tensor | None, dq: Tensor | None, da: Tensor | None, precision: str,
) -> None:  # fmt: skip
    (B, Q, D), A = q.shape, a.shape[1]
    arch = config.architecture(q.device)
    tile = config.choose("pairwise_bwd_short", arch, q.dtype, {"Q": Q, "A": A, "D": D})
    vec_d, strides = layout(q, a, size=D)
    options = tile.options
    if vec_d * q.element_size() < 8:  # rows that are hardly aligned take registers of their own
        options["BLOCK_K"] //= 2
    vec_g, g_strides = layout(g, size=A)
    block = SHORT if max(Q, A) > SHORT // 2 else SHORT // 2
    found = W.new_empty(B, dtype=torch.int32)
    with torch.cuda.device_of(q):
        launch(
            pairwise_bwd_short, programs(B),
            (q, a, q_lengths, a_lengths, W, g, centre, found, dq, da,
             Q, A, D // vec_d, *strides, *kept_strides(W), *g_strides),
            VEC_D=vec_d, VEC_G=vec_g, PARTS=1 if centre is None else parts_for(q.dtype, precision),
            BLOCK=block, **options,
        )  # fmt: skip
    add_near(q, a, W, g, found, found, dq, da, q_lengths, a_lengths, precision, block, block)
