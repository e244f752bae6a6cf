"""Autograd for the ops of `ops.py`: first derivatives by their backward ops, higher ones by the reference.

Each op has two autograd Functions, one around the op and one around its backward op, which `torch.func`,
batched gradients and torch.compile can follow; `kernels/autograd.py` says how. Both return what their op
does, which may be more exact than the rows that came in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gatematch.kernels.autograd import (
    Grads,
    backward_pass,
    distinct,
    may_be_differentiated,
    no_autocast,
    second_derivative,
    vmapped,
)
from gatematch.kernels.precision import library_products

from . import ops
from .ops import Lengths
from .reference import pairwise_attend_reference, pairwise_attention_reference, pairwise_sums_reference


def attention(
    q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, impl: str, precision: str
) -> Tensor:
    """S; what a backward pass needs is written only where there may be one."""
    S: Tensor
    if may_be_differentiated(q, a):
        S = PairwiseAttention.apply(*distinct(q, a, q_lengths, a_lengths), impl, precision)[0]
    else:
        S = ops.attention(q, a, q_lengths, a_lengths, impl, precision, False)[0]
    return S


def attend(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    normalize: bool,
    impl: str,
    precision: str,
) -> Tensor:
    if may_be_differentiated(q, a, v):
        tensors = distinct(q, a, v, q_lengths, a_lengths)
        O, _ = PairwiseAttend.apply(*tensors, normalize, impl, precision)
    else:
        O, _ = ops.attend(q, a, v, q_lengths, a_lengths, normalize, impl, precision)
    return O.to(v.dtype)


def sums(
    q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, impl: str, precision: str
) -> tuple[Tensor, Tensor]:
    if may_be_differentiated(q, a):
        r, c = PairwiseSums.apply(*distinct(q, a, q_lengths, a_lengths), impl, precision)
    else:
        r, c = ops.sums(q, a, q_lengths, a_lengths, impl, precision)
    return r.to(q.dtype), c.to(q.dtype)


def exactly(
    reference: Callable[..., Any], inputs: tuple[Tensor, ...], dtype: torch.dtype, *options: Any
) -> Any:
    """What the reference gives in float32 at least, whatever autocast says, in this dtype."""
    compute = torch.promote_types(inputs[0].dtype, torch.float32)
    # A compiler cannot follow the lock of the switch.
    compiling = torch.compiler.is_compiling()
    with no_autocast(inputs[0]) if compiling else library_products(inputs[0].device.type):
        found = reference(*(x.to(compute) for x in inputs), *options)
    return tuple(y.to(dtype) for y in found) if isinstance(found, tuple) else found.to(dtype)


def _second_derivative(
    reference: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    options: Sequence[Any],
    upstream: tuple[Tensor, ...],
    *others: Any,
) -> Grads:
    """That of kernels/autograd.py, for the reference."""

    def function(*inputs: Tensor) -> Any:
        return exactly(reference, inputs, upstream[0].dtype, *options)

    # The derivatives' own products are made once `exactly` has returned.
    with library_products(inputs[0].device.type):
        return second_derivative(function, inputs, upstream, *others)


class PairwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, impl: str, precision: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.attention(q, a, q_lengths, a_lengths, impl, precision, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, a, q_lengths, a_lengths, ctx.impl, ctx.precision = inputs
        _, W, centre = output
        ctx.mark_non_differentiable(W, centre)
        ctx.set_materialize_grads(False)  # zeros for W, which are as large as S
        ctx.save_for_backward(q, a, W, centre, q_lengths, a_lengths)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Grads:
        if g is None:
            return (None,) * 6
        q, a, W, centre, *lengths = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        call = (q, a, W, centre, g, *lengths, ctx.impl, ctx.precision, wanted)
        grads = backward_pass(PairwiseAttentionBackward, call, wanted)
        return *grads, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch_in = (*[0] * 4, None, None)
        return vmapped(PairwiseAttention.apply, info.batch_size, in_dims, args, batch_in, (0, 0, 0))


class PairwiseAttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return ops.attention_backward(*args[:-1], list(args[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, a, _, _, g, q_lengths, a_lengths, _, _, ctx.wanted = inputs
        ctx.save_for_backward(q, a, g, q_lengths, a_lengths)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Grads:
        q, a, g, *lengths = ctx.saved_tensors
        needed = [ctx.needs_input_grad[place] for place in (0, 1, 4)]
        dq, da, dg = _second_derivative(
            pairwise_attention_reference, (q, a), lengths, (g,), ctx.wanted, needed, cotangents
        )
        return dq, da, None, None, dg, *[None] * 5

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch_in = (*[0] * 7, None, None, None)
        return vmapped(PairwiseAttentionBackward.apply, info.batch_size, in_dims, args, batch_in, (0, 0))


class PairwiseAttend(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        a: Tensor,
        v: Tensor,
        q_lengths: Lengths,
        a_lengths: Lengths,
        normalize: bool,
        impl: str,
        precision: str,
    ) -> tuple[Tensor, Tensor]:
        return ops.attend(q, a, v, q_lengths, a_lengths, normalize, impl, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, a, v, q_lengths, a_lengths, normalize, ctx.impl, ctx.precision = inputs
        O, r = output
        ctx.mark_non_differentiable(r)
        ctx.set_materialize_grads(False)
        # Only a normalised O is needed again.
        ctx.save_for_backward(q, a, v, O if normalize else r, r, q_lengths, a_lengths)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Grads:
        if g is None:
            return (None,) * 8
        q, a, v, O, r, *lengths = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        call = (q, a, v, O, r, g, *lengths, ctx.impl, ctx.precision, wanted)
        grads = backward_pass(PairwiseAttendBackward, call, wanted)
        return *grads, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch_in = (*[0] * 5, None, None, None)
        return vmapped(PairwiseAttend.apply, info.batch_size, in_dims, args, batch_in, (0, 0))


class PairwiseAttendBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.attend_backward(*args[:-1], list(args[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, a, v, _, r, g, q_lengths, a_lengths, _, _, ctx.wanted = inputs
        ctx.normalize = "rows" if r.dim() == 2 else None
        ctx.save_for_backward(q, a, v, g, q_lengths, a_lengths)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Grads:
        q, a, v, g, *lengths = ctx.saved_tensors
        needed = [ctx.needs_input_grad[place] for place in (0, 1, 2, 5)]
        options = (*lengths, ctx.normalize)
        dq, da, dv, dg = _second_derivative(
            pairwise_attend_reference, (q, a, v), options, (g,), ctx.wanted, needed, cotangents
        )
        return dq, da, dv, None, None, dg, *[None] * 5

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch_in = (*[0] * 8, None, None, None)
        return vmapped(PairwiseAttendBackward.apply, info.batch_size, in_dims, args, batch_in, (0, 0, 0))


class PairwiseSums(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, impl: str, precision: str
    ) -> tuple[Tensor, Tensor]:
        return ops.sums(q, a, q_lengths, a_lengths, impl, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, a, q_lengths, a_lengths, ctx.impl, ctx.precision = inputs
        ctx.save_for_backward(q, a, q_lengths, a_lengths)

    @staticmethod
    def backward(ctx: Any, g_rows: Tensor, g_cols: Tensor) -> Grads:
        q, a, *lengths = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        call = (q, a, g_rows, g_cols, *lengths, ctx.impl, ctx.precision, wanted)
        grads = backward_pass(PairwiseSumsBackward, call, wanted)
        return *grads, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch_in = (*[0] * 4, None, None)
        return vmapped(PairwiseSums.apply, info.batch_size, in_dims, args, batch_in, (0, 0))


class PairwiseSumsBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return ops.sums_backward(*args[:-1], list(args[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, a, g_rows, g_cols, q_lengths, a_lengths, _, _, ctx.wanted = inputs
        ctx.save_for_backward(q, a, g_rows, g_cols, q_lengths, a_lengths)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Grads:
        q, a, g_rows, g_cols, *lengths = ctx.saved_tensors
        needed, upstream = ctx.needs_input_grad[:4], (g_rows, g_cols)
        grads = _second_derivative(
            pairwise_sums_reference, (q, a), lengths, upstream, ctx.wanted, needed, cotangents
        )
        return *grads, *[None] * 5

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch_in = (*[0] * 6, None, None, None)
        return vmapped(PairwiseSumsBackward.apply, info.batch_size, in_dims, args, batch_in, (0, 0))


# `apply` asks for the signature in every call, and finds it there: to work it out takes as long as the rest.
for _function in (
    PairwiseAttention,
    PairwiseAttentionBackward,
    PairwiseAttend,
    PairwiseAttendBackward,
    PairwiseSums,
    PairwiseSumsBackward,
):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]
