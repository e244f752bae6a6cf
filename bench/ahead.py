"""Compiling ahead, in many processes, what a command will call on a GPU.

One after the other, compilations would take longer than all the rest. So processes share the cases and call
each once, which fills Triton's and Inductor's caches on disk; the process that measures reads those.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from .kernels import settle_keys

PROCESSES = os.cpu_count() or 1
# Seconds for all: what is not compiled by then is compiled where it is needed.
LIMIT = 90.0


def compile_ahead(
    parts: Sequence[Any], call: Callable[[Any], object], device: torch.device, limit: float = LIMIT
) -> str:
    """Fill the caches by calling each part once, and say in a sentence how far that came.

    call: processes must be able to import it by name.

    No failure counts, be it for want of memory: it is seen again, and told, when the work is done.
    """
    began = time.monotonic()
    settle_keys()  # here, too: the caches are read by this process
    spawn: Any = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    taken, done = spawn.Value("i", 0), spawn.Value("i", 0)
    work = parts, call, device, taken, done
    processes = [spawn.Process(target=take_turns, args=work) for _ in range(min(PROCESSES, len(parts)))]
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
    return f"compiled ahead: {done.value} of {len(parts)}, by {len(processes)} processes in {seconds:.0f} s"


def take_turns(
    parts: Sequence[Any], call: Callable[[Any], object], device: torch.device, taken: Any, done: Any
) -> None:
    """In a process: call the next part that nobody has taken, until there is none or the device is lost."""
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read when Inductor is imported
    settle_keys()
    with torch.cuda.device(device):
        while (n := _next(taken)) < len(parts):
            with suppress(Exception):
                call(parts[n])
            try:
                torch.cuda.synchronize(device)
            except RuntimeError:
                return
            torch.cuda.empty_cache()
            with done.get_lock():
                done.value += 1


def _next(taken: Any) -> int:
    with taken.get_lock():
        taken.value += 1
        return int(taken.value) - 1
