"""A layer of the LSTM, forward and backward, and a step of the cell by the kernels, as PyTorch ops.

torch.compile does not look into ``torch.ops.gatematch.lstm_*``. A layer with `impl` "torch" is torch's own
fused op, on any device; all else are the kernels, on CUDA, or on the CPU where Triton interprets them. The
ops know no derivatives: autograd.py does. See layer.py for what is computed and for the shapes.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from gatematch.kernels.autograd import (
    called_directly,
    fake_gradients,
    no_autocast,
    or_empty,
    refuse_forward_mode,
    refuse_tangents,
)
from gatematch.kernels.launch import HIDDEN_MULTIPLE

from . import fused

Lengths = Tensor | None


@functools.cache
def _kernels() -> Any:
    """What computes a layer, and a step. Triton is needed only now."""
    from gatematch.kernels import lstm_step

    from . import layer

    return layer, lstm_step


def _layer(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    lengths: Lengths,
    weights: list[Tensor],
    projected: bool,
    impl: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n and, if `save`, cells; the kernels also gates and, projected, m; empty ones else."""
    refuse_forward_mode()
    gates = m = None
    if impl == "torch":
        with no_autocast(x):
            y, h_n, c_n, cells = fused.layer(x, h_0, c_0, lengths, weights, projected, save)
    else:
        call = (x, h_0, c_0, lengths, weights, projected, impl, save)
        y, h_n, c_n, cells, gates, m = _kernels()[0].forward(*call)
    return y, h_n, c_n, or_empty(cells, x, fused.state_dtype(x)), or_empty(gates, x), or_empty(m, x)


layer_op = custom_op("gatematch::lstm_layer", _layer, mutates_args=())


@layer_op.register_fake
def _(x: Tensor, h_0: Tensor, c_0: Tensor, lengths: Lengths, weights: list[Tensor], *options: Any) -> Any:
    projected, impl, save = options
    N, H = len(h_0), c_0.shape[2] + -c_0.shape[2] % HIDDEN_MULTIPLE
    T, B, _ = x.shape
    results = x.new_empty(T, B, N * h_0.shape[2]), x.new_empty(h_0.shape), x.new_empty(c_0.shape)
    dtype = fused.state_dtype(x)
    cells = x.new_empty(N, T, B, H, dtype=dtype) if save else None
    gates = x.new_empty(N, T, B, 4 * H) if save and impl != "torch" else None
    m = x.new_empty(T, B, N * H) if gates is not None and projected else None
    return *results, or_empty(cells, x, dtype), or_empty(gates, x), or_empty(m, x)


def _layer_backward(
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
    refuse_tangents(*upstream)
    if impl == "torch":
        grads = fused.layer_gradient(x, h_0, c_0, lengths, weights, upstream, projected, wanted)
    else:
        saved = y, cells, gates, m if projected else None
        call = (x, h_0, c_0, lengths, weights, *saved, *upstream, projected, impl, wanted)
        grads = _kernels()[0].backward(*call)
    return [or_empty(grad, x) for grad in grads]


layer_backward_op = custom_op("gatematch::lstm_layer_backward", _layer_backward, mutates_args=())


@layer_backward_op.register_fake
def _(
    x: Tensor, h_0: Tensor, c_0: Tensor, lengths: Lengths, weights: list[Tensor], *others: Any
) -> list[Tensor]:
    return list(fake_gradients((x, h_0, c_0, *weights), others[-1]))


def _cell(
    x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The next h and c and, if `save`, the gates, an empty tensor else."""
    refuse_forward_mode()
    layer, lstm_step = _kernels()
    x, h, c, *weights = (tensor.contiguous() for tensor in (x, h, c, *weights))
    weight_ih, weight_hh, *biases = weights
    bias_ih, bias_hh = biases or (None, None)
    h_next, c_next, gates = lstm_step.cell_forward(
        x, weight_ih, weight_hh, bias_ih, bias_hh, h, c, precision=layer.precision(), save=save
    )
    return h_next, c_next, or_empty(gates, x)


def single_step(
    x: Tensor, hx: tuple[Tensor, Tensor] | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, H), h_n and c_n (1, B, H) of a layer's only step, in one launch; x (B, I). No op: for a call of
    which nobody has to be told."""
    layer, lstm_step = _kernels()
    x, weight_ih, weight_hh, *biases = (tensor.contiguous() for tensor in (x, *weights))
    bias_ih, bias_hh = biases or (None, None)
    h, c = (None, None) if hx is None else (hx[0].contiguous(), hx[1].contiguous())
    h_n = x.new_empty(1, x.shape[0], weight_hh.shape[1])  # y and h_n do not share memory
    y, c_n, _ = lstm_step.cell_forward(
        x, weight_ih, weight_hh, bias_ih, bias_hh, h, c, precision=layer.precision(), save=False, h_n=h_n
    )
    return y, h_n, c_n.unsqueeze(0)


cell_op = custom_op("gatematch::lstm_cell", _cell, mutates_args=())


@cell_op.register_fake
def _(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], save: bool) -> tuple[Tensor, Tensor, Tensor]:
    gates = x.new_empty(x.shape[0], 4 * c.shape[1]) if save else x.new_empty(0)
    return x.new_empty(h.shape), x.new_empty(c.shape), gates


def _cell_backward(
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
    layer, lstm_step = _kernels()
    refuse_tangents(g_h, g_c)
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


cell_backward_op = custom_op("gatematch::lstm_cell_backward", _cell_backward, mutates_args=())


@cell_backward_op.register_fake
def _(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], *others: Any) -> list[Tensor]:
    return list(fake_gradients((x, h, c, *weights), others[-1]))


def layer(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    lengths: Lengths,
    weights: list[Tensor],
    projected: bool,
    impl: str,
    save: bool,
) -> tuple[Tensor, ...]:
    """`layer_op`, or what it calls."""
    direct = impl != "torch" and called_directly(x, h_0, c_0, lengths, *weights)
    return (_layer if direct else layer_op)(x, h_0, c_0, lengths, weights, projected, impl, save)


def layer_backward(*args: Any) -> list[Tensor]:
    """`layer_backward_op`, or what it calls."""
    x, h_0, c_0, lengths, weights, *others = args
    direct = others[-2] != "torch" and called_directly(x, h_0, c_0, lengths, *weights, *others[:8])
    return (_layer_backward if direct else layer_backward_op)(*args)


def cell(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`cell_op`, or what it calls."""
    return (_cell if called_directly(x, h, c, *weights) else cell_op)(x, h, c, weights, save)


def cell_backward(*args: Any) -> list[Tensor]:
    """`cell_backward_op`, or what it calls."""
    x, h, c, weights, *saved, _ = args
    direct = called_directly(x, h, c, *weights, *saved)
    return (_cell_backward if direct else cell_backward_op)(*args)
