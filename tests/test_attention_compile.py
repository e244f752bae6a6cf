"""torch.compile of the pairwise ops and of what is built on them: the same numbers, forward and backward."""

import pytest
import torch

from gatematch.attention import ABCNN, AttentionFeatures, pairwise_attend, pairwise_attention, pairwise_sums

FUNCTIONS = {
    "attention": lambda: pairwise_attention,
    "attend": lambda: lambda q, a: pairwise_attend(q, a, a, "rows"),
    "sums": lambda: lambda q, a: torch.cat(pairwise_sums(q, a), 1),
    "features": lambda: lambda q, a, f=AttentionFeatures(6, 3): torch.cat(f(q, a), 1),
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
