"""What the ops of both halves share: results that are not there, and backward passes to be differentiated.

Such a one, with ``create_graph=True``, goes through the plain torch reference, so that every derivative
exists; without, none pays for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Grads = tuple[Tensor | None, ...]


def or_empty(tensor: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Ops return tensors, always: an empty one stands for None."""
    return like.new_empty(0, dtype=dtype) if tensor is None else tensor


def fake_gradients(inputs: Sequence[Tensor], wanted: Sequence[bool]) -> Any:
    """The shapes of what a backward op returns, a tuple."""
    return tuple(x.new_empty(x.shape if want else 0) for x, want in zip(inputs, wanted, strict=True))


def differentiable(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    *constants: Any,
) -> Grads:
    """Gradients of `function(*inputs, *constants)` w.r.t. the inputs that can be differentiated again.

    An upstream gradient of None is one of zeros; an input that needs no gradient gets None.
    """
    # Fresh aliases: one input may have been computed from another, and only the direct dependence counts.
    inputs = tuple(tensor.view_as(tensor) for tensor in inputs)
    with torch.autocast(inputs[0].device.type, enabled=False):  # as in the kernels
        outputs = function(*inputs, *constants)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        pairs = [(y, g) for y, g in zip(outputs, upstream, strict=True) if g is not None and y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, materialize_grads=True
        )
    grads = iter(found)
    return tuple(next(grads) if tensor.requires_grad else None for tensor in inputs)
