"""What the ops of both halves share to be differentiated and mapped: by autograd, by ``torch.func``, twice.

An op is a pair of `torch.autograd.Function`s, forward and backward, around a pair of custom ops. The forward
one returns what its backward pass needs as further outputs. The first derivative is the backward op's; the
second is that of the plain torch reference (`second_derivative`), computed only when it is asked for. Under
vmap the samples become rows of one larger batch (`vmapped`).

Forward-mode derivatives take the reference from the start (`forward_mode`): underneath an op tangents would
be lost, and with a rule of its own for them an autograd.Function gives zeros, without a word, for the
forward-mode derivative of a forward-mode derivative (torch 2.13).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

Grads = tuple[Tensor | None, ...]
# Of autograd.grad's own vmap, which is never inside another. Only the thread that called autograd.grad counts
# its levels, and backward passes on CUDA are in others.
_LEVEL = 1


def transformed() -> bool:
    """Whether ``torch.func`` is at work, outside of what is compiled."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def called_directly(*args: Any) -> bool:
    """Whether nobody has to be told of an op: no mode, no compiler, no subclass among the tensors.

    Then the function itself is called. On the way through the dispatcher a host takes longer than a GPU for a
    single step.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_tracing()
        and not transformed()
        and all(type(x) in (Tensor, Parameter) for x in args if isinstance(x, Tensor))
    )


def forward_mode() -> bool:
    """Whether there may be forward-mode derivatives, here or around."""
    return forward_ad._current_level >= 0


def compiles_transformed() -> bool:
    """Whether what is being compiled is under ``torch.func`` or in forward mode: ops may give zeros there."""
    return torch.compiler.is_compiling() and (forward_mode() or torch._C._are_functorch_transforms_active())


def may_be_differentiated(*inputs: Tensor) -> bool:
    """Whether an op is to be called by its Function: where there may be a backward pass, or a vmap.

    A program that is exported keeps the ops alone, which raise in a backward pass.
    """
    # Not is_exporting(), which Dynamo of torch 2.11 takes to be true under torch.compile too.
    if torch.compiler._is_exporting_flag:
        return False
    return transformed() or (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))


def refuse_forward_mode() -> None:
    """Raise in an op that is called in forward mode, as only an exported program can: it loses tangents."""
    if forward_mode():
        raise NotImplementedError(
            "an op of gatematch has no forward-mode derivative; the functions and modules themselves have one"
        )


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise for dual numbers: an op loses their tangents, where a backward pass was made without them."""
    if forward_mode() and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise NotImplementedError(
            "a backward pass of gatematch has no forward-mode derivative; "
            "call the function itself, too, where forward-mode derivatives are taken"
        )


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """For what has its dtypes already: a backward pass may be under another autocast than the forward one."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def or_empty(tensor: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Ops return tensors, always: an empty one stands for None."""
    return like.new_empty(0, dtype=dtype) if tensor is None else tensor


def fake_gradients(inputs: Sequence[Tensor], wanted: Sequence[bool]) -> Any:
    """The shapes of what a backward op returns, a tuple."""
    return tuple(x.new_empty(x.shape if want else 0) for x, want in zip(inputs, wanted, strict=True))


def only(grads: Sequence[Tensor | None], wanted: Sequence[bool]) -> Grads:
    """The gradients that were wanted, None for the others."""
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


def distinct(*tensors: Any) -> tuple[Any, ...]:
    """The same; under torch.compile as views, since it refuses one tensor (a tied weight) in two places."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in tensors)


def batched(*tensors: Any) -> bool:
    """Whether ``autograd.grad(is_grads_batched=True)`` brings any of these."""
    return not torch.compiler.is_compiling() and any(
        isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x) for x in tensors
    )


def map_batched(function: Callable[..., Sequence[Tensor]], args: Sequence[Any]) -> list[Tensor]:
    """A function of such batches, mapped over them by ``torch.func.vmap``.

    ``autograd.grad`` has a vmap of its own, which asks no Function for a rule; and above it autograd records
    nothing.
    """
    places = [place for place, x in enumerate(args) if batched(x)]
    batches = [torch._remove_batch_dim(args[place], _LEVEL, 0, 0) for place in places]
    found = torch.func.vmap(lambda *samples: tuple(function(*_replaced(args, places, samples))))(*batches)
    return [torch._add_batch_dim(y, 0, _LEVEL) for y in found]


def followed(*upstream: Tensor | None) -> bool:
    """Whether a backward pass is itself differentiated, or batched: for all that is given, or upstream.

    Where it is differentiated the Function of the backward op takes over. It has no forward-mode derivative
    and raises; the op would give zeros.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or transformed() or forward_mode() or batched(*upstream)


def backward_pass(
    function: type[torch.autograd.Function], args: Sequence[Any], wanted: Sequence[bool]
) -> Grads:
    """The gradients that are wanted of a backward op, which may be differentiated itself, or mapped.

    Args:
        function: the Function around the op.
        args: its arguments, `wanted` among them.
    """
    found: Any
    if batched(*args):
        found = map_batched(function.apply, args)
    else:
        found = (function.apply if followed() else function.forward)(*args)
    return only(found, wanted)


def second_derivative(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    wanted: Sequence[bool],
    needed: Sequence[bool],
    cotangents: Sequence[Tensor],
) -> Grads:
    """The derivative of a backward pass: of the sum of its gradients, each times its cotangent.

    Args:
        function: inputs to outputs, in plain torch.
        upstream: a gradient for each output; None is one of zeros.
        wanted: which inputs' gradients the backward pass returned.
        needed: which inputs, and after them which upstream gradients, to differentiate with respect to.
        cotangents: one for each input; those of inputs that were not wanted are not looked at.

    Returns:
        For each of inputs and upstream a gradient, None where not needed. Differentiable again.
    """
    N = len(inputs)
    variables = [*inputs, *upstream]
    places = [k for k, (x, need) in enumerate(zip(variables, needed, strict=True)) if need and x is not None]
    inner = [place for place, want in enumerate(wanted) if want]

    def gradients(*chosen: Tensor) -> tuple[Tensor, ...]:
        now = _replaced(variables, places, chosen)

        def outputs(*chosen: Tensor) -> tuple[Tensor, ...]:
            found = function(*_replaced(now[:N], inner, chosen))
            found = found if isinstance(found, tuple) else (found,)
            return tuple(y for y, g in zip(found, upstream, strict=True) if g is not None)

        pull = torch.func.vjp(outputs, *(now[place] for place in inner))[1]
        grads: tuple[Tensor, ...] = pull(tuple(g for g in now[N:] if g is not None))
        return grads

    def pulled(*cotangents: Tensor) -> Sequence[Tensor]:
        with no_autocast(inputs[0]):
            found: Sequence[Tensor] = torch.func.vjp(gradients, *(variables[k] for k in places))[1](
                cotangents
            )
        return found

    chosen = [cotangents[place] for place in inner]
    found = map_batched(pulled, chosen) if batched(*chosen) else pulled(*chosen)
    return tuple(_replaced([None] * len(variables), places, found))


def _replaced(values: Sequence[Any], places: Sequence[int], others: Sequence[Any]) -> list[Any]:
    values = list(values)
    for place, other in zip(places, others, strict=True):
        values[place] = other
    return values


# What a graph break leaves to eager mode, a compiler would look into again, and fails.
@torch._disable_dynamo
def vmapped(
    apply: Callable[..., tuple[Tensor, ...]],
    samples: int,
    in_dims: Sequence[Any],
    args: Sequence[Any],
    batch_in: Sequence[int | None],
    batch_out: Sequence[int | None],
    summed: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """What the vmap of a Function returns: its samples as rows of one batch, or a call for each of them.

    Args:
        in_dims, args: as in its `vmap`.
        batch_in, batch_out: the batch dimension of each argument and output, None for those without.
        summed: whether an output is a sum over the batch, so that every sample needs a call of its own.
    """
    in_dims = [dim if isinstance(x, Tensor) else None for x, dim in zip(args, in_dims, strict=True)]
    if summed or any(dim is not None and batch is None for dim, batch in zip(in_dims, batch_in, strict=True)):
        calls = [
            apply(*(x if dim is None else _sample(x, dim, k) for x, dim in zip(args, in_dims, strict=True)))
            for k in range(max(samples, 1))
        ]
        stacked = tuple(torch.stack(outputs)[:samples] for outputs in zip(*calls, strict=True))
        return stacked, (0,) * len(batch_out)
    rows, B = [], 0
    for x, dim, batch in zip(args, in_dims, batch_in, strict=True):
        if isinstance(x, Tensor) and batch is not None:
            x = x.expand(samples, *x.shape) if dim is None else x.movedim(dim, 0)
            # What is shorter stands for None.
            if x.dim() > batch + 1:
                x = x.movedim(0, batch)
                B = max(B, x.shape[batch + 1])
                x = x.flatten(batch, batch + 1)
            else:
                x = x[0]
            x = x.contiguous()
        rows.append(x)
    outputs: list[Tensor] = []
    out_dims: list[int | None] = []
    for y, batch in zip(apply(*rows), batch_out, strict=True):
        if batch is None or y.dim() <= batch or y.shape == (0,):
            outputs.append(y)
            out_dims.append(None)
        else:
            outputs.append(y.unflatten(batch, (samples, B)))
            out_dims.append(batch)
    return tuple(outputs), tuple(out_dims)


def _sample(x: Tensor, dim: int, k: int) -> Tensor:
    """One of them; zeros where there is none, for the shapes of what comes out."""
    return x.select(dim, k).contiguous() if x.shape[dim] else x.sum(dim)
