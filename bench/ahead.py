"""Compiling ahead, in many processes, what `speed` will call on a GPU.

One after the other the kernels and torch.compile's peers would take longer than their timing. So processes
take turns at the cases and call what is compiled once; what they leave in Triton's and Inductor's caches on
disk is found by the one process that then has the device to itself.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from gatematch.kernels.precision import Switch

from .cases import build
from .kernels import settle_keys
from .problems import COMPILED, Case
from .speed import MODES, run

PROCESSES = os.cpu_count() or 1
# Seconds for all: what is not compiled by then is compiled where it is timed.
LIMIT = 90.0
# Of an LSTM. Its kernels are the same for all numbers of steps that 16 divides, but for a single one.
_STEPS = 16


def compile_ahead(cases: Sequence[Case], device: torch.device, compiled: bool, limit: float = LIMIT) -> str:
    """Fill the caches, and say in a sentence how far that came.

    No failure counts, be it for want of memory: it is seen again, and told, where the case is timed.
    """
    began = time.monotonic()
    settle_keys()  # here, too: the caches are read by this process
    distinct = in_turns(cases)
    spawn: Any = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    taken, done = spawn.Value("i", 0), spawn.Value("i", 0)
    work = distinct, device, compiled, taken, done
    processes = [spawn.Process(target=take_turns, args=work) for _ in range(min(PROCESSES, len(distinct)))]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, began + limit - time.monotonic()))
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join(5.0)
    seconds = time.monotonic() - began
    return (
        f"compiled ahead: {done.value} of {len(distinct)}, by {len(processes)} processes in {seconds:.0f} s"
    )


def in_turns(cases: Sequence[Case]) -> list[Case]:
    """One case of everything that compiles to the same, in few steps. Batch sizes of a layer, of which some
    have a kernel in common, are far from each other: processes side by side would compile it twice.
    """
    found: dict[str, Case] = {}
    for case in cases:
        shape = dict(case.shape)
        if shape.get("T", 1) > _STEPS:
            shape["T"] = _STEPS
        found.setdefault(repr((case.name, shape, case.numbers, case.options)), replace(case, shape=shape))
    turns: dict[str, int] = {}
    order = []
    for case in found.values():
        key = repr((case.name, case.numbers, [case.shape.get(letter) for letter in "HD"]))
        turns[key] = turns.get(key, -1) + 1
        order.append((turns[key], case))
    return [case for _, case in sorted(order, key=lambda pair: pair[0])]


def take_turns(cases: list[Case], device: torch.device, compiled: bool, taken: Any, done: Any) -> None:
    """In a process: call the next case that nobody has taken, until there is none or the device is lost."""
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read when Inductor is imported
    settle_keys()
    with torch.cuda.device(device):
        while (case := _next(cases, taken)) is not None:
            with suppress(Exception), Switch(torch.backends.cudnn.rnn).at(case.precision):
                call_once(case, device, compiled)
            torch._dynamo.reset()
            try:
                torch.cuda.synchronize(device)
            except RuntimeError:
                return
            torch.cuda.empty_cache()
            with done.get_lock():
                done.value += 1


def _next(cases: list[Case], taken: Any) -> Case | None:
    with taken.get_lock():
        taken.value += 1
        return cases[taken.value - 1] if taken.value <= len(cases) else None


def call_once(case: Case, device: torch.device, compiled: bool) -> None:
    """Ours, and the peers that torch.compile makes, in both modes; each that fails leaves the others."""
    problem = build(case, device, compiled)
    with torch.no_grad():
        upstream = torch.randn_like(problem.ours())
    peers = [problem.peers[name] for name in COMPILED if name in problem.peers]
    for mode in MODES:
        for module in problem.modules:
            module.train(mode != "forward")
        for function, wrt in [(problem.ours, problem.ours_wrt), *peers]:
            with suppress(Exception):
                run(function, wrt, upstream, mode)
