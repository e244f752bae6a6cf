"""The layers of an LSTM by the ops, one after the other, and a step of the cell.

Layers do not overlap in time. A wavefront, in which a layer starts while the one below it still runs, would
need the input product of the upper layer inside the kernel, step by step, and both layers' weights on the
chip: docs/design/roofline.md says where that is predicted to pay.

Under autocast all that is returned is in its dtype, as what torch returns on CUDA.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gatematch.ops import no_autocast
from gatematch.torch_private import bypasses_dispatcher

from . import ops
from .checks import Spec, State
from .reference import drop

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
    """y, h_n, c_n and, with `return_cells`, the last layer's c; x (T, B, I)."""
    x, h_0, c_0, *weights = _cast(x, *hx, *weights)
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
    )
    with no_autocast(x):
        for layer in range(spec.num_layers):
            if layer > 0:
                x = drop(x, dropout, training, packed_rows)
            states = slice(layer * N, (layer + 1) * N)
            own = weights[layer * size : (layer + 1) * size]
            if by_cell:
                x, h, c = _single_step(x, h_0[states], c_0[states], own)
            else:
                with_cells = return_cells and layer == spec.num_layers - 1
                call = (x, h_0[states], c_0[states], lengths, own, spec.proj_size > 0, impl, with_cells)
                x, h, c, cells, *_ = ops.layer(*call)
            h_n.append(h)
            c_n.append(c)
        if not return_cells:
            cells = None
        else:  # (T, B, N·H), a copy always: the backward pass needs cells as they are
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
    if x.shape[time] != 1 or impl not in _BY_CELL:
        return None
    if spec.num_layers > 1 or spec.bidirectional or spec.proj_size:
        return None
    tensors = (x, *weights) if hx is None else (x, *hx, *weights)
    recorded = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])
    if recorded or torch.is_autocast_enabled(x.device.type) or not bypasses_dispatcher(tensors):
        return None
    y, h_n, c_n = ops.single_step(x.squeeze(time), hx, weights)
    return y.unsqueeze(time), (h_n, c_n)


def _single_step(x: Tensor, h_0: Tensor, c_0: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n and c_n of a layer whose x (1, B, I) has one step: its directions differ in their weights alone,
    and the kernel of a cell takes in x W_ihᵀ and the biases."""
    N = len(h_0)
    size = len(weights) // N
    steps = [ops.cell(x[0], h_0[d], c_0[d], weights[d * size : (d + 1) * size])[:2] for d in range(N)]
    h_n = torch.stack([h for h, _ in steps])  # a copy: y and h_n do not share memory
    if N == 1:
        return steps[0][0].unsqueeze(0), h_n, steps[0][1].unsqueeze(0)
    return torch.cat([h for h, _ in steps], 1).unsqueeze(0), h_n, torch.stack([c for _, c in steps])


def cell(x: Tensor, hx: State, weights: Sequence[Tensor]) -> State:
    """The next h and c; x (B, I)."""
    x, h, c, *weights = _cast(x, *hx, *weights)
    with no_autocast(x):
        h, c, _ = ops.cell(x, h, c, weights)
    return h, c


def _cast(*tensors: Tensor) -> list[Tensor]:
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
