"""A layer of the LSTM, and a step of the cell, by the kernels: PyTorch ops and their autograd.

torch.compile does not look into ``torch.ops.gatematch.lstm_*``. They run on CUDA, and on the CPU where Triton
interprets its kernels. Second derivatives go through the reference. See layer.py for what is computed and
for the shapes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad

from gatematch.kernels import lstm_step
from gatematch.kernels.autograd import Grads, differentiable, fake_gradients, or_empty

from . import layer
from .reference import lstm_cell_reference, lstm_reference

Lengths = Tensor | None


@custom_op("gatematch::lstm_layer", mutates_args=())
def layer_op(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    lengths: Lengths,
    weights: list[Tensor],
    projected: bool,
    impl: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n and, if `save`, cells, gates and, with a projection, m; empty ones else."""
    *results, cells, gates, m = layer.forward(x, h_0, c_0, lengths, weights, projected, impl, save)
    y, h_n, c_n = results
    return y, h_n, c_n, or_empty(cells, x, torch.float32), or_empty(gates, x), or_empty(m, x)


@layer_op.register_fake
def _(x: Tensor, h_0: Tensor, c_0: Tensor, lengths: Lengths, weights: list[Tensor], *options: Any) -> Any:
    projected, _, save = options
    N = len(h_0)
    T, B, _, H = layer.sizes(x, weights)
    results = x.new_empty(T, B, N * h_0.shape[2]), x.new_empty(h_0.shape), x.new_empty(c_0.shape)
    cells = gates = m = None
    if save:
        cells, gates = x.new_empty(N, T, B, H, dtype=torch.float32), x.new_empty(N, T, B, 4 * H)
        m = x.new_empty(T, B, N * H) if projected else None
    return *results, or_empty(cells, x, torch.float32), or_empty(gates, x), or_empty(m, x)


@custom_op("gatematch::lstm_layer_backward", mutates_args=())
def layer_backward_op(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    lengths: Lengths,
    weights: list[Tensor],
    y: Tensor,
    cells: Tensor,
    gates: Tensor,
    m: Tensor,
    g_y: Tensor | None,
    g_h_n: Tensor | None,
    g_c_n: Tensor | None,
    g_cells: Tensor | None,
    projected: bool,
    impl: str,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of x, h_0, c_0 and the weights, empty where not wanted."""
    upstream = g_y, g_h_n, g_c_n, g_cells
    saved = y, cells, gates, m if projected else None
    grads = layer.backward(x, h_0, c_0, lengths, weights, *saved, *upstream, projected, impl, wanted)
    return [or_empty(grad, x) for grad in grads]


@layer_backward_op.register_fake
def _(
    x: Tensor, h_0: Tensor, c_0: Tensor, lengths: Lengths, weights: list[Tensor], *others: Any
) -> list[Tensor]:
    return list(fake_gradients((x, h_0, c_0, *weights), others[-1]))


def _distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same; under torch.compile as views, since it refuses one tensor (a tied weight) in two places."""
    return tuple(tensor.view_as(tensor) for tensor in tensors) if torch.compiler.is_compiling() else tensors


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
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, h_0, c_0, *weights)):
        x, h_0, c_0, *weights = _distinct(x, h_0, c_0, *weights)
        y, h_n, c_n, cells = LSTMLayer.apply(projected, impl, x, h_0, c_0, lengths, *weights)
    else:
        y, h_n, c_n, cells, *_ = layer_op(x, h_0, c_0, lengths, weights, projected, impl, with_cells)
    if not with_cells:
        return y, h_n, c_n, None
    # A copy always: the backward pass needs cells as they are.
    c = cells[..., : c_0.shape[2]].permute(1, 2, 0, 3)
    return y, h_n, c_n, c.to(x.dtype, copy=True, memory_format=torch.contiguous_format).flatten(2)


def _reference(x: Tensor, h_0: Tensor, c_0: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`layer_op`'s results from lstm_reference; last come lengths and whether there is a projection."""
    *weights, lengths, projected = others
    N = len(h_0)
    kinds = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"][: len(weights) // N - projected]
    kinds += ["weight_hr"] * projected
    names = [f"{kind}_l0{suffix}" for suffix in ("", "_reverse")[:N] for kind in kinds]
    params = dict(zip(names, weights, strict=True))
    y, (h_n, c_n), cells = lstm_reference(x, params, (h_0, c_0), lengths=lengths)
    filled = pad(cells.unflatten(2, (N, -1)), (0, -c_0.shape[2] % layer.MULTIPLE))
    return y, h_n, c_n, filled.permute(2, 0, 1, 3).float()


class LSTMLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: bool,
        impl: str,
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        lengths: Lengths,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, h_n, c_n, cells, gates, m = layer_op(x, h_0, c_0, lengths, list(weights), projected, impl, True)
        ctx.projected, ctx.impl = projected, impl
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h_0, c_0, lengths, y, cells, gates, m, *weights)
        return y, h_n, c_n, cells

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Grads:
        x, h_0, c_0, lengths, y, cells, gates, m, *weights = ctx.saved_tensors
        inputs = (x, h_0, c_0, *weights)
        wanted = [ctx.needs_input_grad[place] for place in (2, 3, 4, *range(6, 6 + len(weights)))]
        found: Any
        if all(g is None for g in upstream):
            found = [None] * len(inputs)
        elif torch.is_grad_enabled():
            found = differentiable(_reference, inputs, upstream, lengths, ctx.projected)
        else:
            saved = (y, cells, gates, m)
            found = layer_backward_op(
                x, h_0, c_0, lengths, weights, *saved, *upstream, ctx.projected, ctx.impl, wanted
            )
        dx, dh_0, dc_0, *d_weights = (
            grad if want else None for grad, want in zip(found, wanted, strict=True)
        )
        return None, None, dx, dh_0, dc_0, None, *d_weights


@custom_op("gatematch::lstm_cell", mutates_args=())
def cell_op(
    x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The next h and c and, if `save`, the gates, an empty tensor else."""
    x, h, c, *weights = (tensor.contiguous() for tensor in (x, h, c, *weights))
    weight_ih, weight_hh, *biases = weights
    bias_ih, bias_hh = biases or (None, None)
    h_next, c_next, gates = lstm_step.cell_forward(
        x, weight_ih, weight_hh, bias_ih, bias_hh, h, c, precision=layer.precision(), save=save
    )
    return h_next, c_next, or_empty(gates, x)


@cell_op.register_fake
def _(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], save: bool) -> tuple[Tensor, Tensor, Tensor]:
    gates = x.new_empty(x.shape[0], 4 * c.shape[1]) if save else x.new_empty(0)
    return x.new_empty(h.shape), x.new_empty(c.shape), gates


@custom_op("gatematch::lstm_cell_backward", mutates_args=())
def cell_backward_op(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: list[Tensor],
    gates: Tensor,
    g_h: Tensor | None,
    g_c: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of x, h, c and the weights, empty where not wanted."""
    g_h = torch.zeros_like(h) if g_h is None else g_h
    g_c = torch.zeros_like(c) if g_c is None else g_c
    dz, dc = lstm_step.cell_gradient(gates, c.contiguous(), g_h.contiguous(), g_c.contiguous())
    with layer.products(x):
        grads = [
            dz @ weights[0] if wanted[0] else None,
            dz @ weights[1] if wanted[1] else None,
            dc,
            dz.T @ x if wanted[3] else None,
            dz.T @ h if wanted[4] else None,
        ]
        if len(weights) == 4:
            bias = dz.sum(0) if any(wanted[5:]) else None
            grads += [bias, None if bias is None else bias.clone()]
    return [or_empty(grad if want else None, x) for grad, want in zip(grads, wanted, strict=True)]


@cell_backward_op.register_fake
def _(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], *others: Any) -> list[Tensor]:
    return list(fake_gradients((x, h, c, *weights), others[-1]))


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The next h and c of x (B, I), h and c (B, H)."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, h, c, *weights)):
        h, c = LSTMCell.apply(*_distinct(x, h, c, *weights))
    else:
        h, c, _ = cell_op(x, h, c, weights, False)
    return h, c


class LSTMCell(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        h_next, c_next, gates = cell_op(x, h, c, list(weights), True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, c, gates, *weights)
        return h_next, c_next

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Grads:
        x, h, c, gates, *weights = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad)
        found: Any
        if all(g is None for g in upstream):
            return (None,) * len(wanted)
        if torch.is_grad_enabled():
            found = differentiable(
                lambda x, h, c, *weights: lstm_cell_reference(x, (h, c), *weights),
                (x, h, c, *weights),
                upstream,
            )
        else:
            found = cell_backward_op(x, h, c, weights, gates, *upstream, wanted)
        return tuple(grad if want else None for grad, want in zip(found, wanted, strict=True))
