"""A backward pass that is itself to be differentiated, of what has kernels for first derivatives alone.

With ``create_graph=True`` it goes through the plain torch reference, so that every derivative exists;
without, it never pays for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Grads = tuple[Tensor | None, ...]


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
