"""The launches of the kernel that takes one for each step, with a stub for what Triton compiles."""

import importlib
import inspect
import pkgutil
import re

import pytest
import torch
from triton.runtime.jit import JITFunction

from gatematch import kernels
from gatematch.kernels import config, launch, lstm_step

T, B, H = 5, 2, 16


class Program:
    """As Triton's CompiledKernel: `program[grid](*arguments)` launches it."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


@pytest.fixture
def launched(monkeypatch):
    """The ordinary launches, the program that they found and the arguments of its own launches."""
    program, ordinary = Program(), []

    def run(self, *args, grid, warmup, **options):
        given = dict(zip(self.arg_names, args, strict=False))
        given |= {name: options.pop(name) for name in self.arg_names if name in options}
        ordinary.append((grid, given, options))
        return program

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(config, "architecture", lambda device: "sm_90")
    return ordinary, program.launches


def forward(T):
    z, w, (h, c) = torch.randn(1, T, B, 4 * H), torch.randn(4 * H, H), torch.randn(2, 1, B, H)
    y, *_ = lstm_step.forward(z, [w], h, c, None, precision="float32", save=True)
    return range(T), y, h


def backward(T):
    z, w, (h, c) = torch.randn(1, T, B, 4 * H), torch.randn(4 * H, H), torch.randn(2, 1, B, H)
    cells, g = torch.randn(1, T, B, H), torch.randn(T, B, H)
    lstm_step.backward(z, cells, [w], c, None, g, h, c, None, precision="float32")
    return range(T - 1, -2, -1), None, None


@pytest.mark.parametrize("run", [forward, backward])
def test_from_the_third_step_on_the_program_itself_is_launched(run, launched):
    ordinary, launches = launched
    steps, y, h_0 = run(T)
    (grid, first, options), (_, second, _) = ordinary
    assert [given["s"] for _, given, _ in ordinary] == list(steps[:2])
    assert set(options) == {"num_warps", "num_stages", "enable_fp_fusion"}
    if run is forward:
        assert first["h_ptr"] is h_0 and second["h_ptr"] is y
    kernel = lstm_step.lstm_step_fwd if run is forward else lstm_step.lstm_step_bwd
    address = {n: x.data_ptr() if isinstance(x, torch.Tensor) else x for n, x in second.items()}
    assert launches == [
        (grid, tuple((address | {"s": s})[name] for name in kernel.arg_names)) for s in steps[2:]
    ]


@pytest.mark.parametrize("T", [1, 2])
def test_few_steps(T, launched):
    ordinary, launches = launched
    forward(T)
    assert len(ordinary) == T and not launches


def test_without_a_program_every_launch_is_an_ordinary_one(monkeypatch):
    steps = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: steps.append(args[-6]))
    forward(T)
    assert steps == list(range(T))


def cell(dtype=torch.float32, offset=0, biased=True, size=H, state=True):
    def tensor(*shape):
        return torch.randn(offset + torch.Size(shape).numel())[offset:].view(shape).to(dtype)

    biases = (tensor(4 * size), tensor(4 * size)) if biased else (None, None)
    states = (tensor(B, size), tensor(B, size)) if state else (None, None)
    call = tensor(B, size), tensor(4 * size, size), tensor(4 * size, size), *biases, *states
    return call, lstm_step.cell_forward(*call, precision="float32", save=False)


def test_a_cell_is_launched_by_the_program_that_triton_found_for_its_like(launched, monkeypatch):
    monkeypatch.setattr(launch, "_programs", {})
    ordinary, launches = launched
    cell()
    assert len(ordinary) == 1 and not launches
    call, (h, c, _) = cell()
    ((grid, args),) = launches
    assert len(ordinary) == 1 and grid == ordinary[0][0]
    named = dict(zip(lstm_step.lstm_step_fwd.arg_names, args, strict=True))
    names = ("x_ptr", "w_ih_ptr", "w_ptr", "b_ih_ptr", "b_hh_ptr", "h_ptr", "c_0_ptr", "y_ptr", "c_n_ptr")
    assert [named[name] for name in names] == [x.data_ptr() for x in (*call, h, c)]
    assert all(named[name] == value for name, value in ordinary[0][1].items() if not name.endswith("_ptr"))
    # What a program depends on: another dtype, another start, what is there, what is compiled in.
    for other in ({"dtype": torch.float16}, {"offset": 1}, {"biased": False}, {"state": False}, {"size": 17}):
        found = len(ordinary)
        cell(**other)
        assert len(ordinary) == found + 1, other
        cell(**other)
        assert len(ordinary) == found + 1, other


def launched_again():
    """The kernels that modules give to `launch` and `launch_steps`, by their source."""
    for found in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"gatematch.kernels.{found.name}")
        for name in re.findall(r"\blaunch(?:_steps)?\(\s*([a-z]\w+),", inspect.getsource(module)):
            yield pytest.param(getattr(module, name), id=name)


@pytest.mark.parametrize("kernel", list(launched_again()))
def test_what_is_launched_again_is_specialised_on_none_of_its_numbers(kernel):
    """A program is found again by dtypes and addresses: a stride of 1, or of 16, must not make another."""
    numbers = [p for p in kernel.params if not (p.is_constexpr or p.name.endswith("_ptr"))]
    assert numbers and all(p.do_not_specialize for p in numbers)
