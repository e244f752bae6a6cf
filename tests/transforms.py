"""Every op under every transform of torch: the transforms, and how a cell of their tables is judged.

A transform yields what it computes of an op and what that should be: the same op in plain torch, in float64,
differentiated by torch's autograd alone. Nothing to compare with is zero, so that a silent zero cannot pass.
docs/differentiation.md has the tables; GATEMATCH_WRITE_DOCS=1 makes a run of the tests write them.
"""

import copy
import io
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.func import grad as func_grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from transform_ops import Op

# --- an op at random inputs, and what is right there ---


class Case:
    """An op at random inputs, beside the same in plain torch at the same inputs in float64.

    `loss` is a scalar in which every result counts, to the second order too; v, u and g stand for any
    tangents of the inputs and gradients of the results. `right_*` is what is right.
    """

    def __init__(self, op: Op, dtype: torch.dtype) -> None:
        self.op, self.dtype = op, dtype
        self.inputs = self.random(True)
        self.lengths = tuple(torch.tensor(n) for n in op.lengths)
        self.v, self.u = self.random(False), self.random(False)
        results = self.plain(*self.exact_inputs)
        self.mix = [torch.randn_like(y) for y in results]
        self.g = tuple(torch.randn_like(y).to(dtype) for y in results)

    def random(self, equal: bool, shapes=None) -> tuple[Tensor, ...]:
        inputs = [torch.randn(*shape, dtype=self.dtype) for shape in shapes or self.op.shapes]
        inputs[self.op.data :] = [self.op.scale * weight for weight in inputs[self.op.data :]]
        if equal and self.op.equal:
            inputs[1][..., 0, :] = inputs[0][..., 0, :]
        return tuple(inputs)

    def ours(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(self.op.function(*inputs, *self.lengths)))

    def plain(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(self.op.reference(*inputs, *self.lengths)))

    def mixed(self, results: tuple[Tensor, ...]) -> Tensor:
        return sum((m.to(y.dtype) * (y + y * y)).sum() for m, y in zip(self.mix, results, strict=True))

    def loss(self, *inputs: Tensor) -> Tensor:
        return self.mixed(self.ours(*inputs))

    def plain_loss(self, *inputs: Tensor) -> Tensor:
        return self.mixed(self.plain(*inputs))

    @cached_property
    def exact_inputs(self) -> tuple[Tensor, ...]:
        return leaves(tuple(x.double() for x in self.inputs))

    @cached_property
    def right(self) -> tuple[Tensor, ...]:
        return self.plain(*self.exact_inputs)

    @cached_property
    def right_gradient(self) -> tuple[Tensor, ...]:
        return grad(self.mixed(self.right), self.exact_inputs, create_graph=True)

    @cached_property
    def right_jacobian(self) -> tuple[Tensor, ...]:
        """For each input (R, *input), R the size of all results."""
        return self.by_input([self.rows(y) for y in self.right])

    def by_input(self, jacobian) -> tuple[Tensor, ...]:
        """Derivatives of each result by each input, those of all results joined."""
        return tuple(
            torch.cat([row[k].reshape(-1, *x.shape) for row in jacobian]) for k, x in enumerate(self.inputs)
        )

    def rows(self, y: Tensor) -> list[Tensor]:
        """For each input the derivatives of y, (*y, *input)."""
        found = [
            grad(e, self.exact_inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
            for e in y.flatten()
        ]
        return [torch.stack(r).view(*y.shape, *r[0].shape) for r in zip(*found, strict=True)]

    def right_hessian(self, chosen: tuple[int, ...]) -> list[list[Tensor]]:
        found = [self.rows(self.right_gradient[k]) for k in chosen]
        return [[row[k] for k in chosen] for row in found]

    @cached_property
    def right_tangents(self) -> tuple[Tensor, ...]:
        """The derivative of the results along v."""
        moved = sum(
            torch.tensordot(J, v.double(), v.dim()) for J, v in zip(self.right_jacobian, self.v, strict=True)
        )
        parts = moved.split([y.numel() for y in self.right])
        return tuple(part.view_as(y) for part, y in zip(parts, self.right, strict=True))

    def right_pullback(self, g: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        g = tuple(x.double() for x in g)
        return grad(self.right, self.exact_inputs, g, retain_graph=True)

    def right_pullbacks(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        """Those of a batch of gradients, with their graph."""
        rows = [
            grad(self.right, self.exact_inputs, tuple(x.double() for x in g), create_graph=True)
            for g in zip(*batch, strict=True)
        ]
        return [torch.stack(found) for found in zip(*rows, strict=True)]

    @cached_property
    def right_product(self) -> tuple[Tensor, ...]:
        """The Hessian of the loss, times v."""
        return grad(dot(self.right_gradient, self.v), self.exact_inputs, create_graph=True)

    def samples(self, dims: tuple[int | None, ...]) -> tuple[Tensor, ...]:
        """The inputs, three times others along these dimensions."""
        drawn = [self.random(True) for _ in range(SAMPLES)]
        return tuple(
            x if dim is None else torch.stack([inputs[k] for inputs in drawn], dim)
            for k, (x, dim) in enumerate(zip(self.inputs, dims, strict=True))
        )

    def one_by_one(self, function: Callable, dims, batched) -> tuple[Tensor, ...]:
        """A plain function of each sample, stacked."""
        found = [
            function(
                *leaves(
                    tuple(
                        double(x if dim is None else x.select(dim, k))
                        for x, dim in zip(batched, dims, strict=True)
                    )
                )
            )
            for k in range(SAMPLES)
        ]
        return tuple(torch.stack([x.detach() for x in results]) for results in zip(*found, strict=True))


SAMPLES = 3


def leaves(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs)


def double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def dot(xs, ys) -> Tensor:
    return sum((x * y.to(x.dtype)).sum() for x, y in zip(xs, ys, strict=True))


def detached(xs) -> list[Tensor]:
    return [x.detach() for x in xs]


def data_dims(op: Op) -> tuple[int | None, ...]:
    """A dimension for the samples of every data input, another for each, and none for weights."""
    return tuple(k % 3 if k < op.data else None for k in range(len(op.shapes)))


def weight_dims(op: Op) -> tuple[int | None, ...]:
    return tuple(None if k < op.data else 0 for k in range(len(op.shapes)))


# --- the transforms: each yields pairs of what it finds and what is right ---

Found = Iterator[tuple[object, object]]


def backward(case: Case) -> Found:
    inputs = leaves(case.inputs)
    results = case.ours(*inputs)
    yield results, case.right
    yield grad(case.mixed(results), inputs), case.right_gradient


def double_backward(case: Case) -> Found:
    inputs = leaves(case.inputs)
    slopes = grad(case.loss(*inputs), inputs, create_graph=True)
    yield grad(dot(slopes, case.v), inputs), case.right_product


def numerical(case: Case) -> Found:
    """Against finite differences, of values and of first derivatives, where no two rows are equal."""
    if case.dtype == torch.float64:
        inputs = leaves(case.random(False))
        assert gradcheck(case.ours, inputs, fast_mode=True)
        assert gradgradcheck(case.ours, inputs, fast_mode=True)
    return
    yield


def third(case: Case) -> Found:
    def along(slopes, inputs):
        product = grad(dot(slopes, case.v), inputs, create_graph=True)
        return grad(dot(product, case.u), inputs)

    inputs = leaves(case.inputs)
    slopes = grad(case.loss(*inputs), inputs, create_graph=True)
    yield along(slopes, inputs), along(case.right_gradient, case.exact_inputs)


def every(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.inputs)))


def func_grad_vjp(case: Case) -> Found:
    yield func_grad(case.loss, every(case))(*case.inputs), case.right_gradient
    results, pull = vjp(case.ours, *case.inputs)
    yield results, case.right
    yield pull(case.g), case.right_pullback(case.g)


def func_jacrev(case: Case) -> Found:
    yield case.by_input(jacrev(case.ours, every(case))(*case.inputs)), case.right_jacobian


def func_jvp(case: Case) -> Found:
    results, tangents = jvp(case.ours, case.inputs, case.v)
    yield results, case.right
    yield tangents, case.right_tangents


def func_jacfwd(case: Case) -> Found:
    yield case.by_input(jacfwd(case.ours, every(case))(*case.inputs)), case.right_jacobian


def func_hessian(case: Case) -> Found:
    chosen = (0, len(case.inputs) - 1)
    want = case.right_hessian(chosen)
    for outer, inner in ((None, hessian), (jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        found = inner(case.loss, chosen) if outer is None else outer(inner(case.loss, chosen), chosen)
        yield found(*case.inputs), want


def func_vmap(case: Case) -> Found:
    dims = data_dims(case.op)
    batched = case.samples(dims)
    yield vmap(case.ours, dims)(*batched), case.one_by_one(case.plain, dims, batched)
    # Twice over.
    first = torch.stack([batched[0]] * 2, -1) * torch.tensor([1.0, 0.5], dtype=case.dtype)
    twice = vmap(vmap(case.ours, dims), (-1, *[None] * (len(dims) - 1)))(first, *batched[1:])
    want = [case.one_by_one(case.plain, dims, (x, *batched[1:])) for x in first.unbind(-1)]
    yield twice, tree_map(lambda *xs: torch.stack(xs), *want)
    if case.lengths:
        lengths = tuple(torch.stack([n, n.flip(0), n.clamp(max=2)]) for n in case.lengths)
        dims, batched = (*dims, *[0] * len(lengths)), (*batched, *lengths)

        def ours(*given):
            return tuple(tree_leaves(case.op.function(*given)))

        def plain(*given):
            return tuple(tree_leaves(case.op.reference(*given)))

        yield vmap(ours, dims)(*batched), case.one_by_one(plain, dims, batched)


def func_ensemble(case: Case) -> Found:
    dims = weight_dims(case.op)
    batched = case.samples(dims)
    yield vmap(case.ours, dims)(*batched), case.one_by_one(case.plain, dims, batched)


def per_sample(case: Case) -> Found:
    """Of each sample's loss by the weights, and by the data."""

    def right(*inputs):
        return grad(case.plain_loss(*inputs), inputs)

    dims = data_dims(case.op)
    batched = case.samples(dims)
    yield vmap(func_grad(case.loss, every(case)), dims)(*batched), case.one_by_one(right, dims, batched)


def dual(inputs, tangents):
    return tuple(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True))


def tangents_of(results):
    """Zeros where there are none, as torch takes them."""
    found = [forward_ad.unpack_dual(y) for y in results]
    return [torch.zeros_like(y) if t is None else t for y, t in found]


def forward_mode(case: Case) -> Found:
    with forward_ad.dual_level():
        yield tangents_of(case.ours(*dual(case.inputs, case.v))), case.right_tangents
    # Over a backward pass.
    inputs = leaves(case.inputs)
    with forward_ad.dual_level():
        given = dual(inputs, case.v)
        yield tangents_of(grad(case.loss(*given), given)), case.right_product


def moved(case: Case) -> tuple[Tensor, ...]:
    """Tangents of the gradients of the results."""
    return tuple(torch.randn_like(g) for g in case.g)


def forward_over_pullback(case: Case) -> Found:
    """Forward mode through a backward pass, which is linear, whose forward pass was outside."""
    inputs, tangents = leaves(case.inputs), moved(case)
    results = case.ours(*inputs)
    with forward_ad.dual_level():
        found = tangents_of(grad(results, inputs, dual(case.g, tangents)))
        yield found, case.right_pullback(tangents)


def jvp_of_pullback(case: Case) -> Found:
    pull, tangents = vjp(case.ours, *case.inputs)[1], moved(case)
    yield jvp(pull, (case.g,), (tangents,))[1], case.right_pullback(tangents)


def batched_gradients(case: Case) -> Found:
    inputs = leaves(case.inputs)
    results = case.ours(*inputs)
    batch = tuple(torch.stack([g, -2 * g, g.flip(0)]) for g in case.g)
    want = tree_map(lambda *xs: torch.stack(xs), *[case.right_pullback(g) for g in zip(*batch, strict=True)])
    for create_graph in (False, True):
        found = grad(
            results, inputs, batch, retain_graph=True, create_graph=create_graph, is_grads_batched=True
        )
        yield found, want

    # And what is found can be differentiated, first derivatives and second ones.
    def derivatives_of_batches(found, exact):
        weights = detached(exact)
        ours = grad(dot(found, weights), inputs, retain_graph=True)
        return ours, grad(dot(exact, weights), case.exact_inputs, retain_graph=True)

    exact = case.right_pullbacks(batch)
    yield derivatives_of_batches(found, exact)
    batch = tuple(torch.stack([v, u]) for v, u in zip(case.v, case.u, strict=True))
    slopes = grad(case.loss(*inputs), inputs, create_graph=True)
    found = grad(slopes, inputs, batch, create_graph=True, is_grads_batched=True)
    products = [
        grad(dot(case.right_gradient, row), case.exact_inputs, create_graph=True) for row in (case.v, case.u)
    ]
    exact = [torch.stack(rows) for rows in zip(*products, strict=True)]
    yield found, exact
    yield derivatives_of_batches(found, exact)
    slopes = grad(case.loss(*inputs), inputs, create_graph=True)
    size = slopes[0].numel()
    rows = torch.eye(size, dtype=case.dtype).view(size, *slopes[0].shape)
    (found,) = grad(slopes[0], inputs[0], rows, is_grads_batched=True)
    yield found.view(*slopes[0].shape, *inputs[0].shape), case.right_hessian((0,))[0][0]


# What is compiled: by the backend that traces and differentiates as the default one does, but is quick.
BACKEND = "aot_eager"


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=BACKEND)


def compiled_forward(case: Case) -> Found:
    function = compiled(case.ours)
    with torch.no_grad():
        yield function(*case.inputs), case.right


def compiled_backward(case: Case) -> Found:
    inputs = leaves(case.inputs)
    loss = compiled(case.loss)(*inputs)
    yield grad(loss, inputs), case.right_gradient


def compiled_grad(case: Case) -> Found:
    yield compiled(func_grad(case.loss, every(case)))(*case.inputs), case.right_gradient


def compiled_jvp(case: Case) -> Found:
    yield compiled(lambda *inputs: jvp(case.ours, inputs, case.v)[1])(*case.inputs), case.right_tangents


def compiled_vmap(case: Case) -> Found:
    dims = data_dims(case.op)
    batched = case.samples(dims)
    found = compiled(vmap(case.ours, dims))(*batched)
    yield found, case.one_by_one(case.plain, dims, batched)


def compiled_hessian(case: Case) -> Found:
    yield [[compiled(hessian(case.loss))(*case.inputs)]], case.right_hessian((0,))


def compiled_forward_mode(case: Case) -> Found:
    """Dual numbers given to what is compiled, and was called without."""
    function = compiled(case.ours)
    function(*case.inputs)
    with forward_ad.dual_level():
        yield tangents_of(function(*dual(case.inputs, case.v))), case.right_tangents


def grad_of_compiled(case: Case) -> Found:
    yield func_grad(compiled(case.loss), every(case))(*case.inputs), case.right_gradient


def jvp_of_compiled(case: Case) -> Found:
    yield jvp(compiled(case.ours), case.inputs, case.v)[1], case.right_tangents


def vmap_of_compiled(case: Case) -> Found:
    dims = data_dims(case.op)
    batched = case.samples(dims)
    yield vmap(compiled(case.ours), dims)(*batched), case.one_by_one(case.plain, dims, batched)


def compiled_double_backward(case: Case) -> Found:
    inputs = leaves(case.inputs)
    slopes = grad(compiled(case.loss)(*inputs), inputs, create_graph=True)
    dot(slopes, case.v).backward()
    yield tuple(x.grad for x in inputs), case.right_product


class Program(nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, *given):
        return tuple(tree_leaves(self.op.function(*given)))


def exported(case: Case, strict: bool = False, trainable: bool = False) -> Callable:
    """A program whose data may have other sizes: B, and T or Q and A."""
    openings = *case.op.open, *[()] * (len(case.inputs) - len(case.op.open)), *[(0,)] * len(case.lengths)
    opened = [dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for dims in openings]
    inputs = leaves(case.inputs) if trainable else case.inputs
    program = torch.export.export(
        Program(case.op), (*inputs, *case.lengths), dynamic_shapes={"given": tuple(opened)}, strict=strict
    )
    return program.module()


def elsewhere(case: Case) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and lengths of sizes that are larger by one in every open dimension."""
    shapes = list(case.op.shapes)
    for k, dims in enumerate(case.op.open):
        shapes[k] = tuple(size + (n in dims) for n, size in enumerate(shapes[k]))
    return case.random(True, shapes), tuple(torch.cat([n, n[:1]]) for n in case.lengths)


def export(case: Case) -> Found:
    program = exported(case)
    for inputs, lengths in ((case.inputs, case.lengths), elsewhere(case)):
        want = tree_leaves(case.op.reference(*map(double, inputs), *lengths))
        yield program(*inputs, *lengths), want


def export_backward(case: Case, strict: bool = False) -> Found:
    inputs = leaves(case.inputs)
    results = exported(case, strict, trainable=strict)(*inputs, *case.lengths)
    # Beside another term, so that what is missing would be so silently.
    found = grad((*results, inputs[0]), inputs, (*case.g, case.v[0]), allow_unused=True)
    right = list(case.right_pullback(case.g))
    right[0] = right[0] + case.v[0]
    yield found, right


def export_strict_backward(case: Case) -> Found:
    yield from export_backward(case, strict=True)


def export_jvp(case: Case) -> Found:
    program = exported(case)
    yield jvp(lambda *inputs: program(*inputs, *case.lengths), case.inputs, case.v)[1], case.right_tangents


def export_forward_mode(case: Case) -> Found:
    program = exported(case)
    with forward_ad.dual_level():
        yield tangents_of(program(*dual(case.inputs, case.v), *case.lengths)), case.right_tangents


def steady(case: Case) -> bool:
    """Whether bfloat16 moves the plain op's own results and gradients little: it turns those of near rows."""
    inputs = leaves(case.inputs)
    with torch.autocast("cpu", torch.bfloat16):
        results = case.plain(*inputs)
    grads = grad(case.mixed(tuple(y.float() for y in results)), inputs)
    try:
        compare((results, grads), (case.right, case.right_gradient), 0.03)
    except AssertionError:
        return False
    return True


def autocast(case: Case) -> Found:
    while not steady(case):
        case = Case(case.op, case.dtype)
    inputs = leaves(case.inputs)
    with torch.autocast("cpu", torch.bfloat16):
        results = case.ours(*inputs)
    assert tuple(y.dtype for y in results) == (case.op.low or (case.dtype,) * len(results))
    yield results, case.right
    grads = grad(case.mixed(tuple(y.float() for y in results)), inputs)
    assert {g.dtype for g in grads} == {case.dtype}
    yield grads, case.right_gradient


def checkpointed(case: Case) -> Found:
    for use_reentrant in (False, True):
        inputs = leaves(case.inputs)
        results = checkpoint(case.ours, *inputs, use_reentrant=use_reentrant)
        case.mixed(results).backward()
        yield tuple(x.grad for x in inputs), case.right_gradient


def saved_tensor_hooks(case: Case) -> Found:
    inputs = leaves(case.inputs)
    with torch.autograd.graph.save_on_cpu():
        loss = case.loss(*inputs)
        slopes = grad(loss, inputs, create_graph=True)
    yield slopes, case.right_gradient
    yield grad(dot(slopes, case.v), inputs), case.right_product


def with_weights(case: Case, module: nn.Module) -> nn.Module:
    """A copy of the module with the case's weights, in its dtype."""
    module = copy.deepcopy(module).to(case.dtype)
    module.load_state_dict(dict(zip(case.op.names, case.inputs[case.op.data :], strict=True)))
    return module


def called(case: Case, module: nn.Module) -> tuple[Tensor, ...]:
    op = case.op
    return tuple(tree_leaves(module(*op.arguments(*case.inputs[: op.data], *case.lengths))))


def of_copy(case: Case, copied: Callable) -> Found:
    first = with_weights(case, case.op.module)
    module = copied(first)
    results = called(case, module)
    yield results, case.right
    case.mixed(results).backward()
    yield [weight.grad for weight in module.parameters()], case.right_gradient[case.op.data :]
    assert all(weight.grad is None for weight in first.parameters())


def deepcopied(case: Case) -> Found:
    yield from of_copy(case, copy.deepcopy)


def pickled(case: Case) -> Found:
    yield from of_copy(case, lambda module: pickle.loads(pickle.dumps(module)))


def parametrized(case: Case, parametrize: Callable) -> Found:
    """With a parametrization of one weight, by autograd and by torch.func."""
    op = case.op
    module = with_weights(case, op.module)
    owner, _, weight = op.names[0].rpartition(".")
    parametrize(module.get_submodule(owner), weight)
    plain = copy.deepcopy(module).double()
    weights = [
        getattr(plain.get_submodule(owner), name) for owner, _, name in (n.rpartition(".") for n in op.names)
    ]
    right = case.plain(*case.exact_inputs[: op.data], *weights)
    want = grad(case.mixed(right), list(plain.parameters()))
    results = called(case, module)
    yield results, right
    yield grad(case.mixed(results), list(module.parameters())), want

    def loss(params):
        given = op.arguments(*case.inputs[: op.data], *case.lengths)
        return case.mixed(tuple(tree_leaves(functional_call(module, params, given))))

    params = dict(module.named_parameters())
    yield list(func_grad(loss)(params).values()), want


def weight_norm(case: Case) -> Found:
    yield from parametrized(case, parametrizations.weight_norm)


def orthogonal(case: Case) -> Found:
    yield from parametrized(case, parametrizations.orthogonal)


# --- whoever looks inside of a call: what it finds is right for other values and sizes ---


def right_at(case: Case, inputs, lengths) -> tuple[Tensor, ...]:
    return tuple(tree_leaves(case.op.reference(*map(double, inputs), *lengths)))


def unlike(case: Case) -> tuple[Tensor, ...]:
    """Other inputs than the case's, no two rows equal, and lengths of 1."""
    return *case.random(False), *(torch.ones_like(n) for n in case.lengths)


class Outer(nn.Module):
    """A network around a module, called with all that the module is called with."""

    def __init__(self, module: nn.Module, op: Op) -> None:
        super().__init__()
        self.module, self.arguments = module, op.arguments
        self.given = op.data + len(op.lengths)

    def forward(self, given):
        return self.module(*self.arguments(*(given[k] for k in range(self.given))))


def jit_trace(case: Case) -> Found:
    """Saved and loaded; and differentiated."""
    op, free = case.op, len(case.inputs) if case.op.module is None else case.op.data
    traced_from = Outer(with_weights(case, op.module), op) if op.module else Program(op)

    def given(inputs, lengths):
        given = *inputs[:free], *lengths
        return (given,) if op.module else given

    other = unlike(case)
    file = io.BytesIO()
    torch.jit.save(
        torch.jit.trace(traced_from, given(other[: len(case.inputs)], other[len(case.inputs) :])), file
    )
    file.seek(0)
    traced = torch.jit.load(file)
    there, lengths = elsewhere(case)
    there = *there[:free], *case.inputs[free:]
    none = tuple(n.clamp(max=0) for n in case.lengths)
    yield traced(*given(case.inputs, case.lengths)), case.right
    yield traced(*given(there, lengths)), right_at(case, there, lengths)
    found = tree_leaves(traced(*given(case.inputs, none)))  # much of which is 0
    for x, y in zip(found, right_at(case, case.inputs, none), strict=True):
        assert torch.allclose(x, y.float(), atol=1e-6)
    inputs = leaves(case.inputs)
    gradients = grad(case.mixed(tree_leaves(traced(*given(inputs, case.lengths)))), inputs[:free])
    yield gradients, case.right_gradient[:free]


def proxy_mode(case: Case) -> Found:
    """make_fx, whose sizes are symbols, and the gradient that autograd computes in it."""

    def gradient(*given):
        inputs, lengths = leaves(given[: len(case.inputs)]), given[len(case.inputs) :]
        return grad(squares(Program(case.op)(*inputs, *lengths)), inputs)

    def squares(results):
        return sum((y * y).sum() for y in results)

    with torch.fx.experimental._config.patch(use_duck_shape=False):  # sizes that are equal here need not be
        program = make_fx(Program(case.op), tracing_mode="symbolic")(*unlike(case))
        slopes = make_fx(gradient, tracing_mode="symbolic")(*unlike(case))
    for inputs, lengths in ((case.inputs, case.lengths), elsewhere(case)):
        yield program(*inputs, *lengths), right_at(case, inputs, lengths)
    yield slopes(*case.inputs, *case.lengths), grad(squares(case.right), case.exact_inputs, retain_graph=True)


class Subclass(Tensor):
    pass


# What a host waits for, to read a value.
READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class Unread(TorchDispatchMode):
    """A dispatch mode under which the host reads no value of a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.name().partition(".")[0] not in READS, f"{function.name()}: the host reads a value"
        return function(*args, **kwargs or {})


def dispatch_mode(case: Case) -> Found:
    inputs = leaves(case.inputs)
    with Unread():
        results = case.ours(*inputs)
        gradients = grad(case.mixed(results), inputs)
    yield results, case.right
    yield gradients, case.right_gradient


def subclass(case: Case) -> Found:
    """The first input alone, and all of them."""
    inputs = leaves(case.inputs)
    yield case.ours(inputs[0].as_subclass(Subclass), *inputs[1:]), case.right
    results = case.ours(*(x.as_subclass(Subclass) for x in inputs))
    yield grad(case.mixed(results), inputs), case.right_gradient


def fake(case: Case) -> Found:
    inputs = leaves(case.inputs)
    results = case.ours(*inputs)
    with FakeTensorMode() as mode:
        given = tuple(mode.from_tensor(x) for x in inputs)
        faked = Program(case.op)(*given, *map(mode.from_tensor, case.lengths))
        gradients = grad(sum(y.sum() for y in faked), given)
    for x, y in zip((*faked, *gradients), (*results, *inputs), strict=True):
        assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
    return
    yield


def symbolic_trace(case: Case) -> Found:
    outer = Outer(with_weights(case, case.op.module), case.op)
    traced = torch.fx.symbolic_trace(outer)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["module"]
    assert not traced.eval().module.training
    for program in (traced, pickle.loads(pickle.dumps(traced))):
        yield program((*case.inputs[: case.op.data], *case.lengths)), case.right


# --- the tables, and how a cell is judged ---


@dataclass(frozen=True)
class Column:
    """What a table's column holds: one transform or several that share its cells."""

    transforms: tuple[Callable, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    of_modules: bool = False
    tolerance: float = 2e-4
    slow: bool = False


def eager(*transforms: Callable) -> Column:
    return Column(transforms, (torch.float64, torch.float32))


TABLES = {
    "eager": {
        "`backward`": eager(backward),
        "twice": eager(double_backward, numerical),
        "three times": eager(third),
        "`grad`, `vjp`": eager(func_grad_vjp),
        "`jacrev`": eager(func_jacrev),
        "`jvp`": eager(func_jvp),
        "`jacfwd`": eager(func_jacfwd),
        "`hessian`": eager(func_hessian),
        "`vmap`": eager(func_vmap),
        "`vmap`, weights": eager(func_ensemble),
        "`vmap(grad)`": eager(per_sample),
        "forward AD": eager(forward_mode),
        "`is_grads_batched`": eager(batched_gradients),
        "forward AD of a pullback": eager(forward_over_pullback, jvp_of_pullback),
    },
    "compiled": {
        "forward": Column((compiled_forward,)),
        "`backward`": Column((compiled_backward,)),
        "twice": Column((compiled_double_backward,), slow=True),
        "`grad` inside": Column((compiled_grad,)),
        "`jvp` inside": Column((compiled_jvp,)),
        "`vmap` inside": Column((compiled_vmap,)),
        "`hessian` inside": Column((compiled_hessian,), slow=True),
        "dual numbers": Column((compiled_forward_mode,)),
        "`torch.func` around": Column((grad_of_compiled, jvp_of_compiled, vmap_of_compiled)),
        "`export`": Column((export,)),
        "`export`, `backward`": Column((export_backward, export_strict_backward), slow=True),
        "`export`, `jvp`": Column((export_jvp, export_forward_mode), slow=True),
    },
    "around": {
        "autocast": Column((autocast,), tolerance=0.1),
        "checkpoint": Column((checkpointed,)),
        "saved-tensor hooks": Column((saved_tensor_hooks,)),
        "`deepcopy`": Column((deepcopied,), of_modules=True),
        "`pickle`": Column((pickled,), of_modules=True),
        "`weight_norm`": Column((weight_norm,), of_modules=True),
        "`orthogonal`": Column((orthogonal,), of_modules=True),
    },
    "inside": {
        "`torch.jit.trace`": Column((jit_trace,)),
        "`make_fx`": Column((proxy_mode,)),
        "a dispatch mode": Column((dispatch_mode,)),
        "a tensor subclass": Column((subclass,)),
        "`FakeTensorMode`": Column((fake,)),
        "`torch.fx`": Column((symbolic_trace,), of_modules=True),
    },
}
# The kernels have no float64, and each of these runs in Triton's interpreter.
TABLES["kernels"] = {
    heading: Column(column.transforms, slow=heading == "`jacrev`")
    for heading, column in TABLES["eager"].items()
    if heading not in ("three times", "`hessian`")
} | {
    "compiled, `backward`": Column((compiled_backward,)),
    "`torch.func` inside": Column((compiled_grad, compiled_jvp, compiled_vmap)),
}


class Raises(NamedTuple):
    """What a transform may raise, in which columns, and from which version of torch on.

    `before` is what torch before 2.13 may say instead.
    """

    error: type[Exception]
    sentence: str
    columns: tuple[str, ...]
    since: tuple[int, int] = (0, 0)
    before: str = ""

    def is_said(self, raised: Exception) -> bool:
        older = bool(self.before) and torch.__version__ < (2, 13) and self.before in str(raised)
        return isinstance(raised, self.error) and (older or self.sentence in str(raised))


FOOTNOTES = {
    "a": Raises(
        NotImplementedError,
        "Trying to use forward AD with mkldnn_rnn_layer_backward",
        ("forward AD of a pullback",),
    ),
    "b": Raises(
        NotImplementedError, "an op of gatematch has no forward-mode derivative", ("`export`, `jvp`",)
    ),
    "c": Raises(
        RuntimeError,
        "torch.compile with aot_autograd does not currently support double backward",
        ("twice",),
        before="element 0 of tensors does not require grad",
    ),
    "d": Raises(
        torch._dynamo.exc.Unsupported, "Unsupported functorch tracing attempt", ("`torch.func` around",)
    ),
    "e": Raises(
        torch._dynamo.exc.Unsupported, "Attempted to wrap a dual tensor input", ("dual numbers",), (2, 14)
    ),
    "f": Raises(ValueError, "cannot serve this call", ("`jvp`", "`jacfwd`", "forward AD")),
    "g": Raises(torch._dynamo.exc.Unsupported, "cannot serve this call", ("`torch.func` inside",)),
}


def here(cell: str) -> str:
    """What a cell of the tables says of this version of torch: a tick, if it raises only in later ones."""
    letters = cell.split(", ")
    there = [x for x in letters if x not in FOOTNOTES or torch.__version__ >= FOOTNOTES[x].since]
    return ", ".join(there) or "✓"


def judge(op: Op, heading: str, column: Column) -> str:
    """The cell: a tick, the letters of the footnotes, or a dash where there is nothing to do."""
    if column.of_modules and op.module is None:
        return "–"
    letters = set()
    for transform, dtype in product(column.transforms, column.dtypes):
        case = Case(op, dtype)
        try:
            for found, right in transform(case):
                compare(found, right, 1e-8 if dtype == torch.float64 else column.tolerance)
        except Exception as raised:
            known = [
                letter
                for letter, footnote in FOOTNOTES.items()
                if footnote.is_said(raised) and heading in footnote.columns
            ]
            if not known:
                raise
            letters.update(known)
    return ", ".join(sorted(letters)) or "✓"


def compare(found, right, tolerance: float) -> None:
    """Two trees of tensors, as shares of each one's largest value."""
    found, right = tree_leaves(found), tree_leaves(right)
    most = max(y.detach().abs().max() for y in right)
    for x, y in zip(found, right, strict=True):
        assert x.shape == y.shape, f"{tuple(x.shape)} in place of {tuple(y.shape)}"
        largest = y.detach().abs().max()
        assert largest > 1e-5 * most > 0, "what is right is zero: nothing would be shown"
        share = (x.detach().double() - y.detach()).abs().max() / largest
        assert share <= tolerance, f"off by {share:.1e} of {largest:.1e}"


DOCUMENT = Path(__file__).parents[1] / "docs" / "differentiation.md"
WRITING = os.environ.get("GATEMATCH_WRITE_DOCS") == "1"
_BLOCK = "(?<=<!-- transforms {} -->\n).*?(?=<!-- end -->)"


def committed(table: str) -> dict[tuple[str, str], str]:
    """The cells of a table of the document, by op and heading."""
    block = re.search(_BLOCK.format(table), DOCUMENT.read_text(), re.DOTALL)
    assert block is not None, f"{DOCUMENT.name} has no table of transforms called {table}"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block[0].splitlines()]
    if not lines:
        return {}
    (_, *headings), _, *rows = lines
    return {(op, heading): cell for op, *cells in rows for heading, cell in zip(headings, cells, strict=True)}


def write(table: str, rows: list[str], outcomes: dict[tuple[str, str], str]) -> None:
    """The table with these cells, and as it was where there are none, or it says the same already."""
    assert "PYTEST_XDIST_WORKER" not in os.environ, "tables are written by one process"
    known = committed(table)
    known |= {place: cell for place, cell in outcomes.items() if here(known.get(place, "")) != cell}
    headings = list(TABLES[table])
    lines = [["", *headings], ["---"] * (1 + len(headings))]
    lines += [[op, *(known.get((op, heading), "?") for heading in headings)] for op in rows]
    block = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(re.sub(_BLOCK.format(table), lambda _: block, text, count=1, flags=re.DOTALL))


# --- the registered ops underneath ---


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "gatematch":
            self.calls.append((function, *tree_map(_detached, (args, kwargs or {}))))
        return function(*args, **kwargs or {})


def _detached(x):
    return x.detach() if isinstance(x, Tensor) else x


def calls(op: Op) -> list[tuple]:
    """The calls of the ops that the packages register, with their arguments, in a gradient by torch.func."""
    case, recorder = Case(op, torch.float32), _Recorder()
    with recorder:
        func_grad(case.loss, every(case))(*case.inputs)
    return recorder.calls


def unchecked(ops: Iterable[Op]) -> set[str]:
    """The names of registered ops that none of these calls."""
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gatematch::")}
    assert registered
    return registered - {function.name() for op in ops for function, *_ in calls(op)}
