"""`gatematch-bench speed`: ours beside torch's own, in one process, turn by turn; correctness first."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from gatematch.kernels import config
from gatematch.kernels.config import Config
from gatematch.precision import Switch

from .cases import build, cases_of
from .check import largest
from .floors import add_floors
from .problems import COMPILED, MODES, Case, Function, Problem
from .progress import track
from .results import matches
from .timing import Call, graphed, measure, peak_bytes

# A row counts as wrong when its gradients, relative to the largest, are off by this many times its bound.
GRADIENT = 10
# Of an LSTM compiled ahead: its kernels are the same for all numbers of steps that 16 divides.
_STEPS = 16


def chosen(device: torch.device, pattern: str) -> list[Case]:
    """The cases whose name, data and dtype match the regular expression.

    Raises:
        ValueError: the pattern is no regular expression, or matches nothing.
    """
    cases, wanted = cases_of(device), matches("--filter", pattern)
    if not (found := [case for case in cases if wanted(case.label)]):
        labels = dict.fromkeys(case.label for case in cases)
        raise ValueError(f"--filter must match a case, one of {', '.join(labels)}; got {pattern!r}")
    return found


def run_speed(
    cases: list[Case],
    device: torch.device,
    seconds: float = 1.0,
    compiled: bool = True,
    rates: Mapping[str, float] | None = None,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Rows for every case in both modes, each timed in every way that it names.

    rates: what the device does at best, see ceilings.py; rows then say what share of that they reach.
    keep: is called with all rows so far after every case.
    """
    rows: list[dict[str, Any]] = []
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        compiled_for = ""
        for case in track(cases, "speed"):
            problem = None  # that of the case before goes first
            # What was compiled for other data of the same shape serves again.
            if (kind := repr((case.name, case.shape, case.numbers))) != compiled_for:
                torch._dynamo.reset()
                compiled_for = kind
            try:
                torch.manual_seed(0)
                with Switch(torch.backends.cudnn.rnn).at(case.precision):
                    problem = build(case, device, compiled)
                    for mode in MODES:
                        for row in time_problem(case, problem, mode, device, seconds, rates):
                            rows.append(row)  # one by one: what was timed before a failure stays
            except Exception as failure:
                # Time on a GPU is rare: what fails there says so in its row, and the others go on.
                if device.type != "cuda":
                    raise
                rows.append(
                    _head(case) | {"ours": {"status": f"failed: {_first_line(failure)}"}, "peers": {}}
                )
                keep(rows)
                torch.cuda.synchronize(device)  # raises where the device is lost: all others would fail, too
            keep(rows)
    return rows


def in_turns(cases: list[Case]) -> list[Case]:
    """For compile_ahead one case of everything that compiles to the same, in few steps.

    Batch sizes of a layer, of which some have a kernel in common, are far from each other: side by side it
    would be compiled twice.
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


def call_once(case: Case, device: torch.device, compiled: bool) -> None:
    """Ours, and the peers that torch.compile makes, in both modes; each that fails leaves the others."""
    torch._dynamo.reset()
    with Switch(torch.backends.cudnn.rnn).at(case.precision):
        problem = build(case, device, compiled)
        with torch.no_grad():
            upstream = torch.randn_like(problem.ours())
        peers = [problem.peers[name] for name in COMPILED if name in problem.peers]
        for mode in MODES:
            for module in problem.modules:
                module.train(mode != "forward")
            for function, wrt in [(problem.ours, problem.ours_wrt), *peers]:
                with contextlib.suppress(Exception):
                    run(function, wrt, upstream, mode)


def run(function: Function, wrt: list[Tensor], upstream: Tensor, mode: str) -> tuple[Tensor, ...]:
    if mode == "forward":
        with torch.no_grad():
            return (function(),)
    y = function()
    return (y, *torch.autograd.grad(y, wrt, upstream))


def errors(problem: Problem, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> tuple[float, float | None]:
    """Largest error of the output, absolute or relative as the problem says, and of the gradients."""
    parts: tuple[Callable[[Tensor], Tensor] | None, ...] = (None,) * len(got)
    if problem.part:
        parts = problem.part, *problem.wrt_parts
    relative = []
    for x, y, part in zip(got, want, parts, strict=False):
        difference = ((part(x) if part else x).detach().double() - y.detach()).abs().max()
        relative.append((float(difference), float(y.detach().abs().max())))
    (error, size), *gradients = relative
    error = error / size if problem.relative else error
    if not gradients:
        return error, None
    return error, largest(e / max(size, 1e-30) for e, size in gradients)


@contextlib.contextmanager
def noted() -> Iterator[dict[str, Config]]:
    """The configurations that kernels are launched with inside, by the kernel's name."""
    used: dict[str, Config] = {}
    choose = config.choose

    def noting(kernel: str, *args: Any) -> Config:
        used[kernel] = choose(kernel, *args)
        return used[kernel]

    with mock.patch.object(config, "choose", noting):
        yield used


def time_problem(
    case: Case,
    problem: Problem,
    mode: str,
    device: torch.device,
    seconds: float,
    rates: Mapping[str, float] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for every way that the case is timed."""
    on_gpu = device.type == "cuda"
    for module in problem.modules:
        module.train(mode != "forward")
    with torch.no_grad():
        y = problem.ours()
    upstream = torch.randn_like(y)
    part = problem.part
    # Of what is not compared the gradient is zero: what else depends on it is then right as a whole.
    checked = part.alone(upstream) if part else upstream
    exact_upstream = (part(upstream) if part else upstream).double()
    want = run(problem.exact, problem.exact_wrt, exact_upstream, mode)

    def entry(function: Function, wrt: list[Tensor], bound: float) -> tuple[dict[str, Any], Call]:
        def call() -> tuple[Tensor, ...]:
            return run(function, wrt, upstream, mode)

        error, gradient_error = errors(problem, run(function, wrt, checked, mode), want)
        right = error <= bound and (gradient_error is None or gradient_error <= GRADIENT * bound)
        result = {"error": error, "gradient_error": gradient_error, "status": "timed" if right else "wrong"}
        if right:
            result["peak_bytes"] = peak_bytes(call, device)
        return result, call

    run(problem.ours, problem.ours_wrt, upstream, mode)  # which kernel can serve is found out here, once
    calls: dict[str, Call] = {}
    with noted() as used:
        ours, calls["ours"] = entry(problem.ours, problem.ours_wrt, problem.bound)
    peers: dict[str, dict[str, Any]] = {}
    for name, (function, wrt) in problem.peers.items():
        try:
            peers[name], call = entry(function, wrt, problem.peer_bound)
        except Exception as failure:  # other people's code, and compilers
            peers[name] = {"status": f"failed: {_first_line(failure)}"}
            continue
        # On a GPU what is fast and wrong is what many run, so its time is kept, under another name.
        if peers[name]["status"] == "timed" or on_gpu:
            calls[name] = call
    if problem.random is not None:
        function, wrt = problem.random
        calls["random rows"] = lambda: run(function, wrt, upstream, mode)

    row = _head(case) | {
        "mode": mode,
        "unit": "ms",
        "kernel": " + ".join(used) or "torch",
        "bound": problem.bound,
        "ours": ours,
        "peers": peers | {name: {"status": f"skipped: {reason}"} for name, reason in problem.skipped.items()},
    }
    if not on_gpu:
        add_times(row, measure(calls, seconds, device) if ours["status"] == "timed" else {})
        yield row
        return
    row["configs"] = {name: tile.numbers for name, tile in used.items()}
    for timing in case.timings:
        timed = copy.deepcopy(row) | {"timing": timing}
        if ours["status"] == "timed":
            ready = _captured(calls, timed["peers"], device) if timing == "graph" else calls
            add_times(timed, measure(ready, seconds, device, timing))
            add_floors(timed, problem.work.get(mode), rates)
        yield timed


def _head(case: Case) -> dict[str, Any]:
    return {
        "case": case.name,
        "data": case.data,
        "shape": case.shape,
        "options": {key: value for key, value in case.options.items() if key != "compiled"},
        "dtype": case.numbers,
    }


def _first_line(failure: Exception) -> str:
    return (str(failure).splitlines() or [type(failure).__name__])[0]


def _captured(
    calls: Mapping[str, Call], peers: dict[str, dict[str, Any]], device: torch.device
) -> dict[str, Call]:
    """The calls as replays of graphs, but for the peers that cannot be captured."""
    ready = {}
    for name, call in calls.items():
        try:
            ready[name] = graphed(call, device)
        except RuntimeError as failure:
            if name not in peers:
                raise
            peers[name] = {"status": f"failed: {_first_line(failure)}"}
    return ready


def add_times(row: dict[str, Any], samples: dict[str, np.ndarray]) -> None:
    """Medians, spreads and ratios."""
    if not samples:
        return
    ours, peers = row["ours"], row["peers"]
    mine = samples.pop("ours")
    ours.update(_statistics(mine))
    if "random rows" in samples:
        row["time_to_random"] = float(np.median(mine / samples.pop("random rows")))
    for name, times in samples.items():
        # Rounds are paired, so a slow moment of the machine cancels in the ratio.
        ratio = "ratio" if peers[name]["status"] == "timed" else "wrong_ratio"
        peers[name].update(_statistics(times) | {ratio: float(np.median(times / mine))})


def _statistics(seconds: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(seconds * 1e3, [25, 50, 75])
    return {"median": float(median), "spread": float(high - low), "samples": len(seconds)}
