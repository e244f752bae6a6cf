"""Timing side by side: every function in turn, many times, so that a slow moment falls on all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


def measure(
    functions: Mapping[str, Callable[[], Any]], seconds: float, device: torch.device
) -> dict[str, np.ndarray]:
    """Seconds per call, one sample of each function a round, for at least `seconds` and 7 rounds.

    A sample repeats a function that is short, for about a millisecond.
    """

    def sample(function: Callable[[], Any], repeat: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeat):
            function()
        _wait(device)
        return (time.perf_counter() - start) / repeat

    repeats = {}
    for name, function in functions.items():
        function()
        repeats[name] = max(1, min(200, int(1e-3 / min(sample(function, 1) for _ in range(3)))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    # Whoever follows a function finds the caches as that one left them: a new order every round.
    shuffle = np.random.default_rng(0).permutation
    names = list(functions)
    while len(samples[names[0]]) < 7 or time.perf_counter() < end:
        for name in shuffle(names).tolist():
            samples[name].append(sample(functions[name], repeats[name]))
    return {name: np.array(times) for name, times in samples.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
