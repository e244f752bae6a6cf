"""Autograd for the tiled path: first derivatives tile by tile, higher ones through the reference.

A backward pass that is itself to be differentiated (``create_graph=True``) goes through `reference.py`,
so that every derivative exists; a plain one never pays for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import tiled
from .operands import Operands, full_precision, padding
from .reference import pairwise_attend_reference, pairwise_attention_reference, pairwise_sums_reference

Grads = tuple[Tensor | None, ...]


def _differentiable(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    upstream: tuple[Tensor, ...],
) -> Grads:
    """Gradients of `function` at `inputs` that can be differentiated again."""
    # Fresh aliases: one input may have been computed from another, and only the direct dependence counts.
    inputs = tuple(tensor.view_as(tensor) for tensor in inputs)
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    grads = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True))
    return tuple(next(grads) if tensor.requires_grad else None for tensor in inputs)


def _save(ctx: Any, x: Operands, *others: Tensor) -> None:
    ctx.save_for_backward(*others, *x.tensors())
    ctx.padded = x.padded


def _saved(ctx: Any, others: int) -> tuple[Operands, tuple[Tensor, ...]]:
    saved = ctx.saved_tensors
    return Operands.restore(saved[others:], ctx.padded), saved[:others]


class PairwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None) -> Tensor:
        with full_precision(q.device.type):
            x = Operands(q, a, q_lengths, a_lengths)
            S, found = tiled.attention(x)
        out = S.to(q.dtype)
        if not any(ctx.needs_input_grad):
            return out
        ctx.lengths = q_lengths, a_lengths
        counts = [0 if near is None else near.place.shape[0] for near in found]
        # A low-precision S is rounded too far, and many near pairs would take more room than S itself.
        if S.dtype == q.dtype and sum(counts) <= tiled.KEPT * S.numel():
            ctx.counts = counts
            nears = [near for near in found if near is not None]
            place = torch.cat([near.place for near in nears]) if nears else S.new_empty(0, dtype=torch.int64)
            distance = torch.cat([near.distance for near in nears]) if nears else S.new_empty(0)
            _save(ctx, x, q, a, out, place, distance)
        else:
            ctx.counts = None
            _save(ctx, x, q, a)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Grads:
        x, (q, a, *kept) = _saved(ctx, 2 if ctx.counts is None else 5)
        if torch.is_grad_enabled():

            def reference(q: Tensor, a: Tensor) -> Tensor:
                return pairwise_attention_reference(q, a, *ctx.lengths)

            return *_differentiable(reference, (q, a), (g,)), None, None
        g = g.to(x.q.dtype)
        with full_precision(q.device.type):
            if ctx.counts is None:
                grads = tiled.backward(x, tiled.whole_rows(x.sizes), lambda block, S: g[block])
            else:
                grads = tiled.backward_from_scores(x, g, *kept, ctx.counts)
        return grads[0].to(q.dtype), grads[1].to(q.dtype), None, None


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
        with full_precision(q.device.type):
            x = Operands(q, a, q_lengths, a_lengths)
            values = v.to(x.q.dtype)
            if a_lengths is not None:
                values = values.masked_fill(padding(v, a_lengths)[..., None], 0)
            O, r = tiled.attend(x, values, normalize == "rows")
        ctx.lengths, ctx.normalize = (q_lengths, a_lengths), normalize
        _save(ctx, x, q, a, v, values, *(() if r is None else (O, r)))
        return O.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Grads:
        x, (q, a, v, values, *normalized) = _saved(ctx, 4 if ctx.normalize is None else 6)
        if torch.is_grad_enabled():

            def reference(q: Tensor, a: Tensor, v: Tensor) -> Tensor:
                return pairwise_attend_reference(q, a, v, *ctx.lengths, normalize=ctx.normalize)

            return *_differentiable(reference, (q, a, v), (g,)), None, None, None
        g = g.to(x.q.dtype)
        grad_v = torch.zeros_like(values)
        # O_i = sum_j S_ij v_j / r_i and r_i = sum_j S_ij, so dL/dS_ij = (g_i / r_i)·(v_j - O_i).
        mean = None
        if normalized:
            O, r = normalized
            g = g / r[..., None]
            mean = torch.linalg.vecdot(g, O)[..., None]

        def upstream(block: tiled.Block, S: Tensor) -> Tensor:
            b, i, j = block
            grad_v[b, j].baddbmm_(S.mT, g[b, i])
            tile = torch.bmm(g[b, i], values[b, j].mT)
            return tile if mean is None else tile.sub_(mean[b, i])

        with full_precision(q.device.type):
            grad_q, grad_a = tiled.backward(x, tiled.squares(x.sizes), upstream)
        return grad_q.to(q.dtype), grad_a.to(q.dtype), grad_v.to(v.dtype), None, None, None


class PairwiseSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with full_precision(q.device.type):
            x = Operands(q, a, q_lengths, a_lengths)
            r, c = tiled.sums(x)
        ctx.lengths = q_lengths, a_lengths
        _save(ctx, x, q, a)
        return r.to(q.dtype), c.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, g_rows: Tensor, g_cols: Tensor) -> Grads:
        x, (q, a) = _saved(ctx, 2)
        if torch.is_grad_enabled():

            def reference(q: Tensor, a: Tensor) -> tuple[Tensor, ...]:
                return pairwise_sums_reference(q, a, *ctx.lengths)

            return *_differentiable(reference, (q, a), (g_rows, g_cols)), None, None
        g_rows, g_cols = g_rows.to(x.q.dtype), g_cols.to(x.q.dtype)

        def upstream(block: tiled.Block, S: Tensor) -> Tensor:
            b, i, j = block
            return g_rows[b, i, None] + g_cols[b, None, j]

        with full_precision(q.device.type):
            grad_q, grad_a = tiled.backward(x, tiled.squares(x.sizes), upstream)
        return grad_q.to(q.dtype), grad_a.to(q.dtype), None, None
