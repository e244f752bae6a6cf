"""torch's private API, each use by itself: when torch changes one, a test says which."""

import re
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from gatematch import torch_private

ROOT = Path(__file__).parents[1]
PRIVATE = re.compile(r"\btorch\._|\btorch(\.\w+)*\._\w|forward_ad\._")


@pytest.mark.parametrize("package", ["core", "kernels", "lstm", "attention", "curvature"])
def test_private_names_of_torch_stand_in_one_file(package):
    found = {path.name for path in ROOT.glob(f"{package}/**/*.py") if PRIVATE.search(path.read_text())}
    assert found == ({"torch_private.py"} if package == "core" else set())


def test_innermost_transform():
    levels = []
    assert torch_private.innermost_transform() is None
    torch.func.grad(lambda x: levels.append(torch_private.innermost_transform()) or x)(torch.ones(()))
    assert levels[0] is not None


def test_forward_mode():
    assert not torch_private.forward_mode()
    with forward_ad.dual_level():
        assert torch_private.forward_mode()


def test_has_tangent():
    x = torch.ones(2)
    with forward_ad.dual_level():
        assert torch_private.has_tangent(forward_ad.make_dual(x, x))
        assert not torch_private.has_tangent(x) and not torch_private.has_tangent(None)


def test_unwrap_if_dead():
    x, kept = torch.ones(2), []
    torch.func.grad(lambda x: kept.append(x) or x.sum())(x)
    assert torch_private.unwrap_if_dead(x) is x
    assert torch_private.unwrap_if_dead(kept[0]).data_ptr() == x.data_ptr()


def test_tracing():
    seen = [torch_private.tracing()]
    torch.jit.trace(lambda x: seen.append(torch_private.tracing()) or x + 1, torch.ones(2), check_trace=False)
    assert seen == [False, True]


def test_transformed():
    assert not torch_private.transformed()
    levels = []
    torch.vmap(lambda x: levels.append(torch_private.transformed()) or x)(torch.ones(1))
    assert levels == [True]


class Subclass(torch.Tensor):
    pass


def test_bypasses_dispatcher():
    found, x = [], torch.ones(2)
    assert torch_private.bypasses_dispatcher([x, Parameter(x), None, 3, "a"])
    assert not torch_private.bypasses_dispatcher([x, x.as_subclass(Subclass)])
    with TorchDispatchMode():
        assert not torch_private.bypasses_dispatcher([x])
    look = lambda x: found.append(torch_private.bypasses_dispatcher([x])) or x.sum()  # noqa: E731
    torch.jit.trace(look, x, check_trace=False)
    torch.func.grad(look)(x)
    assert found and not any(found)


def test_legacy_batches():
    """Of autograd.grad's own vmap, with the level that ops.py names."""
    seen = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            assert torch_private.is_legacy_batched(g)
            plain = torch_private.remove_legacy_batch_dim(g, 1, 0, 0)
            seen.append(plain.shape)
            return torch_private.add_legacy_batch_dim(2 * plain, 0, 1)

    x = torch.ones(3, requires_grad=True)
    assert not torch_private.is_legacy_batched(x)
    (found,) = torch.autograd.grad(Twice.apply(x), x, torch.eye(3), is_grads_batched=True)
    assert torch.equal(found, 2 * torch.eye(3)) and seen == [(3, 3)]


def test_writes():
    x = torch.zeros(4, 3)
    before = torch_private.writes(x)
    _ = x[1:] + 1, x.mT
    assert torch_private.writes(x[:2]) == before
    x[1:, 0].fill_(1)
    assert torch_private.writes(x) == torch_private.writes(x[:2]) > before
    with torch.inference_mode():
        assert torch_private.writes(torch.zeros(3)) is None


def test_assert_async():
    torch_private.assert_async(torch.tensor(True))
    with pytest.raises(RuntimeError):
        torch_private.assert_async(torch.tensor(False))


def test_disable_dynamo():
    @torch_private.disable_dynamo
    def outside(x):
        assert not torch.compiler.is_compiling()
        return x + 1

    assert torch.compile(lambda x: outside(x), backend="eager")(torch.ones(1)) == 2
    with pytest.raises(Exception, match="disable"):
        torch.compile(lambda x: outside(x), backend="eager", fullgraph=True)(torch.ones(1))


def test_autograd_inside_op():
    @torch.library.custom_op("gatematch_test::slope", mutates_args=())
    def slope(x: torch.Tensor) -> torch.Tensor:
        with torch_private.autograd_inside_op():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((x**3).sum(), x)[0]

    assert torch.equal(slope(torch.tensor([2.0])), torch.tensor([12.0]))
