"""The fast way for calls without transform or compiler, the usual case on a CPU: autograd around the tiles.

Small calls are much faster without the custom ops. So is the backward pass of S, which reads the distances
from S and uses the saved near pairs. Higher derivatives and batched gradients are those of the ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatematch.ops import Grads, followed
from gatematch.precision import library_products

from . import by_torch, ops, tiled
from .operands import Operands

# Who computes the backward ops.
BY = {"impl": "torch", "precision": "float32"}


def _operands(ctx: Any, q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None) -> Operands:
    """Those of the forward pass, made again: they cost little beside the tiles, and need not be kept."""
    x = Operands(q, a, q_lengths, a_lengths)
    if ctx.offset is not None:
        x.take_out(ctx.offset)
    return x


def attention(q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None) -> Tensor:
    """S; with nothing to differentiate, autograd's own call and what it saves take a fifth of a small one."""
    if torch.is_grad_enabled() and (q.requires_grad or a.requires_grad):
        S: Tensor = PairwiseAttention.apply(q, a, q_lengths, a_lengths)
        return S
    with library_products(q.device.type):
        S = tiled.attention(Operands(q, a, q_lengths, a_lengths))[0]
    return S if S.dtype == q.dtype else S.to(q.dtype)


class PairwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None) -> Tensor:
        with library_products(q.device.type):
            x = Operands(q, a, q_lengths, a_lengths)
            S, kept, found = tiled.attention(x, keep=True)
        ctx.offset = x.offset
        # A low-precision S is rounded too far, that of extreme rows cannot give k, and many near pairs
        # would take more room than S itself.
        near_pairs = sum([near.place.shape[0] for near in found])
        if S.dtype != q.dtype or x.extreme or near_pairs > tiled.KEPT * S.numel():
            ctx.kept = None
            ctx.save_for_backward(q, a, q_lengths, a_lengths)
            return S.to(q.dtype)
        ctx.kept = kept
        near = map(torch.cat, zip(*found, strict=True)) if near_pairs else ()
        ctx.save_for_backward(q, a, q_lengths, a_lengths, S, *near)
        return S

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Grads:
        q, a, q_lengths, a_lengths, *saved = ctx.saved_tensors
        if followed(g):
            nothing, wanted = q.new_empty(0), ctx.needs_input_grad[:2]
            call = {"q": q, "a": a, "W": nothing, "centre": nothing, "g_S": g, "wanted": wanted}
            lengths = {"q_lengths": q_lengths, "a_lengths": a_lengths}
            return *ops.attention.backward_named(**call, **lengths, **BY), None, None
        with library_products(q.device.type):
            x = _operands(ctx, q, a, q_lengths, a_lengths)
            if ctx.kept is None:
                grads = by_torch.attention_gradients(x, g)
            else:
                S, *near = saved
                grads = tiled.backward_from_scores(x, g, S, ctx.kept, near)
        # Autograd itself casts gradients to the dtype of the inputs.
        return *grads, None, None


class PairwiseAttend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        a: Tensor,
        v: Tensor,
        q_lengths: Tensor | None,
        a_lengths: Tensor | None,
        normalize: bool,
    ) -> Tensor:
        with library_products(q.device.type):
            x = Operands(q, a, q_lengths, a_lengths)
            O, r = tiled.attend(x, by_torch.values(x, v), normalize)
        ctx.offset = x.offset
        ctx.save_for_backward(q, a, v, q_lengths, a_lengths, *(() if r is None else (O, r)))
        return O.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Grads:
        q, a, v, q_lengths, a_lengths, *normalized = ctx.saved_tensors
        if followed(g):
            O, r = normalized or (q.new_empty(0), q.new_empty(0))
            call = {"q": q, "a": a, "v": v, "O": O, "r": r, "g_O": g, "wanted": ctx.needs_input_grad[:3]}
            options = {"q_lengths": q_lengths, "a_lengths": a_lengths, "normalize": bool(normalized)}
            return *ops.attend.backward_named(**call, **options, **BY), None, None, None
        with library_products(q.device.type):
            x = _operands(ctx, q, a, q_lengths, a_lengths)
            grads = by_torch.attend_gradients(x, v, normalized, g)
        return *grads, None, None, None


class PairwiseSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with library_products(q.device.type):
            x = Operands(q, a, q_lengths, a_lengths)
            r, c = tiled.sums(x)
        ctx.offset = x.offset
        ctx.save_for_backward(q, a, q_lengths, a_lengths)
        return r.to(q.dtype), c.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, g_rows: Tensor, g_cols: Tensor) -> Grads:
        q, a, q_lengths, a_lengths = ctx.saved_tensors
        if followed(g_rows, g_cols):
            call = {"q": q, "a": a, "g_rows": g_rows, "g_cols": g_cols, "wanted": ctx.needs_input_grad[:2]}
            lengths = {"q_lengths": q_lengths, "a_lengths": a_lengths}
            return *ops.sums.backward_named(**call, **lengths, **BY), None, None
        with library_products(q.device.type):
            x = _operands(ctx, q, a, q_lengths, a_lengths)
            grads = by_torch.sums_gradients(x, g_rows, g_cols)
        return *grads, None, None
