"""What a barrier over a whole grid costs: `gatematch-bench barrier`, on a machine with a GPU.

The persistent LSTM kernels wait at one in every time step. Here it is measured by itself, made of their
functions and launched as they are, in two variants:

    barrier    arriving and waiting, nothing else
    exchange   each program also stores its piece of h before, and after it loads the pieces of all and adds
               them up, which stands for the product that needs them

The time of a step is (t(2n) - t(n)) / n for n steps, in which the launch cancels.
No grid has more programs than the GPU has multiprocessors, so all of them run at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gatematch.kernels.cooperative import arrive, wait_for
from gatematch.kernels.recurrence import processors

from .progress import track

WARPS = (4, 8)
STEPS = 1000
REPEATS = 25
# A piece of h as most configurations of the forward kernel cut it: 16 rows of 16 units in 16 bits, as words.
BLOCK_B, WORDS = 16, 8
# What is added up stays far below 2**31.
MODULUS = tl.constexpr(1021)


@triton.jit(do_not_specialize=["steps"])
def barriers(counters_ptr, found_ptr, steps, PROGRAMS: tl.constexpr):
    """`steps` barriers. found [PROGRAMS]: at how many all had arrived when a program had passed the last."""
    for s in tl.range(0, steps, num_stages=1):
        arrive(counters_ptr + s)
        wait_for(counters_ptr + s, PROGRAMS)
    BLOCK: tl.constexpr = 1024
    found = 0
    for first in range(0, steps, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        arrived = tl.load(counters_ptr + slot, slot < steps, other=0, cache_modifier=".cg")
        found += tl.sum((arrived == PROGRAMS).to(tl.int32), 0)
    tl.store(found_ptr + tl.program_id(0), found)


@triton.jit(do_not_specialize=["steps"])
def exchanges(
    counters_ptr, found_ptr, exchange_ptr, steps,
    PROGRAMS: tl.constexpr, WORDS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`steps` steps of a recurrence, whose h all programs need. found [PROGRAMS, BLOCK_B]: the last h.

    All words of a row of a program are the same number: the sum of the row's h of the step before, plus the
    program's and the row's own numbers, modulo MODULUS. Whoever reads a piece too early ends with another.
    """
    COLUMNS: tl.constexpr = PROGRAMS * WORDS
    program = tl.program_id(0)
    b = tl.arange(0, BLOCK_B)
    word = tl.arange(0, WORDS)
    own = b[:, None] * COLUMNS + program * WORDS + word[None, :]
    others = b[:, None] * COLUMNS + tl.arange(0, BLOCK_K)[None, :]
    h = tl.zeros((BLOCK_B,), tl.int32)
    for s in tl.range(0, steps, num_stages=1):
        h_ptr = exchange_ptr + (s % 2) * BLOCK_B * COLUMNS
        tl.store(h_ptr + own, h[:, None] + 0 * word[None, :])
        arrive(counters_ptr + s)
        wait_for(counters_ptr + s, PROGRAMS)
        chunks = ()
        for j in tl.static_range(COLUMNS // BLOCK_K):
            chunks += (tl.load(h_ptr + others + j * BLOCK_K, cache_modifier=".cg"),)
        total = tl.zeros((BLOCK_B, BLOCK_K), tl.int32)
        for j in tl.static_range(COLUMNS // BLOCK_K):
            total += chunks[j]
        h = (tl.sum(total, 1) + program + b) % MODULUS
    tl.store(found_ptr + program * BLOCK_B + b, h)


class Setting(NamedTuple):
    variant: str
    programs: int
    warps: int

    @property
    def case(self) -> str:
        return f"barrier/{self.variant}/programs {self.programs}"


def settings(most: int) -> list[Setting]:
    """Grids of 1, 2, 4 to 128 programs, and of as many as there are multiprocessors, which none exceeds."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size < most] + [most]
    return [
        Setting(variant, size, warps)
        for size in sizes
        for warps in WARPS
        for variant in ("barrier", "exchange")
    ]


def prepared(setting: Setting, steps: int, device: torch.device) -> tuple[Callable[[], Any], Tensor]:
    """A launch, for once: its counters begin at zero. And where its programs store what they found."""
    variant, programs, warps = setting
    counters = torch.zeros(steps, dtype=torch.int32, device=device)
    options = {"PROGRAMS": programs, "num_warps": warps, "launch_cooperative_grid": True}
    if variant == "barrier":
        found = torch.empty(programs, dtype=torch.int32, device=device)
        return lambda: barriers[(programs,)](counters, found, steps, **options), found
    columns = programs * WORDS
    found = torch.empty(programs, BLOCK_B, dtype=torch.int32, device=device)
    exchange = torch.empty(2, BLOCK_B, columns, dtype=torch.int32, device=device)
    options |= {"WORDS": WORDS, "BLOCK_B": BLOCK_B, "BLOCK_K": min(32, columns & -columns)}
    options["maxnreg"] = 255  # or the compiler spares registers: few loads would be on their way at once
    return lambda: exchanges[(programs,)](counters, found, exchange, steps, **options), found


def expected(setting: Setting, steps: int) -> Tensor:
    """What the programs find where every barrier waits for all."""
    variant, programs, _ = setting
    if variant == "barrier":
        return torch.full((programs,), steps, dtype=torch.int32)
    h = np.zeros((programs, BLOCK_B), np.int64)
    apart = np.arange(programs)[:, None] + np.arange(BLOCK_B)
    for _ in range(steps):
        h = (WORDS * h.sum(0) + apart) % MODULUS.value
    return torch.from_numpy(h).int()


def check(setting: Setting, steps: int, device: torch.device, seconds: float = 0.1) -> None:
    """Look at what the programs find, again and again, which also brings the GPU's clocks up.

    Raises:
        RuntimeError: some program went on before all had arrived.
    """
    want = expected(setting, steps)
    end = None
    while end is None or time.perf_counter() < end:
        launch, found = prepared(setting, steps, device)
        launch()
        if not torch.equal(found.cpu(), want):
            raise RuntimeError(f"{setting.case}: a program passed a barrier before all had arrived")
        end = end or time.perf_counter() + seconds  # the first launch compiles


def run_barrier(device: torch.device) -> list[dict[str, Any]]:
    """A row for every variant, size of the grid and number of warps, right before it is timed.

    Raises:
        ValueError: the device is no GPU whose launches can be cooperative.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"--device must be an NVIDIA GPU, for barrier times a kernel on it; got {device}")
    with torch.cuda.device(device):
        chosen = track(settings(processors(device)), "barrier")
        return [time_setting(setting, STEPS, REPEATS, device) for setting in chosen]


def time_setting(setting: Setting, steps: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """The row of a setting, on the current device, after its result was right."""
    check(setting, 2 * steps, device)
    # Nothing waits in between: a launch is queued long before its turn, so that the host's time is not in it.
    pairs = [[events(setting, n * steps, device) for n in (1, 2)] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    times = [[start.elapsed_time(end) for start, end in pair] for pair in pairs]
    samples = np.array([1e6 * (twice - once) / steps for once, twice in times])
    low, median, high = np.percentile(samples, [25, 50, 75])
    return {
        "case": setting.case,
        **setting._asdict(),
        "steps": steps,
        "ns": float(median),
        "spread": float(high - low),
        "samples": len(samples),
    }


def events(setting: Setting, steps: int, device: torch.device) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Those before and after a launch, which this queues."""
    launch, _ = prepared(setting, steps, device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    launch()
    end.record()
    return start, end
