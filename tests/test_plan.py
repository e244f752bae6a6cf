"""The table of who computes a call, row by row, and what surrounds a call."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from gatematch import plan
from gatematch.torch_private import surroundings

CPU, CUDA = SimpleNamespace(is_cuda=False), SimpleNamespace(is_cuda=True)
NAMED = ("resident", "step")


class Subclass(torch.Tensor):
    pass


# What surrounds the call; who computes it on CUDA, on a CPU or by impl="torch", and by impl="triton".
ROWS = [
    ("nothing", "triton", "eager", "triton"),
    ("torch.func", "triton", "torch", "triton"),
    ("torch.compile", "triton", "torch", "triton"),
    ("torch.jit.trace", "triton", "torch", "triton"),
    ("a dispatch mode or subclass", "triton", "torch", "triton"),
    ("forward mode of other tensors", "triton", "torch", "triton"),
    ("forward mode", "reference", "reference", "have no forward-mode derivative"),
    ("torch.func inside torch.compile", "reference", "reference", "know nothing of torch.func"),
]


def test_every_row_is_tested_and_on_the_page():
    assert [row[0] for row in ROWS] == list(plan.TABLE)
    words = {
        "triton": "the op, by the kernels",
        "torch": "the op, by torch's own operations",
        "eager": "torch's own operations, without an op",
        "reference": "the reference",
    }
    page = (Path(__file__).parents[1] / "docs" / "limits.md").read_text()
    for around, on_cuda, otherwise, _ in ROWS:
        assert f"| {around} | {words[on_cuda]} | {words[otherwise]} |" in page


@pytest.mark.parametrize(("around", "on_cuda", "otherwise", "asked"), ROWS)
def test_who_computes(around, on_cuda, otherwise, asked, monkeypatch):
    monkeypatch.setattr(plan, "obstacle", lambda x: None)
    assert plan.who_computes(CUDA, "auto", around) == on_cuda
    for x, impl in ((CPU, "auto"), (CPU, "torch"), (CUDA, "torch")):
        assert plan.who_computes(x, impl, around) == otherwise
    for impl in ("triton", "step"):
        if asked == "triton":
            assert plan.who_computes(CPU, impl, around, NAMED, ("step",)) == "triton"
        else:
            with pytest.raises(
                ValueError,
                match=f"impl: expected 'auto' or 'torch', got '{impl}'; it cannot serve this call: .*{asked}",
            ):
                plan.who_computes(CPU, impl, around, NAMED, ("step",))


@pytest.mark.parametrize("around", plan.TABLE)
def test_tensors_that_the_kernels_cannot_take(around, monkeypatch):
    monkeypatch.setattr(plan, "obstacle", lambda x: "there is no kernel")
    assert plan.who_computes(CUDA, "auto", around) == plan.TABLE[around][1]
    with pytest.raises(
        ValueError,
        match="impl: expected 'auto' or 'torch', got 'triton'; it cannot serve this call: there is no kernel",
    ):
        plan.who_computes(CUDA, "triton", around)


def test_a_kernel_that_is_not_for_this_kind_of_call(monkeypatch):
    monkeypatch.setattr(plan, "obstacle", lambda x: None)
    with pytest.raises(ValueError, match=r"got 'resident'; it cannot .* the kernels for it are step"):
        plan.who_computes(CUDA, "resident", "nothing", NAMED, ("step",))
    with pytest.raises(ValueError, match=r"impl: expected one of 'auto', .*, 'step', got 'cuda'"):
        plan.who_computes(CUDA, "cuda", "nothing", NAMED)


def test_what_surrounds_a_call():
    found = []

    def look(x, other=None):
        found.append(surroundings((x, None), (x,), other))
        return x.sum()

    x = torch.ones(3)
    look(x)
    look(nn.Parameter(x), [x])
    torch.func.grad(look)(x)
    torch.vmap(look)(x[None])
    assert found == ["nothing", "nothing", "torch.func", "torch.func"]
    found.clear()
    with forward_ad.dual_level():
        look(x)
        look(forward_ad.make_dual(x, x))
        look(x, [x, forward_ad.make_dual(x, x)])
        torch.func.grad(look)(x)
    torch.func.jvp(look, (x,), (x,))
    assert found == ["forward mode of other tensors", *["forward mode"] * 4]
    found.clear()
    torch.jit.trace(look, x, check_trace=False)
    assert set(found) == {"torch.jit.trace"}
    found.clear()
    with FlopCounterMode(display=False):
        look(x)
    look(x.as_subclass(Subclass))
    make_fx(lambda x: look(x))(x)
    assert set(found) == {"a dispatch mode or subclass"} and len(found) == 3


@pytest.mark.parametrize(
    ("transform", "around"),
    [(lambda f: f, "torch.compile"), (torch.func.grad, "torch.func inside torch.compile")],
)
def test_what_surrounds_a_call_that_is_compiled(transform, around):
    factor = {name: float(n) for n, name in enumerate(plan.TABLE)}

    def number(x):
        return x.sum() * factor[surroundings((x,), (x,))]

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: transform(number)(x), backend="eager", fullgraph=True)
    assert float(compiled(torch.ones(1))) == factor[around]
