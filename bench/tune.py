"""Choosing configurations by measurement, on a machine with a GPU: `gatematch-bench tune`."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.errors import TritonError
from triton.runtime.jit import JITFunction
from triton.testing import do_bench

from gatematch.bench.launches import LAUNCHES, Entry, Launch, Sample, entries, launched_with
from gatematch.bench.results import describe_machine, writable
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


def climb(start: Config, cost: Callable[[Config], float]) -> tuple[Config, float]:
    """The best configuration that single steps lead to, each to the best neighbour; costs are taken once."""
    costs = {json.dumps(start.options): cost(start)}
    best, lowest = start, costs[json.dumps(start.options)]
    while True:
        candidates = []
        for candidate in neighbours(best):
            key = json.dumps(candidate.options)
            if key not in costs:
                costs[key] = cost(candidate)
                candidates.append((costs[key], candidate))
        if not candidates:
            return best, lowest
        new, candidate = min(candidates, key=lambda pair: pair[0])
        if new * GAIN >= lowest:
            return best, lowest
        best, lowest = candidate, new


def milliseconds(kernel: str, sample: Sample, shipped: Config) -> Callable[[Config], float]:
    """The median time of a configuration; infinite if it fails, spills or differs from the shipped one."""
    torch.manual_seed(0)
    call = LAUNCHES[kernel](sample)
    with launched_with(kernel, shipped):
        expected = call()

    def cost(tile: Config) -> float:
        with launched_with(kernel, tile):
            try:
                found, spills = _spills(call)
            except (TritonError, RuntimeError):  # it does not compile, or asks for more than there is
                return math.inf
            if spills or not all(map(same, found, expected)):
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


def run_tune(device: torch.device, pattern: str, out: Path | None, say: Callable[[str], None]) -> Path:
    """Tune the shipped configurations that match, and write the device's list with what was found."""
    if device.type != "cuda":
        raise ValueError(f"--device must be a GPU, for tune times kernels on it; got {device}")
    arch = config.architecture(device)
    out = out or config.CONFIGS / f"{arch}.json"
    writable("--out", out)
    machine = describe_machine(device)
    listed = copy.deepcopy(config.entries(arch))
    for entry in entries([arch], pattern):
        shape = entry.shape
        features = shape.get("D", 0), shape.get("V", 0)
        sample = Sample(entry.dtype, shape, *features, BATCH, str(device), steps=STEPS)
        cost = milliseconds(entry.kernel, sample, entry.tile)
        before = cost(entry.tile)
        tile, after = climb(entry.tile, cost)
        say(f"{entry} {shape}: {before:.4f} -> {after:.4f} ms with {tile.options}")
        source = f"{after:.4f} ms on {machine['device']}, {datetime.date.today()}, {machine['commit']}"
        replace(listed, entry, tile, source)
    out.write_text(formatted(listed))
    return out


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
