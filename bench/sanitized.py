"""Every kernel on small odd shapes, for compute-sanitizer to watch: python -m gatematch.bench.sanitized"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch

from gatematch.kernels import config

from .kernels import compiled, stop, workers
from .launches import LAUNCHES, Sample, samples, served

# More than one tile in most directions, and no multiple of a tile; rows start at a multiple of 16 bytes,
# which the samples vary.
PAIRS = {"Q": 35, "A": 67, "M": 35, "N": 67, "D": 40, "V": 24}
# Both sequences so long that rows are prepared.
LONG = {"Q": 131, "A": 135, "D": 40}
RECURRENT = {"H": 48, "B": 17}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases(arch: str, device: str) -> Iterator[tuple[str, Sample]]:
    """Every kernel of an architecture, with inputs that between them reach its branches."""
    for kernel in LAUNCHES:
        shape = LONG if kernel == "pairwise_tiles_fwd" else PAIRS
        if kernel.startswith("lstm_"):
            shape = RECURRENT
        for dtype in DTYPES:
            for sample in samples(kernel, dtype, shape):
                if kernel in config.entries(arch) and served(kernel, arch, sample):
                    yield kernel, replace(sample, batch=2, steps=3, device=device)


def compile_all(arch: str) -> None:
    """By all cores, into Triton's cache: under the tool it would be one kernel after the other."""
    launches = list(cases(arch, "cpu"))
    pool = workers(os.cpu_count() or 1)
    try:
        list(
            pool.map(
                _compile_one, *zip(*((kernel, arch, sample) for kernel, sample in launches), strict=True)
            )
        )
    finally:
        stop(pool)


def _compile_one(kernel: str, arch: str, sample: Sample) -> None:
    with suppress(Exception):  # what fails here fails again where it is launched, and is told there
        compiled(kernel, arch, lambda: LAUNCHES[kernel](sample)())


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for kernel, sample in cases(config.architecture(device), str(device)):
        print(kernel, sample.dtype, flush=True)
        LAUNCHES[kernel](sample)()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
