"""The launches of the kernel that takes one for each step, with a stub for what Triton compiles."""

import pytest
import torch
from triton.runtime.jit import JITFunction

from gatematch.kernels import config, lstm_step

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
    assert set(options) == {"num_warps", "num_stages"}
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
