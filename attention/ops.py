"""Autograd for the tiled path: first derivatives tile by tile, higher ones through the reference.

A backward pass that is itself to be differentiated (``create_graph=True``) goes through `reference.py`,
so that every derivative exists; a plain one never pays for that. `triton_ops.py` has the same for kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatematch.kernels.autograd import Grads, differentiable
from gatematch.kernels.precision import library_products

from . import tiled
from .blocks import Block, squares, whole_rows
from .operands import Operands
from .reference import pairwise_attend_reference, pairwise_attention_reference, pairwise_sums_reference


def _operands(ctx: Any, q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None) -> Operands:
    """Those of the forward pass, made again: they cost little beside the tiles, and need not be kept."""
    x = Operands(q, a, q_lengths, a_lengths)
    if ctx.centred:
        x.centre()
    return x


def _values(x: Operands, v: Tensor) -> Tensor:
    """v in the precision of the tiles, 0 past its lengths."""
    v = v.to(x.q.dtype)
    return v if x.a_padding is None else v.masked_fill(x.a_padding, 0)


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
            S, kept, found = tiled.attention(x)
        ctx.centred = x.centred
        # A low-precision S is rounded too far, and many near pairs would take more room than S itself.
        near_pairs = sum([near.place.shape[0] for near in found])
        if S.dtype != q.dtype or near_pairs > tiled.KEPT * S.numel():
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
        if torch.is_grad_enabled():
            grads = differentiable(pairwise_attention_reference, (q, a), (g,), q_lengths, a_lengths)
            return *grads, None, None
        with library_products(q.device.type):
            x = _operands(ctx, q, a, q_lengths, a_lengths)
            if ctx.kept is None:
                g = g.to(x.q.dtype)
                grads = tiled.backward(x, whole_rows(x.sizes), lambda block, S: block.of_pairs(g))
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
        normalize: str | None,
    ) -> Tensor:
        with library_products(q.device.type):
            x = Operands(q, a, q_lengths, a_lengths)
            O, r = tiled.attend(x, _values(x, v), normalize == "rows")
        ctx.centred, ctx.normalize = x.centred, normalize
        ctx.save_for_backward(q, a, v, q_lengths, a_lengths, *(() if r is None else (O, r)))
        return O.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Grads:
        q, a, v, q_lengths, a_lengths, *normalized = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = differentiable(
                pairwise_attend_reference, (q, a, v), (g,), q_lengths, a_lengths, ctx.normalize
            )
            return *grads, None, None, None
        x = _operands(ctx, q, a, q_lengths, a_lengths)
        g, values = g.to(x.q.dtype), _values(x, v)
        grad_v = torch.zeros_like(values)
        # O_i = sum_j S_ij v_j / r_i and r_i = sum_j S_ij, so dL/dS_ij = (g_i / r_i)·(v_j - O_i).
        mean = None
        if normalized:
            O, r = normalized
            g = g / r[..., None]
            mean = torch.linalg.vecdot(g, O)[..., None]

        def upstream(block: Block, S: Tensor) -> Tensor:
            block.of_a(grad_v).baddbmm_(S.mT, block.of_q(g))
            tile = torch.bmm(block.of_q(g), block.of_a(values).mT)
            return tile if mean is None else tile.sub_(block.of_q(mean))

        with library_products(q.device.type):
            grad_q, grad_a = tiled.backward(x, squares(x.sizes), upstream)
        return grad_q.to(q.dtype), grad_a.to(q.dtype), grad_v.to(v.dtype), None, None, None


class PairwiseSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with library_products(q.device.type):
            x = Operands(q, a, q_lengths, a_lengths)
            r, c = tiled.sums(x)
        ctx.centred = x.centred
        ctx.save_for_backward(q, a, q_lengths, a_lengths)
        return r.to(q.dtype), c.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, g_rows: Tensor, g_cols: Tensor) -> Grads:
        q, a, q_lengths, a_lengths = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = differentiable(pairwise_sums_reference, (q, a), (g_rows, g_cols), q_lengths, a_lengths)
            return *grads, None, None
        x = _operands(ctx, q, a, q_lengths, a_lengths)
        g_rows, g_cols = g_rows.to(x.q.dtype), g_cols.to(x.q.dtype)

        def upstream(block: Block, S: Tensor) -> Tensor:
            return block.of_q(g_rows)[..., None] + block.of_a(g_cols)[:, None]

        with library_products(q.device.type):
            grad_q, grad_a = tiled.backward(x, squares(x.sizes), upstream)
        return grad_q.to(q.dtype), grad_a.to(q.dtype), None, None
