"""The kernels as PyTorch ops, and their autograd: higher derivatives go through the reference.

torch.compile does not look into the ops ``torch.ops.gatematch.*``. They run on CUDA, and on the CPU where
Triton interprets its kernels (``TRITON_INTERPRET=1``).

Shapes: q (B, Q, D), a (B, A, D), v (B, A, V), S (B, Q, A), lengths (B,); float32, float16 or bfloat16.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from gatematch.kernels import pairwise, pairwise_stream
from gatematch.kernels.autograd import Grads, differentiable, fake_gradients, or_empty
from gatematch.kernels.pairwise_prepare import prepare
from gatematch.kernels.pairwise_stream_bwd import Upstream, stream_gradient

from .reference import pairwise_attend_reference, pairwise_attention_reference, pairwise_sums_reference

Lengths = Tensor | None


@custom_op("gatematch::pairwise_attention", mutates_args=())
def attention_op(
    q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, precision: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """S, and if `save` R (B, Q, A up to a multiple of 4) and, unless it is empty, the centre (B, D)."""
    S, R, centre = pairwise.attention_forward(q, a, q_lengths, a_lengths, precision=precision, save=save)
    return S, or_empty(R, q), or_empty(centre, q)


@attention_op.register_fake
def _(
    q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, precision: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (B, Q, D), A = q.shape, a.shape[1]
    if not save:
        return q.new_empty(B, Q, A), or_empty(None, q), or_empty(None, q)
    R = q.new_empty(B, Q, (A + 3) // 4 * 4, dtype=torch.float32)
    centre = q.new_empty(B, D, dtype=torch.float32) if pairwise.takes_centre(q) else None
    return q.new_empty(B, Q, A), R, or_empty(centre, q)


@custom_op("gatematch::pairwise_attention_backward", mutates_args=())
def attention_backward_op(
    q: Tensor,
    a: Tensor,
    R: Tensor,
    centre: Tensor,
    g: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    precision: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """dL/dq and dL/da for g = dL/dS, empty where not wanted."""
    saved = R, centre if centre.dim() == 2 else None, g
    dq = da = None
    if wanted[0]:
        dq = pairwise.attention_gradient(q, a, *saved, q_lengths, a_lengths, of_a=False, precision=precision)
    if wanted[1]:
        da = pairwise.attention_gradient(a, q, *saved, a_lengths, q_lengths, of_a=True, precision=precision)
    return or_empty(dq, q), or_empty(da, a)


@attention_backward_op.register_fake
def _(
    q: Tensor,
    a: Tensor,
    R: Tensor,
    centre: Tensor,
    g: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    precision: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    return fake_gradients((q, a), wanted)


@custom_op("gatematch::pairwise_attend", mutates_args=())
def attend_op(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """S @ v (B, Q, V); with `normalize` its rows divided by their sums, which come along, both in float32."""
    x, y = prepare(q, a, q_lengths, a_lengths, precision)
    O, r = pairwise_stream.attend_forward(x, y, v, normalize=normalize, precision=precision)
    return O, or_empty(r, q)


@attend_op.register_fake
def _(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    O = v.new_empty(*q.shape[:2], v.shape[2], dtype=torch.float32 if normalize else v.dtype)
    return O, or_empty(q.new_empty(q.shape[:2], dtype=torch.float32) if normalize else None, q)


@custom_op("gatematch::pairwise_attend_backward", mutates_args=())
def attend_backward_op(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dq, dL/da and dL/dv for g = dL/dO, empty where not wanted. r is empty where O is not normalised."""
    x, y = prepare(q, a, q_lengths, a_lengths, precision)
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
    return or_empty(dq, q), or_empty(da, a), or_empty(dv, v)


@attend_backward_op.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients((q, a, v), wanted)


@custom_op("gatematch::pairwise_sums", mutates_args=())
def sums_op(
    q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, precision: str
) -> tuple[Tensor, Tensor]:
    """Row sums (B, Q) and column sums (B, A) of S, in float32."""
    x, y = prepare(q, a, q_lengths, a_lengths, precision)
    return pairwise_stream.sums_forward(x, y, precision=precision)


@sums_op.register_fake
def _(q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, precision: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[:2], dtype=torch.float32), q.new_empty(a.shape[:2], dtype=torch.float32)


@custom_op("gatematch::pairwise_sums_backward", mutates_args=())
def sums_backward_op(
    q: Tensor,
    a: Tensor,
    g_rows: Tensor,
    g_cols: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    precision: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """dL/dq and dL/da for the gradients of both sums, empty where not wanted."""
    x, y = prepare(q, a, q_lengths, a_lengths, precision)
    of_q, of_a = Upstream(shift=g_rows.float().contiguous()), Upstream(shift=g_cols.float().contiguous())
    dq = stream_gradient(x, y, of_q, of_a, precision=precision) if wanted[0] else None
    da = stream_gradient(y, x, of_a, of_q, precision=precision) if wanted[1] else None
    return or_empty(dq, q), or_empty(da, a)


@sums_backward_op.register_fake
def _(
    q: Tensor,
    a: Tensor,
    g_rows: Tensor,
    g_cols: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    precision: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    return fake_gradients((q, a), wanted)


def _grads(grads: Grads, wanted: list[bool], others: int) -> Grads:
    """What a backward returns: the gradients that were wanted, and None for `others` more inputs."""
    return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * others)


def attention(q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, precision: str) -> Tensor:
    """S; what a backward pass needs is written only where there may be one."""
    S: Tensor
    if torch.is_grad_enabled() and (q.requires_grad or a.requires_grad):
        S = PairwiseAttention.apply(q, a, q_lengths, a_lengths, precision)
    else:
        S = attention_op(q, a, q_lengths, a_lengths, precision, False)[0]
    return S


class PairwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, precision: str
    ) -> Tensor:
        S, R, centre = attention_op(q, a, q_lengths, a_lengths, precision, True)
        ctx.precision = precision
        ctx.save_for_backward(q, a, q_lengths, a_lengths, R, centre)
        return S

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Grads:
        q, a, q_lengths, a_lengths, R, centre = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        if torch.is_grad_enabled():
            grads = differentiable(pairwise_attention_reference, (q, a), (g,), q_lengths, a_lengths)
        else:
            grads = attention_backward_op(q, a, R, centre, g, q_lengths, a_lengths, ctx.precision, wanted)
        return _grads(grads, wanted, 3)


class PairwiseAttend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        a: Tensor,
        v: Tensor,
        q_lengths: Lengths,
        a_lengths: Lengths,
        normalize: str | None,
        precision: str,
    ) -> Tensor:
        O, r = attend_op(q, a, v, q_lengths, a_lengths, normalize == "rows", precision)
        ctx.normalize, ctx.precision = normalize, precision
        # Only a normalised O is needed again, and it may be in another dtype than what is returned.
        ctx.save_for_backward(q, a, v, q_lengths, a_lengths, r if normalize is None else O, r)
        return O.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Grads:
        q, a, v, q_lengths, a_lengths, O, r = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():
            grads = differentiable(
                pairwise_attend_reference, (q, a, v), (g,), q_lengths, a_lengths, ctx.normalize
            )
        else:
            grads = attend_backward_op(q, a, v, O, r, g, q_lengths, a_lengths, ctx.precision, wanted)
        return _grads(grads, wanted, 4)


class PairwiseSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, precision: str
    ) -> tuple[Tensor, Tensor]:
        r, c = sums_op(q, a, q_lengths, a_lengths, precision)
        ctx.precision = precision
        ctx.save_for_backward(q, a, q_lengths, a_lengths)
        return r.to(q.dtype), c.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, g_rows: Tensor, g_cols: Tensor) -> Grads:
        q, a, q_lengths, a_lengths = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        if torch.is_grad_enabled():
            grads = differentiable(pairwise_sums_reference, (q, a), (g_rows, g_cols), q_lengths, a_lengths)
        else:
            grads = sums_backward_op(q, a, g_rows, g_cols, q_lengths, a_lengths, ctx.precision, wanted)
        return _grads(grads, wanted, 3)
