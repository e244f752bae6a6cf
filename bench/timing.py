"""Timing side by side: every function in turn, many times, so that a slow moment falls on all of them.

On a GPU device events are read, and there are three ways to call:

    warm     one call after the other, as the host issues them: its launches count where they are slower
    cold     each call on an L2 cache that holds nothing of its inputs, and issued before the device is free
             for it, so that only the device's time counts
    graph    `warm`, of a CUDA graph's replays
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import numpy as np
import torch

# Rounds at least. On a GPU time is rare, and its events scatter less than the clock of a busy host.
_ROUNDS = {"cpu": 7, "cuda": 3}
# Seconds: a sample of shorter calls repeats them; before longer ones nothing has to keep the device busy,
# since what the host takes to issue them does not show.
_SHORT, _LONG = 1e-3, 5e-2
Call = Callable[[], Any]
Sampler = Callable[[], float]


def measure(
    functions: Mapping[str, Call], seconds: float, device: torch.device, timing: str = "warm"
) -> dict[str, np.ndarray]:
    """Seconds per call, one sample of each function a round, for at least `seconds` and 7 rounds, on a GPU 3.

    A sample repeats a function that is short, for about a millisecond; a cold one cannot be repeated.
    """
    samplers = {}
    for name, function in functions.items():
        function()
        samplers[name] = _sampler(function, device, timing)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    # Whoever follows a function finds the caches as that one left them: a new order every round.
    shuffle = np.random.default_rng(0).permutation
    names = list(functions)
    while len(samples[names[0]]) < _ROUNDS[device.type] or time.perf_counter() < end:
        for name in shuffle(names).tolist():
            samples[name].append(samplers[name]())
    return {name: np.array(times) for name, times in samples.items()}


def _sampler(function: Call, device: torch.device, timing: str) -> Sampler:
    if timing == "cold":
        return _ColdSampler(function, device)
    timed = device_seconds if device.type == "cuda" else _host_seconds
    shortest = timed(function, device)
    if shortest < _SHORT:
        shortest = min(shortest, *(timed(function, device) for _ in range(2)))
    repeat = max(1, min(200, int(_SHORT / shortest)))
    if device.type == "cuda" and shortest < _LONG:
        # Behind a call of its own, or it would be charged for what the host needs to issue it.
        return lambda: device_seconds(function, device, repeat, before=function)
    return lambda: timed(function, device, repeat)


def _host_seconds(function: Call, device: torch.device, repeat: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        function()
    return (time.perf_counter() - start) / repeat


def device_seconds(
    function: Call, device: torch.device, repeat: int = 1, before: Call = lambda: None
) -> float:
    """Seconds a call between two events of the device, `before` being issued ahead of the first."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before()
    start.record()
    for _ in range(repeat):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeat


class _ColdSampler:
    """Writes through L2 before each call, often enough that the host has issued the call meanwhile."""

    def __init__(self, function: Call, device: torch.device) -> None:
        self.function, self.device = function, device
        size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 1 << 28)
        self.cache = torch.empty(size, dtype=torch.int8, device=device)
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        issue = time.perf_counter() - start
        write = min(device_seconds(self.cache.zero_, device) for _ in range(3))
        self.writes = 1 + ceil(1.5 * issue / write)

    def __call__(self) -> float:
        return device_seconds(self.function, self.device, before=self._flush)

    def _flush(self) -> None:
        for _ in range(self.writes):
            self.cache.zero_()


def graphed(function: Call, device: torch.device) -> Call:
    """The replay of a CUDA graph of one call."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # what is set up at the first calls must not be captured
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most memory that `function` holds at once, beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    # Keep the profiler's own notes off the terminal.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(max(0, held.max(initial=0)))
