"""An op, declared once: its custom ops, fake tensors, autograd Functions and vmap come from one declaration.

An op is a pair of `torch.autograd.Function`s, forward and backward, around a pair of custom ops. The first
derivative is the backward op's. The second is that of the plain torch reference, computed only when it is
asked for (`second_derivative`). Under vmap the samples become rows of one larger batch (`vmapped`). What is
compiled or exported takes the custom op with its registered autograd, which leads to the same backward pass.

Forward-mode derivatives take the reference from the start (see plan.py): inside an op tangents would be
lost, and with a jvp rule of its own an autograd.Function gives zeros, without an error, for the jvp of a
jvp (torch 2.13).
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import GenericAlias
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from . import torch_private
from .torch_private import bypasses_dispatcher, forward_mode, has_tangent, transformed

Grads = tuple[Tensor | None, ...]
# The level of autograd.grad's own vmap, which is never nested. It cannot be asked for: only the thread that
# called autograd.grad counts levels, and backward passes on CUDA run in others.
_LEVEL = 1


class _Flat:
    """Argument names, and conversion between nested arguments and the flat ones of a Function.

    One argument may be a list of tensors, whose elements a Function takes last.
    """

    def __init__(self, names: Iterable[str], listed: str | None) -> None:
        names = list(names)
        self.listed = listed if listed in names else None
        self.place = names.index(listed) if listed in names else None
        self.fixed = tuple(n for n in names if n != listed)

    def flat(self, args: Sequence[Any]) -> Sequence[Any]:
        if self.place is None:
            return args
        return *args[: self.place], *args[self.place + 1 :], *args[self.place]

    def nested(self, flat: Sequence[Any]) -> Sequence[Any]:
        if self.place is None:
            return flat
        F = len(self.fixed)
        return *flat[: self.place], list(flat[F:]), *flat[self.place : F]

    def dims(self, batch: Mapping[str, int], flat: Sequence[Any]) -> tuple[int | None, ...]:
        """The batch dimension of each, by name; elements of the list have none."""
        F = len(self.fixed)
        return *(batch.get(name) for name in self.fixed), *[None] * (len(flat) - F)


class Op:
    """A differentiable op, `torch.ops.gatematch.NAME`.

    Parameters are matched by their names. An argument or output that the backward pass needs is a parameter
    of `backward` under the same name; `g_NAME` is the gradient of the result NAME, None for zeros. Outputs
    after the results are what `forward` saves for the backward pass.

    Args:
        name: of the op, in the namespace `gatematch`.
        forward: from arguments, a tensor first, to the outputs. None stands for one that is left out; the op
            returns an empty tensor for it. A last parameter `save: bool`, if there is one, says whether
            there may be a backward pass.
        fake: the same for fake tensors.
        backward: from what it needs and, last, `wanted: list[bool]` to the gradients of `wrt`. Entries
            that are not wanted are ignored.
        reference: from arguments to the results, in plain torch, differentiable as often as one likes.
        outputs: the names of all outputs. The first `results` are returned to the caller, the others are only
            saved.
        wrt: the arguments that can be differentiated. A list of tensors, if there is one, comes last.
        batch: the batch dimension of each argument and output that has one.
        spared: takes the arguments that are no tensors, by name, and returns the names of outputs that the
            backward pass of such a call does not read. They are not saved; it gets empty tensors for them.
        products: from a tensor to the context in which the second derivative is computed.

    Annotations of `forward` and `backward` must be types, not strings: they give the custom ops' schemas.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Sequence[Tensor | None]],
        fake: Callable[..., Sequence[Tensor | None]],
        backward: Callable[..., Sequence[Tensor | None]],
        reference: Callable[..., Any],
        *,
        outputs: Sequence[str],
        results: int,
        wrt: Sequence[str],
        batch: Mapping[str, int],
        spared: Callable[..., Sequence[str]] = lambda **call: (),
        products: Callable[[Tensor], contextlib.AbstractContextManager[Any]],
    ) -> None:
        taken, needed = inspect.signature(forward), inspect.signature(backward)
        listed = next((n for n, p in taken.parameters.items() if p.annotation == list[Tensor]), None)
        self.saves = "save" in taken.parameters
        self.given = _Flat((n for n in taken.parameters if n != "save"), listed)
        self.needed = _Flat(needed.parameters, listed)
        self.tensors = {n for n, p in taken.parameters.items() if p.annotation in (Tensor, Tensor | None)}
        self.wrt = tuple(n for n in wrt if n != listed)
        self.wrt_places = tuple(self.given.fixed.index(n) for n in self.wrt)
        self.outputs, self.results = tuple(outputs), results
        self.upstream = tuple(f"g_{n}" for n in self.outputs[:results])
        self.batch = {**batch, **{f"g_{n}": dim for n, dim in batch.items()}}
        self.reference, self.spared, self.products = reference, spared, products
        options = inspect.signature(reference).parameters
        self.options = [n for n in options if n in self.needed.fixed and n not in self.wrt]

        def compute(*args: Any) -> tuple[Tensor, ...]:
            return tuple([args[0].new_empty(0) if y is None else y for y in forward(*args)])

        def dispatched(*args: Any) -> tuple[Tensor, ...]:
            # As only an exported program can be: who_computes takes the reference. Autograd has taken off the
            # tangents that there may be.
            if forward_mode():
                raise NotImplementedError(
                    "an op of gatematch has no forward-mode derivative; the functions and modules themselves "
                    "have one"
                )
            return compute(*args)

        def gradients(*args: Any) -> list[Tensor]:
            if forward_mode() and any(map(has_tangent, args)):
                raise NotImplementedError(
                    "a backward pass of gatematch has no forward-mode derivative; "
                    "call the function itself, too, where forward-mode derivatives are taken"
                )
            return list(_filled(args[0], only(backward(*args), args[-1])))

        def fake_gradients(*args: Any) -> list[Tensor]:
            named = dict(zip(needed.parameters, args, strict=True))
            inputs = [*(named[n] for n in self.wrt), *(named[listed] if listed else ())]
            return [x.new_empty(x.shape if want else 0) for x, want in zip(inputs, args[-1], strict=True)]

        returned = GenericAlias(tuple, (Tensor,) * len(outputs))
        _set_signature(dispatched, taken.replace(return_annotation=returned))
        _set_signature(gradients, needed.replace(return_annotation=list[Tensor]))
        self.compute, self.gradients = compute, gradients
        self.forward_op = custom_op(f"gatematch::{name}", dispatched, mutates_args=())
        self.forward_op.register_fake(lambda *args: _filled(args[0], fake(*args)))
        self.backward_op = custom_op(f"gatematch::{name}_backward", gradients, mutates_args=())
        self.backward_op.register_fake(fake_gradients)
        self.Forward, self.Backward = _functions(self)
        self._register_autograd()

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        """All outputs, empty where left out, for the arguments of `forward` in its order, without `save`."""
        k = self.given.place
        # `given.flat` written out: a call of it in every call of an op would show.
        flat = args if k is None else (*args[:k], *args[k + 1 :], *args[k])
        if torch_private.tracing():
            # No trace of a Function can be saved. A trace is compared with that of a call without gradients,
            # so this must not depend on whether they are wanted.
            return self.forward_op(*args, *[True] * self.saves)
        recorded = torch.is_grad_enabled() and (
            any([flat[n].requires_grad for n in self.wrt_places])
            or any([x.requires_grad for x in flat[len(self.given.fixed) :]])
        )
        if torch.compiler.is_compiling():  # Dynamo follows the registered autograd, but not these Functions
            return self.forward_op(*args, *[recorded] * self.saves)
        if recorded or torch_private.innermost_transform() is not None:
            return self.Forward.apply(*flat)
        compute = self.compute if bypasses_dispatcher(flat) else self.forward_op
        return compute(*args, *[False] * self.saves)

    def reference_of(self, others: Mapping[str, Any]) -> Callable[..., Any]:
        """The reference as a function of `wrt` and the list, flat; `others` are its other arguments."""

        def function(*inputs: Tensor) -> Any:
            named: dict[str, Any] = dict(zip(self.wrt, inputs, strict=False))
            if self.needed.listed is not None:
                named[self.needed.listed] = list(inputs[len(self.wrt) :])
            return self.reference(**named, **others)

        return function

    def _reference_gradients(self, wanted: Sequence[bool], args: Sequence[Any]) -> Grads:
        """`backward_pass` by the reference, which tangents pass through."""
        # What a pullback has kept may be of a transform that is over.
        args = [torch_private.unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in args]
        named = dict(zip(self.needed.fixed, args, strict=False))
        function = self.reference_of({n: named[n] for n in self.options})
        inputs = [*(named[n] for n in self.wrt), *args[len(named) :]]
        with self.products(args[0]):
            found = iter(pulled_back(function, inputs, [named[n] for n in self.upstream], wanted))
        return tuple(next(found) if want else None for want in wanted)

    def _register_autograd(self) -> None:
        """The derivative of what is compiled or exported."""

        def setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
            *args, save = inputs if self.saves else (*inputs, True)
            self.Forward.setup_context(ctx, tuple(self.given.flat(args)), output)
            ctx.complete = save or set(self.outputs[self.results :]) <= set(ctx.spared)

        def backward(ctx: Any, *grads: Tensor | None) -> Grads:
            if not ctx.complete:
                raise NotImplementedError(
                    "a program that was exported without gradients has no backward pass: export it where "
                    "gradients are enabled, with inputs or parameters that require them"
                )
            needs = ctx.needs_input_grad
            ctx.needs_input_grad = self.given.flat(needs[: len(needs) - self.saves])
            found = self.Forward.backward(ctx, *grads)
            return *self.given.nested(found), *[None] * self.saves

        self.forward_op.register_autograd(backward, setup_context=setup_context)

    def backward_named(self, **named: Any) -> Grads:
        """`backward_pass`, the backward op's arguments by name; for an op without a list of tensors."""
        return self.backward_pass(named["wanted"], [named[n] for n in self.needed.fixed])

    def backward_pass(self, wanted: tuple[bool, ...], args: Sequence[Any]) -> Grads:
        """The gradients that are wanted, of which derivatives may be taken in turn; None for the others.

        Args:
            args: those of the backward op, flat.
        """
        found: Any
        if batched(args):
            found = map_batched(self.Backward.apply, args)
        elif forward_mode() and (transformed() or any(map(has_tangent, args))):
            return self._reference_gradients(wanted, args)
        else:
            found = (self.Backward.apply if followed() else self.Backward.forward)(*args)
        return only(found, wanted)


def _functions(op: Op) -> tuple[type[Function], type[Function]]:
    """The autograd Functions around an op and around its backward op."""
    given, needed, W, U = op.given, op.needed, len(op.wrt), len(op.upstream)
    F, N = len(given.fixed), len(needed.fixed)
    # The forward pass keeps `tensors`, `outputs`, the list and `statics`; `order` is the backward op's.
    tensors = [n for n in given.fixed if n in op.tensors and n in needed.fixed]
    statics = [n for n in given.fixed if n not in op.tensors]
    outputs = [n for n in op.outputs if n in needed.fixed]
    kept = [given.fixed.index(n) for n in tensors], [op.outputs.index(n) for n in outputs]
    static = [given.fixed.index(n) for n in statics]
    pool = [*tensors, *outputs, *op.upstream, *statics, "wanted"]
    order = [pool.index(n) for n in needed.fixed]
    wrt = [given.fixed.index(n) for n in op.wrt]
    # The second derivative needs the inputs, their upstream gradients, and what else the reference takes.
    again = needed.fixed.index
    tensor_options = [n for n in op.options if n in op.tensors]
    static_options = [n for n in op.options if n not in op.tensors]
    variables = [again(n) for n in op.wrt], [again(n) for n in op.upstream]
    kept_again = [*variables[0], *variables[1], *(again(n) for n in tensor_options)]
    static_again = [again(n) for n in static_options]

    class Forward(Function):
        @staticmethod
        def forward(*flat: Any) -> tuple[Tensor, ...]:
            compute = op.compute if bypasses_dispatcher(flat) else op.forward_op
            return compute(*given.nested(flat), *[True] * op.saves)

        @staticmethod
        def setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
            ctx.set_materialize_grads(False)  # what is saved may be as large as the results
            ctx.left_out = [y.shape == (0,) for y in output[: op.results]]
            left_out = [y for out, y in zip(ctx.left_out, output, strict=False) if out]
            ctx.mark_non_differentiable(*left_out, *output[op.results :])
            ctx.statics = [inputs[k] for k in static]
            ctx.spared = op.spared(**dict(zip(statics, ctx.statics, strict=True)))
            saved = [None if n in ctx.spared else output[k] for n, k in zip(outputs, kept[1], strict=True)]
            ctx.save_for_backward(*[inputs[k] for k in kept[0]], *saved, *inputs[F:])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Grads:
            needs = ctx.needs_input_grad
            found: list[Tensor | None] = [None] * len(needs)
            upstream = [None if out else g for out, g in zip(ctx.left_out, grads, strict=False)]
            if all(g is None for g in upstream):
                return tuple(found)
            wanted = *[needs[k] for k in wrt], *needs[F:]
            saved, T = ctx.saved_tensors, len(tensors)
            values = saved[T : T + len(outputs)]
            values = [saved[0].new_empty(0) if y is None else y for y in values]
            named = [*saved[:T], *values, *upstream, *ctx.statics, wanted]
            args = [*[named[k] for k in order], *saved[T + len(outputs) :]]
            places = [*wrt, *range(F, len(needs))]
            for k, grad in zip(places, op.backward_pass(wanted, args), strict=True):
                found[k] = grad
            return tuple(found)

        @staticmethod
        def vmap(info: Any, in_dims: Sequence[Any], *flat: Any) -> Any:
            out_dims = [op.batch.get(n) for n in op.outputs]
            return vmapped(
                Forward.apply, info.batch_size, in_dims, flat, given.dims(op.batch, flat), out_dims
            )

    class Backward(Function):
        @staticmethod
        def forward(*flat: Any) -> tuple[Tensor, ...]:
            *args, wanted = needed.nested(flat)
            gradients = op.gradients if bypasses_dispatcher(flat) else op.backward_op
            return tuple(gradients(*args, list(wanted)))

        @staticmethod
        def setup_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
            # What the forward pass saved is a function of its inputs: the reference's derivative knows of it.
            ctx.wanted, ctx.statics = inputs[N - 1], [inputs[k] for k in static_again]
            ctx.save_for_backward(*[inputs[k] for k in kept_again], *inputs[N:])

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Grads:
            saved, O = ctx.saved_tensors, W + U + len(tensor_options)
            others = dict(zip(tensor_options, saved[W + U : O], strict=True))
            others |= zip(static_options, ctx.statics, strict=True)
            function = op.reference_of(others)
            needs = ctx.needs_input_grad
            places = [*variables[0], *range(N, len(needs)), *variables[1]]
            inputs, upstream = (*saved[:W], *saved[O:]), saved[W : W + U]
            with op.products(saved[0]):
                grads = second_derivative(
                    function, inputs, upstream, ctx.wanted, [needs[k] for k in places], cotangents
                )
            found: list[Tensor | None] = [None] * len(needs)
            for k, grad in zip(places, grads, strict=True):
                found[k] = grad
            return tuple(found)

        @staticmethod
        def vmap(info: Any, in_dims: Sequence[Any], *flat: Any) -> Any:
            wanted = flat[N - 1]
            out_dims = [*[op.batch[n] for n in op.wrt], *[None] * (len(wanted) - W)]
            # The gradient of what has no batch dimension is a sum over the batch.
            summed = any(wanted[W:])
            dims = needed.dims(op.batch, flat)
            return vmapped(Backward.apply, info.batch_size, in_dims, flat, dims, out_dims, summed)

    for function in (Forward, Backward):
        # `apply` asks for the signature in every call; to work it out takes as long as all the rest.
        _set_signature(function.forward, inspect.signature(function.forward))
    return Forward, Backward


def _set_signature(function: Any, signature: inspect.Signature) -> None:
    function.__signature__ = signature


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """For what has its dtypes already: a backward pass may be under another autocast than the forward one."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _filled(like: Tensor, values: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """Ops return tensors, always: an empty one stands for None."""
    return tuple([like.new_empty(0) if y is None else y for y in values])


def only(grads: Sequence[Tensor | None], wanted: Sequence[bool]) -> Grads:
    """The gradients that were wanted, None for the others."""
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


def batched(args: Iterable[Any]) -> bool:
    """Whether any of these is batched by ``autograd.grad(is_grads_batched=True)``."""
    return not torch.compiler.is_compiling() and any(
        [isinstance(x, Tensor) and torch_private.is_legacy_batched(x) for x in args]
    )


def map_batched(function: Callable[..., Sequence[Tensor]], args: Sequence[Any]) -> list[Tensor]:
    """A function of such batches, mapped over them by ``torch.func.vmap``.

    ``autograd.grad`` has a vmap of its own, which asks no Function for a rule; and above it autograd records
    nothing.
    """
    places = [place for place, x in enumerate(args) if batched([x])]
    batches = [torch_private.remove_legacy_batch_dim(args[place], _LEVEL, 0, 0) for place in places]
    found = torch.func.vmap(lambda *samples: tuple(function(*_replaced(args, places, samples))))(*batches)
    return [torch_private.add_legacy_batch_dim(y, 0, _LEVEL) for y in found]


def followed(*upstream: Tensor | None) -> bool:
    """Whether a backward pass is itself differentiated, or one of `upstream` is batched.

    Where it is differentiated the Function of the backward op takes over. It has no forward-mode derivative
    and raises; the op would give zeros.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or transformed() or forward_mode() or batched(upstream)


def pulled_back(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of those inputs of a function that are wanted; None upstream is a gradient of zeros."""
    places = [place for place, want in enumerate(wanted) if want]

    def outputs(*chosen: Tensor) -> tuple[Tensor, ...]:
        found = function(*_replaced(inputs, places, chosen))
        found = found if isinstance(found, tuple) else (found,)
        return tuple(y for y, g in zip(found, upstream, strict=True) if g is not None)

    pull = torch.func.vjp(outputs, *(inputs[place] for place in places))[1]
    grads: tuple[Tensor, ...] = pull(tuple(g for g in upstream if g is not None))
    return grads


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

    def gradients(*chosen: Tensor) -> tuple[Tensor, ...]:
        now = _replaced(variables, places, chosen)
        return pulled_back(function, now[:N], now[N:], wanted)

    def pulled(*cotangents: Tensor) -> Sequence[Tensor]:
        with no_autocast(inputs[0]):
            found: Sequence[Tensor] = torch.func.vjp(gradients, *(variables[k] for k in places))[1](
                cotangents
            )
        return found

    chosen = [one for one, want in zip(cotangents, wanted, strict=False) if want]
    found = map_batched(pulled, chosen) if batched(chosen) else pulled(*chosen)
    return tuple(_replaced([None] * len(variables), places, found))


def _replaced(values: Sequence[Any], places: Sequence[int], others: Sequence[Any]) -> list[Any]:
    values = list(values)
    for place, other in zip(places, others, strict=True):
        values[place] = other
    return values


# What a graph break leaves to eager mode, a compiler would look into again, and fails.
@torch_private.disable_dynamo
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
                x = x[0] if samples else x.new_empty(0)
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
