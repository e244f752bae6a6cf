"""The pairwise ops under torch.compile, forward-mode AD, other default devices and changed inputs."""

import pytest
import torch
from torch.autograd import forward_ad

from gatematch.attention import (
    ABCNN,
    AttentionFeatures,
    near,
    pairwise_attend,
    pairwise_attention,
    pairwise_sums,
)


class Joined(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, q, a):
        return torch.cat(self.module(q, a), 1)


FUNCTIONS = {
    "attention": lambda: pairwise_attention,
    "attend": lambda: lambda q, a: pairwise_attend(q, a, a, "rows"),
    "sums": lambda: lambda q, a: torch.cat(pairwise_sums(q, a), 1),
    "features": lambda: Joined(AttentionFeatures(6, 3)),
    "abcnn3": lambda: ABCNN(20, 6, kind="abcnn3"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_is_eager(name):
    torch._dynamo.reset()
    function = FUNCTIONS[name]()
    compiled = torch.compile(function, backend="aot_eager")
    q, a = torch.randn(2, 5, 20, requires_grad=True), torch.randn(2, 6, 20, requires_grad=True)
    got, want = compiled(q, a), function(q, a)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, (q, a), g), torch.autograd.grad(want, (q, a), g))
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, a), want)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["attention", "attend", "sums"])
def test_forward_mode_raises(name, compile):
    torch._dynamo.reset()
    function = FUNCTIONS[name]()
    if compile:
        function = torch.compile(function, backend="aot_eager")
    q, a = torch.randn(2, 5, 20), torch.randn(2, 6, 20)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            function(dual, a)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: function(q, a), (q,), (torch.ones_like(q),))


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
