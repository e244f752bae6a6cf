"""What the tables of transforms (test_transforms.py) do not show of the pairwise ops."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pairwise_ops import OPS, opcheck_case
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vjp, vmap

from gatematch.attention import (
    ABCNN,
    AttentionFeatures,
    near,
    pairwise_attend,
    pairwise_attention,
    pairwise_sums,
)
from gatematch.attention.reference import (
    pairwise_attend_reference,
    pairwise_attention_reference,
    pairwise_sums_reference,
)
from gatematch.ops import map_batched


class Joined(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, q, a):
        return torch.cat(self.module(q, a), 1)


class Called(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q, a):
        return self.function(q, a)


FUNCTIONS = {
    "attention": lambda: pairwise_attention,
    "attend": lambda: lambda q, a: pairwise_attend(q, a, a, "rows"),
    "sums": lambda: lambda q, a: torch.cat(pairwise_sums(q, a), 1),
    "features": lambda: Joined(AttentionFeatures(3, length=40)),
    "abcnn3": lambda: ABCNN(20, length=40, kind="abcnn3"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exported_for_any_length(name):
    function = FUNCTIONS[name]()
    module = function if isinstance(function, torch.nn.Module) else Called(function)
    B, Q, A = (torch.export.Dim(letter, min=1, max=40) for letter in "BQA")
    example = torch.randn(2, 5, 20), torch.randn(2, 6, 20)
    program = torch.export.export(module, example, dynamic_shapes=({0: B, 1: Q}, {0: B, 1: A}))
    assert "torch.ops.gatematch.pairwise_" in program.graph_module.print_readable(print_output=False)
    for sizes in ((2, 5, 6), (1, 40, 1), (3, 2, 40)):
        q, a = torch.randn(sizes[0], sizes[1], 20), torch.randn(sizes[0], sizes[2], 20)
        torch.testing.assert_close(program.module()(q, a), module(q, a))


# Each op of rows (B, L, D) and lengths (B,), and its reference.
LENGTHS = torch.tensor([3, 2])
PAIRS = {
    "attention": (
        lambda q, a, n=LENGTHS: pairwise_attention(q, a, n),
        lambda q, a, n=LENGTHS: pairwise_attention_reference(q, a, n),
    ),
    "attend": (
        lambda q, a, n=LENGTHS: pairwise_attend(q, a, a.sin(), q_lengths=n),
        lambda q, a, n=LENGTHS: pairwise_attend_reference(q, a, a.sin(), n),
    ),
    "attend rows": (
        lambda q, a, n=LENGTHS: pairwise_attend(q, a, a, "rows", a_lengths=n),
        lambda q, a, n=LENGTHS: pairwise_attend_reference(q, a, a, None, n, "rows"),
    ),
    "sums": (
        lambda q, a, n=LENGTHS: torch.cat(pairwise_sums(q, a, n, n.int()), 1),
        lambda q, a, n=LENGTHS: torch.cat(pairwise_sums_reference(q, a, n, n), 1),
    ),
}


def rows(*batch):
    return (torch.randn(*batch, n, 7, dtype=torch.float64) for n in (3, 4))


def both(name, result):
    """Whether what `result` makes of an op is what it makes of its reference."""
    got, want = map(result, PAIRS[name])
    torch.testing.assert_close(got, want)
    assert all(x.any() for x in torch.utils._pytree.tree_leaves(want))


@pytest.mark.parametrize("name", PAIRS)
def test_vmap_over_some_inputs(name):
    (Q, _), (q, a) = rows(5, 2), rows(2)
    lengths = torch.tensor([[3, 2], [0, 3], [1, 1], [2, 0], [3, 3]])
    both(name, lambda f: vmap(f, (1, None, 0), out_dims=1)(Q.transpose(0, 1), a, lengths))
    both(name, lambda f: vmap(f, (None, None, 0))(q, a, lengths))
    both(name, lambda f: vmap(vmap(f, (None, None, 0)), (0, None, None))(Q, a, lengths))


@pytest.mark.parametrize("name", PAIRS)
def test_third_derivatives_under_torch_func(name):
    def loss(f):
        return lambda q, a: f(q, a).pow(3).sum()

    q, a = rows(2)
    both(name, lambda f: grad(lambda q: grad(lambda q: grad(loss(f))(q, a).sin().sum())(q).cos().sum())(q))


@pytest.mark.parametrize("name", PAIRS)
def test_jacobians_of_nothing(name):
    function, (q, a) = PAIRS[name][0], rows(0)
    lengths = torch.zeros(0, dtype=torch.int64)
    y = function(q, a, lengths)
    assert jacrev(function)(q, a, lengths).shape == (*y.shape, *q.shape)


def test_batched_gradients_in_another_thread():
    """As a backward pass on CUDA is."""

    def twice(g):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(map_batched, lambda x: (2 * x,), [g]).result()[0]

    x = torch.arange(6.0).view(3, 2)
    torch.testing.assert_close(torch._vmap_internals._vmap(twice)(x), 2 * x)


@pytest.mark.parametrize("name", PAIRS)
def test_forward_mode_of_the_backward_pass_alone_of_what_is_compiled_raises(name):
    q, a = (x.requires_grad_() for x in rows(2))
    torch._dynamo.reset()
    S = torch.compile(PAIRS[name][0], backend="aot_eager")(q, a)
    g = torch.ones_like(S)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        torch.autograd.grad(S, q, forward_ad.make_dual(g, g))


@pytest.mark.parametrize("name", PAIRS)
def test_second_derivatives_at_distance_zero_are_finite(name):
    q = torch.randn(2, 3, 7, requires_grad=True)
    (first,) = torch.autograd.grad(PAIRS[name][0](q, q).sin().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q)
    assert first.isfinite().all() and second.isfinite().all() and second.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype):
    op, inputs = opcheck_case(name, "torch", dtype)
    torch.library.opcheck(op, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_in_forward_mode_and_under_torch_func(dtype):
    q, a = (torch.randn(2, n, 20).to(dtype) for n in (5, 6))
    for function in (pairwise_attention, lambda q, a: pairwise_attend(q, a, a, "rows")):
        want = function(q, a)
        with torch.autocast("cpu", torch.bfloat16):
            for got in (jvp(function, (q, a), (q, a))[0], vjp(function, q, a)[0]):
                assert got.dtype == dtype
                torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=0)


def test_near_pairs_under_another_default_device():
    q = torch.randn(2, 5, 20)
    near._scratch.buffers.clear()
    torch.set_default_device("meta")
    try:
        S = pairwise_attention(q, q)
    finally:
        torch.set_default_device(None)
    assert (S.diagonal(dim1=1, dim2=2) == 1).all()


def test_lengths_changed_before_the_backward_pass_are_noticed():
    q, a = torch.randn(2, 5, 20, requires_grad=True), torch.randn(2, 6, 20)
    lengths = torch.tensor([5, 2])
    calls = (
        lambda: pairwise_attention(q, a, lengths),
        lambda: pairwise_attend(q, a, a, q_lengths=lengths),
        lambda: pairwise_sums(q, a, lengths)[0],
    )
    for call in calls:
        y = call()
        lengths.fill_(3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
