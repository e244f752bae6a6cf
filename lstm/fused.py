"""Runs torch's fused LSTM, packing the batch when there are lengths, and runs single layers for ops.py.

Shapes: x (T, B, I), h_0 (N, B, P or H), c_0 (N, B, H), y (T, B, N·P or N·H), cells (N, T, B, H) with H
filled up as in layer.py; N directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gatematch.kernels.launch import HIDDEN_MULTIPLE
from gatematch.ops import no_autocast
from gatematch.torch_private import autograd_inside_op

from .reference import lstm_reference, scatter_rows
from .spec import State

# has_biases, num_layers, dropout, train, bidirectional
Options = tuple[bool, int, float, bool, bool]


def state_dtype(x: Tensor) -> torch.dtype:
    """That of the cell states that a layer saves."""
    return torch.promote_types(x.dtype, torch.float32)


class Packing(NamedTuple):
    """Where the steps of a padded x stand in the packed one; all on the CPU."""

    order: Tensor  # the rows that have a step, longest first
    batch_sizes: Tensor  # how many of them reach each step
    t: Tensor  # (sum of lengths,) step and
    b: Tensor  # row of each step, in the packed order

    @classmethod
    def of(cls, lengths: Tensor, T: int) -> Packing:
        """The only read of the lengths, since on CUDA each one waits."""
        descending, order = torch.sort(lengths.cpu().to(torch.int64).clamp(0, T), descending=True)
        valid = torch.arange(T, device="cpu")[:, None] < descending
        batch_sizes = valid.sum(1)
        t, place = valid.nonzero(as_tuple=True)
        return cls(order[descending > 0], batch_sizes[batch_sizes > 0], t, order[place])

    def rows(self, shape: torch.Size, batch_first: bool) -> Tensor:
        """The places in x.flatten(0, 1) of the packed steps."""
        return self.b * shape[1] + self.t if batch_first else self.t * shape[1] + self.b


def with_lengths(
    x: Tensor, weights: list[Tensor], hx: State, packing: Packing, batch_first: bool, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n, c_n: rows sorted by length and packed, without those of length 0, and the results put back."""
    index, order = packing.rows(x.shape, batch_first).to(x.device), packing.order.to(x.device)
    h_0, c_0 = hx
    hx = (h_0.index_select(1, order), c_0.index_select(1, order))
    data = x.flatten(0, 1).index_select(0, index)
    y, h_n, c_n = torch.lstm(data, packing.batch_sizes, hx, weights, *options)
    y = scatter_rows(y, index, x.shape[:2])
    return y, h_0.to(h_n.dtype).index_copy(1, order, h_n), c_0.to(c_n.dtype).index_copy(1, order, c_n)


def reference_layer(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    lengths: Tensor | None,
    weights: Sequence[Tensor],
    projected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n and cells of one layer by lstm_reference."""
    N = len(h_0)
    kinds = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"][: len(weights) // N - projected]
    kinds += ["weight_hr"] * projected
    names = [f"{kind}_l0{suffix}" for suffix in ("", "_reverse")[:N] for kind in kinds]
    params = dict(zip(names, weights, strict=True))
    y, (h_n, c_n), cells = lstm_reference(x, params, (h_0, c_0), lengths=lengths)
    filled = pad(cells.unflatten(2, (N, -1)), (0, -c_0.shape[2] % HIDDEN_MULTIPLE))
    return y, h_n, c_n, filled.permute(2, 0, 1, 3).to(state_dtype(x)).contiguous()


def layer(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    lengths: Tensor | None,
    weights: Sequence[Tensor],
    projected: bool,
    with_cells: bool,
    train: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, h_n, c_n and, if asked for, cells, which the fused op does not give and the reference does."""
    packing = None if lengths is None else Packing.of(lengths, len(x))
    if with_cells or (packing is not None and len(packing.order) == 0):
        *results, cells = reference_layer(x, h_0, c_0, lengths, weights, projected)
        return *results, cells if with_cells else None  # type: ignore[return-value]
    N = len(h_0)
    options = (len(weights) // N - projected == 4, 1, 0.0, train, N == 2)
    if packing is None:
        return *torch.lstm(x, (h_0, c_0), list(weights), *options, False), None
    return *with_lengths(x, list(weights), (h_0, c_0), packing, False, options), None


def layer_gradient(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    lengths: Tensor | None,
    weights: list[Tensor],
    upstream: Sequence[Tensor | None],
    projected: bool,
    wanted: list[bool],
) -> list[Tensor | None]:
    """Gradients of x, h_0, c_0 and the weights, None where not wanted; the layer is computed once more.

    What torch's op saves for its own backward pass has no shape that a compiler could know before.
    """
    with autograd_inside_op(), no_autocast(x):
        inputs = [
            tensor.detach().requires_grad_(want)
            for tensor, want in zip((x, h_0, c_0, *weights), wanted, strict=True)
        ]
        x, h_0, c_0, *weights = inputs
        results = layer(x, h_0, c_0, lengths, weights, projected, upstream[3] is not None, train=x.is_cuda)
        pairs = [
            (y, g)
            for y, g in zip(results, upstream, strict=True)
            if g is not None and y is not None and y.requires_grad
        ]
        chosen = [tensor for tensor in inputs if tensor.requires_grad]
        grads: Any = map(torch.zeros_like, chosen)
        if pairs:
            ys, gs = zip(*pairs, strict=True)
            grads = torch.autograd.grad(ys, chosen, gs, materialize_grads=True)
    # An op must not return one tensor twice (that of both biases), nor one that it was given.
    seen = {x.untyped_storage().data_ptr() for x in upstream if x is not None}
    found = iter(_unshared(grad, seen) for grad in grads)
    return [next(found) if want else None for want in wanted]


def _unshared(x: Tensor, seen: set[int]) -> Tensor:
    storage = x.untyped_storage().data_ptr()
    if storage in seen:
        return x.clone()
    seen.add(storage)
    return x
