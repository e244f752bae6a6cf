"""The two differentiations behind every product with a Hessian.

H v is the gradient of gᵀv, where g is the gradient of the loss with its graph: reverse mode over reverse
mode, at the cost of a few gradients and without a matrix (Pearlmutter, "Fast exact multiplication by the
Hessian", Neural Computation 6(1), 1994).
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from gatematch.checks import check_dtype, check_kind, check_tensor

from .parameters import Parameters

LossFn = Callable[[], Tensor]


def check_loss_fn(loss_fn: LossFn) -> None:
    hint = "; wrap what computes it in a function" if isinstance(loss_fn, Tensor) else ""
    check_kind("loss_fn", loss_fn, Callable, "a function without arguments", hint)


def gradient(loss_fn: LossFn, parameters: Parameters) -> list[Tensor | None]:
    """The loss's gradient by each parameter, with its graph where it has one; None where it is constant 0."""
    with torch.inference_mode(False), torch.enable_grad():
        loss = loss_fn()
        check_tensor("loss_fn()", loss)
        if loss.numel() != 1:
            raise ValueError(f"loss_fn(): expected a scalar, got shape {tuple(loss.shape)}")
        check_dtype("loss_fn()", loss.dtype)
        if not loss.requires_grad:
            _check_unused(parameters, parameters.index)
            return [None] * len(parameters.tensors)
        one = torch.ones_like(loss, requires_grad=True)
        gradients = torch.autograd.grad(loss, parameters.tensors, one, create_graph=True, allow_unused=True)
        if len(gradients) > sum(g is not None for g in gradients):
            _check_reentrant(loss)
        found = {name: g for name, g in zip(parameters.index, gradients, strict=True) if g is not None}
        _check_unused(parameters, parameters.index.keys() - found.keys())
        for name, g in found.items():
            if g.layout != torch.strided:
                raise ValueError(f"params[{name!r}]: expected a dense gradient, got layout {g.layout}")
        _check_graph(found, one)
    return list(gradients)


def warn_if_constant(gradients: Sequence[Tensor | None]) -> None:
    """Warn of a loss that depends on none of the parameters, as from the caller of the function that asks."""
    if all(g is None for g in gradients):
        warnings.warn(
            "loss_fn: expected a loss that depends on params, got one that depends on none of them; "
            "its Hessian is zero",
            stacklevel=3,
        )


def _check_unused(parameters: Parameters, names: Collection[str]) -> None:
    """Raise for a view or copy of a parameter: the loss reads the parameter, and by the view is constant."""
    for name, tensor in zip(parameters.index, parameters.tensors, strict=True):
        if name in names and not tensor.is_leaf:
            raise ValueError(
                f"params[{name!r}]: expected a tensor that loss_fn reads, got one that is computed from "
                "another and not read; pass that one, and take the rows and columns wanted"
            )


def _check_reentrant(loss: Tensor) -> None:
    """Raise for a checkpoint that hides what is computed inside it: parameters there look unused."""
    nodes, seen = [loss.grad_fn], {loss.grad_fn}
    while nodes:
        node = nodes.pop()
        if node is not None and node.name() == "CheckpointFunctionBackward":
            raise RuntimeError("loss_fn: expected checkpoints with use_reentrant=False, got one with True")
        new = {source for source, _ in node.next_functions} - seen if node is not None else set()
        seen |= new
        nodes += new


def _check_graph(gradients: Mapping[str, Tensor], one: Tensor) -> None:
    """Raise for operations whose backward pass has no derivative: torch takes what they give as constant.

    Gradients are linear in `one`, the gradient of the loss by itself: where a graph does not lead there, it
    was cut on the way.
    """
    nodes = [g.grad_fn for g in gradients.values() if g.grad_fn is not None]
    seen, users = set(nodes), defaultdict(list)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::Error":  # what once_differentiable puts there
            raise RuntimeError(
                "loss_fn: expected it to be twice differentiable, got an operation that is so only once"
            )
        for source, _ in node.next_functions:
            if source is not None:
                users[source].append(node)
                if source not in seen:
                    seen.add(source)
                    nodes.append(source)
    nodes = [torch.autograd.graph.get_gradient_edge(one).node]
    linear = set(nodes)
    while nodes:
        new = set(users[nodes.pop()]) - linear
        linear |= new
        nodes += new
    for name, g in gradients.items():
        if g is not one and g.grad_fn not in linear and g.any():
            raise RuntimeError(
                f"loss_fn: expected it to be twice differentiable, got a gradient by {name!r} through an "
                "operation whose backward pass has no derivative"
            )


def pull_back(
    gradients: Sequence[Tensor | None],
    vectors: Sequence[Tensor],
    inputs: Sequence[Tensor],
    batched: bool = False,
) -> list[Tensor | None]:
    """The gradients by `inputs` of the sum of gradients · vectors; None where that is constant.

    Args:
        gradients: as `gradient` returns them, or some of those.
        vectors: one for each, in its shape; (N, *shape) if `batched`, as are then the results.
    """
    pairs = [
        (g, v.to(g.dtype))
        for g, v in zip(gradients, vectors, strict=True)
        if g is not None and g.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    outputs, upstream = zip(*pairs, strict=True)
    with torch.inference_mode(False):
        # The graph may be the caller's, or be used again: it goes with its last reference.
        return list(
            torch.autograd.grad(
                outputs, inputs, upstream, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
        )


def product(gradients: Sequence[Tensor | None], parameters: Parameters, vector: Tensor) -> Tensor:
    """H v for a vector (P,), in its dtype."""
    rows = pull_back(gradients, parameters.split(vector), parameters.tensors)
    flat = vector.new_zeros(parameters.size)
    for row, own in zip(rows, parameters.index.values(), strict=True):
        if row is not None:
            flat[own] = row.reshape(-1)
    return flat
