"""Choosing configurations by measurement, on a machine with a GPU: `gatematch-bench tune`."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.errors import TritonError
from triton.runtime.jit import JITFunction
from triton.testing import do_bench

from gatematch.bench.kernels import compiled, settle_keys, stop, workers
from gatematch.bench.launches import LAUNCHES, Entry, Launch, Sample, entries, launched_with, served
from gatematch.bench.results import describe_machine, writable, write_results, write_whole
from gatematch.kernels import config
from gatematch.kernels.config import Config

# A candidate must be faster than the best so far by this factor: less is noise.
GAIN = 1.02
# Largest difference of a candidate's results from the shipped configuration's, relative to the largest one.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BATCH = 32
# Of a recurrent kernel: enough that what comes before and after them hardly counts.
STEPS = 64


def neighbours(tile: Config) -> Iterator[Config]:
    """Configurations that differ in one number by one step."""
    for name, size in tile.blocks.items():
        # Tiles have a least and a largest side that makes sense; the other numbers are counts.
        low, high = (16, 1024 if name == "BLOCK_K" else 256) if name.startswith("BLOCK_") else (1, 2**13)
        for other in (size // 2, size * 2):
            if low <= other <= high:
                yield dataclasses.replace(tile, blocks={**tile.blocks, name: other})
    for warps in (tile.num_warps // 2, tile.num_warps * 2):
        if 1 <= warps <= 16:
            yield dataclasses.replace(tile, num_warps=warps)
    for stages in (tile.num_stages - 1, tile.num_stages + 1):
        if 1 <= stages <= 6:
            yield dataclasses.replace(tile, num_stages=stages)


class Climbed(NamedTuple):
    """Where a search ended: costs of its start and of the best, and how many others it asked for."""

    best: Config
    before: float
    after: float
    candidates: int


def climb(
    start: Config,
    cost: Callable[[Config], float],
    compile_all: Callable[[list[Config]], list[Config]],
    late: Callable[[], bool],
) -> Climbed | None:
    """The best configuration that single steps lead to, each to the best neighbour; costs are taken once.

    compile_all is given what will be timed next and returns those that can be. Once `late`, no more costs are
    taken: the best so far is returned, or None if not even `start` has one.
    """
    costs: dict[str, float] = {}

    def known(tile: Config) -> float:
        return costs.get(json.dumps(tile.numbers), math.inf)

    best, new = start, [start, *neighbours(start)]
    while new:
        able = compile_all(new)
        for tile in new:
            if late():
                break
            costs[json.dumps(tile.numbers)] = cost(tile) if tile in able else math.inf
        candidate = min(new, key=known)
        if known(candidate) * GAIN >= known(best):
            break
        best = candidate
        new = [tile for tile in neighbours(best) if json.dumps(tile.numbers) not in costs]
    return Climbed(best, known(start), known(best), len(costs) - 1) if costs else None


class Compiler:
    """Compiles configurations before they are timed, many at once, so that Triton's cache has them then."""

    def __init__(self, jobs: int, until: float) -> None:
        self.jobs = jobs
        self.until = until  # by time.monotonic()
        self.pool = workers(jobs)

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *raised: object) -> None:
        stop(self.pool)

    def late(self) -> bool:
        return time.monotonic() >= self.until

    def compile_all(self, kernel: str, arch: str, sample: Sample, tiles: list[Config]) -> list[Config]:
        """Those that were compiled or that the compiler refused, but not those that it crashes on."""
        ended = self._ended(kernel, arch, sample, tiles)
        # A crash ends all workers: what was not done is tried once more, each by itself.
        return [tile for tile in tiles if tile in ended or self._ended(kernel, arch, sample, [tile])]

    def _ended(self, kernel: str, arch: str, sample: Sample, tiles: list[Config]) -> list[Config]:
        ended: list[Config] = []
        if self.late():
            return ended
        left = None if self.until == math.inf else self.until - time.monotonic()
        try:
            futures = {self.pool.submit(compile_one, kernel, arch, sample, tile): tile for tile in tiles}
            for future in as_completed(futures, left):
                future.result()
                ended.append(futures[future])
        except BrokenProcessPool:
            self.pool = workers(self.jobs)
        except TimeoutError:
            pass
        return ended


def compile_one(kernel: str, arch: str, sample: Sample, tile: Config) -> None:
    """In a worker: what fails here fails again where it is timed, and is told there."""
    with suppress(Exception), launched_with(kernel, tile):
        compiled(kernel, arch, lambda: LAUNCHES[kernel](sample)())


def milliseconds(kernel: str, sample: Sample, shipped: Config) -> Callable[[Config], float]:
    """The median time of a configuration; infinite if it fails, spills or differs from the shipped one."""
    torch.manual_seed(0)
    call = LAUNCHES[kernel](sample)

    @functools.cache
    def expected() -> tuple[Tensor | None, ...]:
        with launched_with(kernel, shipped):
            return call()

    def cost(tile: Config) -> float:
        with launched_with(kernel, tile):
            try:
                right = expected()
                found, spills = _spills(call)
            except (TritonError, RuntimeError):  # it does not compile, or asks for more than there is
                return math.inf
            if spills or not all(map(same, found, right)):
                return math.inf
            return float(do_bench(call, return_mode="median"))

    def same(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return float((x - y).abs().max()) <= TOLERANCE[sample.dtype] * float(y.abs().max())

    return cost


def _spills(call: Launch) -> tuple[tuple[Tensor | None, ...], int]:
    """What a call returns, and the local memory that its kernels take."""
    binaries = []
    run = JITFunction.run

    def noted(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        binaries.append(run(self, *args, **kwargs))
        return binaries[-1]

    with mock.patch.object(JITFunction, "run", noted):
        found = call()
    return found, sum(binary.n_spills for binary in binaries)


def run_tune(
    device: torch.device,
    pattern: str,
    out: Path | None,
    results: Path | None,
    jobs: int | None,
    minutes: float | None,
    say: Callable[[str], None],
) -> Path:
    """Tune the shipped configurations that match, and write the device's list with what was found.

    Both files are written after every entry. Once the minutes are over, the entries left stay as they are.
    """
    if device.type != "cuda":
        raise ValueError(f"--device must be a GPU, for tune times kernels on it; got {device}")
    settle_keys()
    arch = config.architecture(device)
    out = out or config.CONFIGS / f"{arch}.json"
    writable("--out", out)
    machine = describe_machine(device)
    listed = copy.deepcopy(config.entries(arch))
    chosen = entries([arch], pattern)
    rows: list[dict[str, Any]] = []
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    with Compiler(jobs or os.cpu_count() or 1, until) as compiler:
        for entry in chosen:
            sample = timed_sample(entry, device)
            compile_all = functools.partial(compiler.compile_all, entry.kernel, arch, compiled_sample(sample))
            cost = milliseconds(entry.kernel, sample, entry.tile)
            found = climb(entry.tile, cost, compile_all, compiler.late)
            if found is None:
                break
            rows.append(row_of(entry, found))
            times = f"{found.before:.4f} -> {found.after:.4f} ms"
            say(f"{entry} {entry.shape}: {times} with {found.best.numbers}")
            if found.after < math.inf:
                date = datetime.date.today()
                source = f"{found.after:.4f} ms on {machine['device']}, {date}, {machine['commit']}"
                replace(listed, entry, found.best, source)
            write_whole(out, formatted(listed))
            if results is not None:
                write_results(results, machine, rows)
    if not rows:
        raise ValueError(f"--minutes must be enough to time one configuration; got {minutes}")
    if left := len(chosen) - len(rows):
        say(f"{minutes} minutes are over: {left} of {len(chosen)} entries are left as they were")
    return out


def timed_sample(entry: Entry, device: torch.device) -> Sample:
    features = entry.shape.get("D", 0), entry.shape.get("V", 0)
    sample = Sample(entry.dtype, entry.shape, *features, BATCH, str(device), steps=STEPS)
    if not served(entry.kernel, entry.arch, sample):  # what is for tensor cores alone
        sample = dataclasses.replace(sample, precision="tf32")
    return sample


def compiled_sample(sample: Sample) -> Sample:
    """What compiles to the same kernels without a GPU, in a few steps."""
    return dataclasses.replace(sample, device="cpu", steps=Sample.steps)


def row_of(entry: Entry, found: Climbed) -> dict[str, Any]:
    shape = ",".join(f"{letter}={size}" for letter, size in entry.shape.items())

    def finite(cost: float) -> float | None:
        return cost if cost < math.inf else None

    return {
        "case": f"tune/{entry}/{shape}",
        "kernel": entry.kernel,
        "arch": entry.arch,
        "dtype": str(entry.dtype).removeprefix("torch."),
        "shape": dict(entry.shape),
        "before_ms": finite(found.before),
        "after_ms": finite(found.after),
        "candidates": found.candidates,
        "config_before": entry.tile.numbers,
        "config_after": found.best.numbers,
    }


def replace(listed: dict[str, list[dict[str, Any]]], entry: Entry, tile: Config, source: str) -> None:
    for item in listed[entry.kernel]:
        if getattr(torch, item["dtype"]) == entry.dtype and item["shape"] == entry.shape:
            item.update(config=dataclasses.asdict(tile), source=source)


def formatted(listed: dict[str, list[dict[str, Any]]]) -> str:
    """A list as its file holds it, a configuration a line."""
    kernels = [
        f' "{kernel}": [\n' + ",\n".join(f"  {json.dumps(item)}" for item in items) + "\n ]"
        for kernel, items in listed.items()
    ]
    return '{"kernels": {\n' + ",\n".join(kernels) + "\n}}\n"
