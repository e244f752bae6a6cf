"""The LSTM's layer and cell step as PyTorch ops ``torch.ops.gatematch.lstm_*``, and the stack of layers.

torch.compile does not look into the ops. `impl="torch"` runs torch's fused LSTM on any device; every other
`impl` runs the kernels, on CUDA, or on the CPU where Triton interprets them. core/ops.py makes derivatives
and vmap from what is declared here. Equations and shapes: layer.py for the kernels, fused.py for "torch".
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatematch.checks import autocast_dtype
from gatematch.kernels.launch import HIDDEN_MULTIPLE
from gatematch.ops import Grads, Op, no_autocast
from gatematch.torch_private import bypasses_dispatcher, tracing

from . import fused
from .reference import drop, lstm_cell_reference
from .spec import Spec, State

Lengths = Tensor | None
Outputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


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
    with_cells: bool,
    save: bool,
) -> Outputs:
    if impl == "torch":
        with no_autocast(x):
            return *fused.layer(x, h_0, c_0, lengths, weights, projected, with_cells), None, None
    return _kernels()[0].forward(x, h_0, c_0, lengths, weights, projected, impl, with_cells or save)


def _fake_layer(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    lengths: Lengths,
    weights: list[Tensor],
    projected: bool,
    impl: str,
    with_cells: bool,
    save: bool,
) -> Outputs:
    N, H = len(h_0), c_0.shape[2] + -c_0.shape[2] % HIDDEN_MULTIPLE
    T, B, _ = x.shape
    save = with_cells or (save and impl != "torch")
    cells = x.new_empty(N, T, B, H, dtype=fused.state_dtype(x)) if save else None
    gates = x.new_empty(N, T, B, 4 * H) if save and impl != "torch" else None
    m = x.new_empty(T, B, N * H) if gates is not None and projected else None
    y = x.new_empty(T, B, N * h_0.shape[2])
    return y, x.new_empty(h_0.shape), x.new_empty(c_0.shape), cells, gates, m


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
) -> Grads:
    upstream = g_y, g_h_n, g_c_n, g_cells
    if impl == "torch":
        return tuple(fused.layer_gradient(x, h_0, c_0, lengths, weights, upstream, projected, wanted))
    saved = y, cells, gates, m if projected else None
    call = (x, h_0, c_0, lengths, weights, *saved, *upstream, projected, impl, wanted)
    return tuple(_kernels()[0].backward(*call))


# y, h_n, c_n, and cells where `with_cells` asks for them or the kernels save them. The kernels also save
# gates and, with a projection, m.
layer = Op(
    "lstm_layer",
    _layer,
    _fake_layer,
    _layer_backward,
    fused.reference_layer,
    outputs=("y", "h_n", "c_n", "cells", "gates", "m"),
    results=4,
    wrt=("x", "h_0", "c_0", "weights"),
    batch={
        "lengths": 0,
        "cells": 2,
        "gates": 2,
        **dict.fromkeys(("x", "h_0", "c_0", "y", "h_n", "c_n", "m"), 1),
    },
    # torch's own op is computed once more.
    spared=lambda impl, **call: ("y", "cells", "gates", "m") if impl == "torch" else (),
    products=no_autocast,
)


def _cell(
    x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], save: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    layer, lstm_step = _kernels()
    x, h, c, *weights = (tensor.contiguous() for tensor in (x, h, c, *weights))
    weight_ih, weight_hh, *biases = weights
    bias_ih, bias_hh = biases or (None, None)
    call = (x, weight_ih, weight_hh, bias_ih, bias_hh, h, c)
    return lstm_step.cell_forward(*call, precision=layer.precision(), save=save)


def _fake_cell(
    x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], save: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    gates = x.new_empty(x.shape[0], 4 * c.shape[1]) if save else None
    return x.new_empty(h.shape), x.new_empty(c.shape), gates


def _cell_backward(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: list[Tensor],
    gates: Tensor,
    g_h_next: Tensor | None,
    g_c_next: Tensor | None,
    wanted: list[bool],
) -> Grads:
    layer, lstm_step = _kernels()
    g_h = torch.zeros_like(h) if g_h_next is None else g_h_next
    g_c = torch.zeros_like(c) if g_c_next is None else g_c_next
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
    return tuple(grads)


def _cell_reference(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    return lstm_cell_reference(x, (h, c), *weights)


cell = Op(
    "lstm_cell",
    _cell,
    _fake_cell,
    _cell_backward,
    _cell_reference,
    outputs=("h_next", "c_next", "gates"),
    results=2,
    wrt=("x", "h", "c", "weights"),
    batch=dict.fromkeys(("x", "h", "c", "h_next", "c_next", "gates"), 0),
    products=no_autocast,
)


# Whose single steps the kernel of a cell takes.
_BY_CELL = ("auto", "triton", "step")


def layers(
    x: Tensor,
    weights: list[Tensor],
    spec: Spec,
    hx: State,
    lengths: Tensor | None,
    dropout: float,
    training: bool,
    packed_rows: Tensor | None,
    return_cells: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, h_n, c_n and, with `return_cells`, the last layer's c; x (T, B, I).

    One layer after the other: a wavefront, in which a layer starts while the one below it still runs, would
    need the input product of the upper layer inside the kernel, and the weights of both on the chip. Under
    autocast all that is returned is in its dtype, as what torch returns on CUDA.
    """
    h_0, c_0 = hx
    if low := autocast_dtype(x):
        x, h_0, c_0, *weights = (tensor.to(low) for tensor in (x, h_0, c_0, *weights))
    x = x.contiguous()
    if lengths is not None:
        # Two types suffice, so that kernels are compiled for no more.
        wide = lengths.dtype in (torch.int64, torch.uint32, torch.uint64)
        lengths = lengths.to(x.device, torch.int64 if wide else torch.int32, non_blocking=True).contiguous()
        # Anything may stand past them, and products over all steps would take it in: 0 times NaN is NaN.
        x = x.masked_fill((torch.arange(x.shape[0], device=x.device)[:, None] >= lengths)[..., None], 0)
    N = 1 + spec.bidirectional
    size = len(weights) // spec.num_layers
    h_n, c_n = [], []
    cells = None
    by_cell = (
        impl in _BY_CELL and lengths is None and not (spec.proj_size or return_cells) and x.shape[0] == 1
    ) and not tracing()  # a trace would take one step of any sequence
    with no_autocast(x):
        for l in range(spec.num_layers):
            if l > 0:
                x = drop(x, dropout, training, packed_rows)
            states = slice(l * N, (l + 1) * N)
            own = weights[l * size : (l + 1) * size]
            if by_cell:
                x, h, c = _single_step(x, h_0[states], c_0[states], own)
            else:
                with_cells = return_cells and l == spec.num_layers - 1
                call = (x, h_0[states], c_0[states], lengths, own, spec.proj_size > 0, impl, with_cells)
                x, h, c, saved, *_ = layer(*call)
                cells = saved if with_cells else None
            h_n.append(h)
            c_n.append(c)
        if cells is not None:  # (T, B, N·H), a copy always: the backward pass needs cells as they are
            c = cells[..., : c_0.shape[2]].permute(1, 2, 0, 3)
            cells = c.to(x.dtype, copy=True, memory_format=torch.contiguous_format).flatten(2)
        if spec.num_layers == 1:
            return x, h_n[0], c_n[0], cells
        return x, torch.cat(h_n), torch.cat(c_n), cells


def single_step(
    x: Tensor, weights: list[Tensor], spec: Spec, hx: State | None, time: int, impl: str
) -> tuple[Tensor, State] | None:
    """y and the states of a layer that has one direction and one step, and of which no gradient is wanted, by
    one launch and nothing else; None if that is not the call. `time` is the dimension of x (T, B, I) or
    (B, T, I)."""
    if impl not in _BY_CELL or spec.num_layers > 1 or spec.bidirectional or spec.proj_size:
        return None
    tensors = (x, *weights) if hx is None else (x, *hx, *weights)
    recorded = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])
    if recorded or torch.is_autocast_enabled(x.device.type) or not bypasses_dispatcher(tensors):
        return None
    kernels, lstm_step = _kernels()
    x, weight_ih, weight_hh, *biases = [tensor.contiguous() for tensor in (x.squeeze(time), *weights)]
    bias_ih, bias_hh = biases or (None, None)
    h, c = (None, None) if hx is None else (hx[0].contiguous(), hx[1].contiguous())
    h_n = x.new_empty(1, x.shape[0], weight_hh.shape[1])  # y and h_n do not share memory
    call = (x, weight_ih, weight_hh, bias_ih, bias_hh, h, c)
    y, c_n, _ = lstm_step.cell_forward(*call, precision=kernels.precision(), save=False, h_n=h_n)
    return y.unsqueeze(time), (h_n, c_n.unsqueeze(0))


def _single_step(x: Tensor, h_0: Tensor, c_0: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n and c_n of a layer whose x (1, B, I) has one step: its directions differ in their weights alone,
    and the kernel of a cell takes in x W_ihᵀ and the biases."""
    N = len(h_0)
    size = len(weights) // N
    steps = [cell(x[0], h_0[d], c_0[d], weights[d * size : (d + 1) * size])[:2] for d in range(N)]
    h_n = torch.stack([h for h, _ in steps])  # a copy: y and h_n do not share memory
    if N == 1:
        return steps[0][0].unsqueeze(0), h_n, steps[0][1].unsqueeze(0)
    return torch.cat([h for h, _ in steps], 1).unsqueeze(0), h_n, torch.stack([c for _, c in steps])


def one_step(x: Tensor, hx: State, weights: Sequence[Tensor]) -> State:
    """The next h and c; x (B, I)."""
    h, c = hx
    if low := autocast_dtype(x):
        x, h, c, *weights = (tensor.to(low) for tensor in (x, h, c, *weights))
    with no_autocast(x):
        h, c, _ = cell(x, h, c, weights)
    return h, c
