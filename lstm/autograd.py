"""The derivatives of the ops of ops.py, and how they are mapped; see kernels/autograd.py.

Shapes: those of layer.py, of fused.py where `impl` is "torch".
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gatematch.kernels.autograd import (
    Grads,
    backward_pass,
    distinct,
    may_be_differentiated,
    second_derivative,
    vmapped,
)

from . import ops
from .fused import reference_layer
from .reference import lstm_cell_reference

Lengths = Tensor | None


def lstm_layer(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    lengths: Lengths,
    weights: list[Tensor],
    projected: bool,
    impl: str,
    with_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, h_n, c_n and, if asked for, the cell states (T, B, N·H), all in x's dtype.

    What a backward pass needs is written only where there may be one.
    """
    if may_be_differentiated(x, h_0, c_0, *weights):
        save = with_cells or impl != "torch"
        tensors = distinct(x, h_0, c_0, lengths, *weights)
        y, h_n, c_n, cells, *_ = LSTMLayer.apply(projected, impl, save, *tensors)
    else:
        y, h_n, c_n, cells, *_ = ops.layer(x, h_0, c_0, lengths, weights, projected, impl, with_cells)
    if not with_cells:
        return y, h_n, c_n, None
    # A copy always: the backward pass needs cells as they are.
    c = cells[..., : c_0.shape[2]].permute(1, 2, 0, 3)
    return y, h_n, c_n, c.to(x.dtype, copy=True, memory_format=torch.contiguous_format).flatten(2)


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The next h and c of x (B, I), h and c (B, H)."""
    if may_be_differentiated(x, h, c, *weights):
        h, c, _ = LSTMCell.apply(*distinct(x, h, c, *weights))
    else:
        h, c, _ = ops.cell(x, h, c, weights, False)
    return h, c


class LSTMLayer(torch.autograd.Function):
    """`ops.layer_op` of projected, impl, save, x, h_0, c_0, lengths and the weights."""

    @staticmethod
    def forward(projected: bool, impl: str, save: bool, *tensors: Any) -> tuple[Tensor, ...]:
        x, h_0, c_0, lengths, *weights = tensors
        return ops.layer(x, h_0, c_0, lengths, weights, projected, impl, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.projected, ctx.impl, ctx.with_cells, *tensors = inputs
        y, _, _, cells, gates, m = output
        ctx.mark_non_differentiable(gates, m, *([] if ctx.with_cells else [cells]))
        ctx.set_materialize_grads(False)
        # torch's own op is computed once more.
        saved = (gates, gates, gates, m) if ctx.impl == "torch" else (y, cells, gates, m)
        ctx.save_for_backward(*saved, *tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Grads:
        upstream = upstream[: 3 + ctx.with_cells] + (None,) * (1 - ctx.with_cells)
        wanted = (*ctx.needs_input_grad[3:6], *ctx.needs_input_grad[7:])
        if all(g is None for g in upstream):
            return (None,) * len(ctx.needs_input_grad)
        y, cells, gates, m, x, h_0, c_0, lengths, *weights = ctx.saved_tensors
        saved = y, cells, gates, m
        call = (ctx.projected, ctx.impl, wanted, x, h_0, c_0, lengths, *saved, *upstream, *weights)
        dx, dh_0, dc_0, *d_weights = backward_pass(LSTMLayerBackward, call, wanted)
        return None, None, None, dx, dh_0, dc_0, None, *d_weights

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        batch_in = (None, None, None, 1, 1, 1, 0, *[None] * (len(args) - 7))
        return vmapped(LSTMLayer.apply, info.batch_size, in_dims, args, batch_in, (1, 1, 1, 2, 2, 1))


class LSTMLayerBackward(torch.autograd.Function):
    """`ops.layer_backward_op`: the gradients of x, h_0, c_0 and the weights, empty where not wanted."""

    @staticmethod
    def forward(projected: bool, impl: str, wanted: tuple[bool, ...], *tensors: Any) -> tuple[Tensor, ...]:
        inputs, saved, upstream, weights = tensors[:4], tensors[4:8], tensors[8:12], tensors[12:]
        return tuple(
            ops.layer_backward(*inputs, list(weights), *saved, *upstream, projected, impl, list(wanted))
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.projected, _, ctx.wanted, *tensors = inputs
        # What the forward pass saved is a function of its inputs: the reference's derivative knows of it.
        ctx.save_for_backward(*tensors[:4], *tensors[8:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Grads:
        x, h_0, c_0, lengths, *others = ctx.saved_tensors
        upstream, weights = others[:4], others[4:]
        needs = ctx.needs_input_grad
        needed = (*needs[3:6], *needs[15:], *needs[11:15])
        function = partial(reference_layer, ctx.projected, lengths)
        inputs = (x, h_0, c_0, *weights)
        grads = second_derivative(function, inputs, upstream, ctx.wanted, needed, cotangents)
        N = len(inputs)
        return *[None] * 3, *grads[:3], *[None] * 5, *grads[N:], *grads[3:N]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        wanted = args[2]
        weights = len(wanted) - 3
        batch_in = (None, None, None, 1, 1, 1, 0, 1, 2, 2, 1, 1, 1, 1, 2, *[None] * weights)
        batch_out = (1, 1, 1, *[None] * weights)
        # The gradient of a weight is a sum over the batch.
        call = LSTMLayerBackward.apply
        return vmapped(call, info.batch_size, in_dims, args, batch_in, batch_out, any(wanted[3:]))


def _cell_reference(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    return lstm_cell_reference(x, (h, c), *weights)


class LSTMCell(torch.autograd.Function):
    """`ops.cell_op` of x, h, c and the weights."""

    @staticmethod
    def forward(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.cell(x, h, c, list(weights), True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        gates = output[2]
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gates, *inputs)

    @staticmethod
    def backward(ctx: Any, g_h: Tensor | None, g_c: Tensor | None, _: None) -> Grads:
        wanted = tuple(ctx.needs_input_grad)
        if g_h is None and g_c is None:
            return (None,) * len(wanted)
        gates, *inputs = ctx.saved_tensors
        return backward_pass(LSTMCellBackward, (wanted, gates, g_h, g_c, *inputs), wanted)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        batch_in = (0, 0, 0, *[None] * (len(args) - 3))
        return vmapped(LSTMCell.apply, info.batch_size, in_dims, args, batch_in, (0, 0, 0))


class LSTMCellBackward(torch.autograd.Function):
    """`ops.cell_backward_op`: the gradients of x, h, c and the weights, empty where not wanted."""

    @staticmethod
    def forward(
        wanted: tuple[bool, ...],
        gates: Tensor,
        g_h: Tensor | None,
        g_c: Tensor | None,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        return tuple(ops.cell_backward(x, h, c, list(weights), gates, g_h, g_c, list(wanted)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.wanted, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Grads:
        g_h, g_c, *inputs = ctx.saved_tensors
        needed = (*ctx.needs_input_grad[4:], *ctx.needs_input_grad[2:4])
        grads = second_derivative(_cell_reference, inputs, (g_h, g_c), ctx.wanted, needed, cotangents)
        N = len(inputs)
        return None, None, *grads[N:], *grads[:N]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        wanted = args[0]
        weights = len(wanted) - 3
        batch_in, batch_out = (None, *[0] * 6, *[None] * weights), (0, 0, 0, *[None] * weights)
        call = LSTMCellBackward.apply
        return vmapped(call, info.batch_size, in_dims, args, batch_in, batch_out, any(wanted[3:]))


# `apply` asks for the signature in every call, and finds it there: to work it out takes as long as the rest.
for _function in (LSTMLayer, LSTMLayerBackward, LSTMCell, LSTMCellBackward):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]
