"""The layers of an LSTM by the ops, one after the other, and a step of the cell.

Layers do not overlap in time. A wavefront, in which a layer starts while the one below it still runs, would
need the input product of the upper layer inside the kernel, step by step, and both layers' weights on the
chip: docs/design/roofline.md says where that is predicted to pay.

Under autocast all that is returned is in its dtype, as what torch returns on CUDA.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gatematch.kernels.autograd import no_autocast

from . import autograd
from .checks import Spec, State
from .reference import drop


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
    with no_autocast(x):
        for layer in range(spec.num_layers):
            if layer > 0:
                x = drop(x, dropout, training, packed_rows)
            states = slice(layer * N, (layer + 1) * N)
            x, h, c, cells = autograd.lstm_layer(
                x,
                h_0[states],
                c_0[states],
                lengths,
                weights[layer * size : (layer + 1) * size],
                spec.proj_size > 0,
                impl,
                return_cells and layer == spec.num_layers - 1,
            )
            h_n.append(h)
            c_n.append(c)
        return x, torch.cat(h_n), torch.cat(c_n), cells


def cell(x: Tensor, hx: State, weights: Sequence[Tensor]) -> State:
    """The next h and c; x (B, I)."""
    x, h, c, *weights = _cast(x, *hx, *weights)
    with no_autocast(x):
        return autograd.lstm_cell(x, h, c, weights)


def _cast(*tensors: Tensor) -> list[Tensor]:
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
