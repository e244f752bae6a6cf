"""What the ops of `ops.py` compute with the kernels: on CUDA, and on the CPU where Triton interprets them.

Every function takes the arguments of its op; float32, float16 or bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gatematch.kernels import pairwise, pairwise_bwd, pairwise_stream
from gatematch.kernels.pairwise_prepare import prepare
from gatematch.kernels.pairwise_stream_bwd import Upstream, stream_gradient
from gatematch.ops import Grads

Lengths = Tensor | None

attention = pairwise.attention_forward


def attention_backward(
    q: Tensor,
    a: Tensor,
    W: Tensor,
    centre: Tensor,
    g: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    precision: str,
    wanted: list[bool],
) -> Grads:
    return pairwise_bwd.attention_gradients(
        q,
        a,
        W,
        centre if centre.dim() == 2 else None,
        g,
        q_lengths,
        a_lengths,
        wanted=(wanted[0], wanted[1]),
        precision=precision,
    )


def attend(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor | None]:
    x, y = prepare(q, a, q_lengths, a_lengths, precision)
    return pairwise_stream.attend_forward(x, y, v, normalize=normalize, precision=precision)


def attend_backward(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    O: Tensor,
    r: Tensor,
    g: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    precision: str,
    wanted: list[bool],
) -> Grads:
    x, y = prepare(q, a, q_lengths, a_lengths, precision)
    # That of a normalised O comes in O's float32, from a cast that lost nothing.
    g = g.to(v.dtype)
    of_q, of_a, scale = Upstream(g), Upstream(v), None
    if r.dim() == 2:
        # O_i = sum_j S_ij v_j / r_i and r_i = sum_j S_ij, so dL/dS_ij = (g_i·v_j - g_i·O_i) / r_i.
        scale = 1 / torch.where(r == 0, 1, r)
        of_q = Upstream(g, -(g.float() * O).sum(2), scale)
    dq = stream_gradient(x, y, of_q, of_a, precision=precision) if wanted[0] else None
    da = stream_gradient(y, x, of_a, of_q, precision=precision) if wanted[1] else None
    dv = None
    if wanted[2]:
        dv, _ = pairwise_stream.attend_forward(y, x, g, y_scale=scale, precision=precision)
    return dq, da, dv


def sums(
    q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, precision: str
) -> tuple[Tensor, Tensor]:
    return pairwise_stream.sums_forward(*prepare(q, a, q_lengths, a_lengths, precision), precision=precision)


def sums_backward(
    q: Tensor,
    a: Tensor,
    g_rows: Tensor,
    g_cols: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    precision: str,
    wanted: list[bool],
) -> Grads:
    x, y = prepare(q, a, q_lengths, a_lengths, precision)
    of_q, of_a = Upstream(shift=g_rows.float().contiguous()), Upstream(shift=g_cols.float().contiguous())
    dq = stream_gradient(x, y, of_q, of_a, precision=precision) if wanted[0] else None
    da = stream_gradient(y, x, of_a, of_q, precision=precision) if wanted[1] else None
    return dq, da
