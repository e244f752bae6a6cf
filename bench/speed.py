"""`gatematch-bench speed`: ours beside torch's own, in one process, turn by turn; correctness first."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from .cases import CASES, Case, Function, Problem, build
from .check import largest
from .timing import measure, peak_bytes

MODES = ("forward", "forward+backward")
# A row counts as wrong when its gradients, relative to the largest, are off by this many times its bound.
GRADIENT = 10


def run_speed(
    device: torch.device, pattern: str = "", seconds: float = 1.0, compiled: bool = True
) -> list[dict[str, Any]]:
    """Rows for every case whose name, data or dtype matches the regular expression, in both modes.

    Raises:
        ValueError: the pattern is no regular expression, or matches nothing.
    """
    try:
        chosen = [case for case in CASES if re.search(pattern, label(case))]
    except re.error as error:
        raise ValueError(f"filter must be a regular expression; got {pattern!r}: {error}") from None
    if not chosen:
        raise ValueError(f"filter must match a case, one of {', '.join(map(label, CASES))}; got {pattern!r}")
    rows: list[dict[str, Any]] = []
    for case in track(chosen, description="speed", transient=True):
        torch.manual_seed(0)
        problem = build(case, device, compiled)
        rows.extend(time_problem(case, problem, mode, device, seconds) for mode in MODES)
        torch._dynamo.reset()
    return rows


def label(case: Case) -> str:
    dtype = str(case.dtype).removeprefix("torch.")
    return f"{case.name} {case.data} {dtype}"


def run(function: Function, wrt: list[Tensor], upstream: Tensor, mode: str) -> tuple[Tensor, ...]:
    if mode == "forward":
        with torch.no_grad():
            return (function(),)
    y = function()
    return (y, *torch.autograd.grad(y, wrt, upstream))


def errors(problem: Problem, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> tuple[float, float | None]:
    """Largest error of the output, absolute or relative as the problem says, and of the gradients."""
    relative = []
    for x, y in zip(got, want, strict=True):
        part = problem.part(x) if x.shape != y.shape else x
        difference = (part.detach().double() - y.detach()).abs().max()
        relative.append((float(difference), float(y.detach().abs().max())))
    (error, size), *gradients = relative
    error = error / size if problem.relative else error
    if not gradients:
        return error, None
    return error, largest(e / max(size, 1e-30) for e, size in gradients)


def time_problem(
    case: Case, problem: Problem, mode: str, device: torch.device, seconds: float
) -> dict[str, Any]:
    with torch.no_grad():
        y = problem.ours()
    upstream = torch.randn_like(y)
    want = run(problem.exact, problem.exact_wrt, problem.part(upstream).double(), mode)

    def entry(
        function: Function, wrt: list[Tensor], bound: float
    ) -> tuple[dict[str, Any], Callable[[], Any]]:
        def call() -> tuple[Tensor, ...]:
            return run(function, wrt, upstream, mode)

        error, gradient_error = errors(problem, call(), want)
        right = error <= bound and (gradient_error is None or gradient_error <= GRADIENT * bound)
        result = {"error": error, "gradient_error": gradient_error, "status": "timed" if right else "wrong"}
        if right:
            result["peak_bytes"] = peak_bytes(call, device)
        return result, call

    calls = {}
    ours, calls["ours"] = entry(problem.ours, problem.ours_wrt, problem.bound)
    peers: dict[str, dict[str, Any]] = {}
    for name, (function, wrt) in problem.peers.items():
        try:
            peers[name], call = entry(function, wrt, problem.peer_bound)
        except (RuntimeError, NotImplementedError) as error:
            peers[name] = {"status": f"failed: {str(error).splitlines()[0]}"}
            continue
        if peers[name]["status"] == "timed":
            calls[name] = call
    if problem.random is not None:
        function, wrt = problem.random
        calls["random rows"] = lambda: run(function, wrt, upstream, mode)

    row: dict[str, Any] = {
        "case": case.name,
        "data": case.data,
        "shape": case.shape,
        "options": {key: value for key, value in case.options.items() if key != "compiled"},
        "dtype": str(case.dtype).removeprefix("torch."),
        "mode": mode,
        "unit": "ms",
        "kernel": "torch",
        "bound": problem.bound,
        "ours": ours,
        "peers": peers | {name: {"status": f"skipped: {reason}"} for name, reason in problem.skipped.items()},
    }
    if ours["status"] == "timed":
        samples = measure(calls, seconds, device)
        mine = samples.pop("ours")
        ours.update(_statistics(mine))
        if "random rows" in samples:
            row["time_to_random"] = float(np.median(mine / samples.pop("random rows")))
        for name, times in samples.items():
            # Rounds are paired, so a slow moment of the machine cancels in the ratio.
            peers[name].update(_statistics(times), ratio=float(np.median(times / mine)))
    return row


def _statistics(seconds: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(seconds * 1e3, [25, 50, 75])
    return {"median": float(median), "spread": float(high - low), "samples": len(seconds)}


def speed_table(rows: list[dict[str, Any]]) -> Table:
    """Ratio above 1: we are faster."""
    table = Table(title="speed: ours, and each peer's time divided by ours (above 1 we are faster)")
    for column in (
        "case",
        "data",
        "shape",
        "mode",
        "ours ms",
        "± ms",
        "error",
        "peak MiB",
        "peers",
        "to random",
    ):
        table.add_column(
            column, justify="left" if column in ("case", "data", "shape", "mode", "peers") else "right"
        )
    for row in rows:
        ours = row["ours"]
        timed = ours["status"] == "timed"
        table.add_row(
            row["case"] + ("" if row["dtype"] == "float32" else f" {row['dtype']}"),
            row["data"],
            " ".join(f"{letter}{size}" for letter, size in row["shape"].items()),
            row["mode"],
            f"{ours['median']:.3f}" if timed else "WRONG",
            f"{ours['spread']:.3f}" if timed else "",
            f"{ours['error']:.0e}",
            f"{ours['peak_bytes'] / 2**20:.1f}" if timed else "",
            "\n".join(_peer(name, peer) for name, peer in row["peers"].items()),
            f"{row['time_to_random']:.2f}" if "time_to_random" in row else "",
        )
    return table


def _peer(name: str, peer: dict[str, Any]) -> str:
    if peer["status"] == "timed":
        return f"{name} {peer['ratio']:.2f}x"
    if peer["status"] == "wrong":
        return f"{name} wrong by {peer['error']:.0e}"
    return f"{name} {peer['status']}"


def speed_summary(rows: list[dict[str, Any]]) -> list[str]:
    """The worst row against each peer, the share of rows at least as fast, and what was wrong."""
    lines = []
    names = sorted({name for row in rows for name, peer in row["peers"].items() if "ratio" in peer})
    for name in names:
        timed = [(row["peers"][name]["ratio"], row) for row in rows if "ratio" in row["peers"].get(name, {})]
        worst, row = min(timed, key=lambda pair: pair[0])
        mean = float(np.exp(np.mean(np.log([ratio for ratio, _ in timed]))))
        where = f"{row['case']} {row['data']} {row['mode']}"
        lines.append(f"{name}: {mean:.2f}x over {len(timed)} rows, worst {worst:.2f}x ({where})")
    slower = [row for row in rows if "time_to_random" in row]
    if slower:
        worst_row = max(slower, key=lambda row: row["time_to_random"])
        lines.append(
            f"text and offset rows: at most {worst_row['time_to_random']:.2f}x the time of random rows"
            f" ({worst_row['case']} {worst_row['data']} {worst_row['mode']})"
        )
    lines += [f"WRONG: {row['case']} {row['mode']}" for row in rows if row["ours"]["status"] != "timed"]
    return lines
