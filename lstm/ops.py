"""A layer of the LSTM, and a step of the cell by the kernels, as PyTorch ops ``torch.ops.gatematch.lstm_*``.

torch.compile does not look into them. A layer with `impl` "torch" is torch's own fused op, on any device; all
else are the kernels, on CUDA, or on the CPU where Triton interprets them. gatematch/ops.py makes
derivatives and vmap from what is declared here. layer.py says what is computed, and the shapes; fused.py
where `impl` is "torch".
"""

import functools
from typing import Any

import torch
from torch import Tensor

from gatematch.kernels.launch import HIDDEN_MULTIPLE
from gatematch.ops import Grads, Op, no_autocast

from . import fused
from .reference import lstm_cell_reference

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
