"""Which tiles, warps and stages a kernel is launched with.

They are data: ``configs/<architecture>.json`` lists the configurations of each kernel with the dtype and the
shape that they were chosen for, and `choose` takes the nearest one. Importing this needs neither Triton nor a
GPU.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).with_name("configs")
_log = logging.getLogger("gatematch")


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel."""

    blocks: Mapping[str, int]  # sizes, by the name of the launcher's or kernel's argument, or Triton's
    num_warps: int
    num_stages: int

    @property
    def numbers(self) -> dict[str, int]:
        """Its sizes, warps and stages by name, as reports show them."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of the launch.

        Multiplications and additions become one instruction, fma: the kernels' errors and times were measured
        so, and Triton stops doing it by itself in 3.10.
        """
        warps, stages = self.num_warps, self.num_stages
        return {**self.blocks, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture of a device as compilers name it: sm_90, gfx942.

    Triton's interpreter runs kernels on CPU tensors; there it is sm_90.
    """
    if device.type == "cpu":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _listed(arch: str) -> str:
    """The architecture whose list serves `arch`.

    sm_86, sm_89 and sm_120 have the instructions of sm_80 (neither wgmma nor tcgen05) and less shared memory
    than any other: sm_80's list, which asks for the least, is theirs too.
    """
    if (CONFIGS / f"{arch}.json").exists():
        return arch
    if arch.startswith("gfx"):
        nearest = "gfx942"
    else:
        family = arch.removeprefix("sm_")[:-1]
        nearest = {"9": "sm_90", "10": "sm_100", "11": "sm_100"}.get(family, "sm_80")
    _log.info("no configurations for %s: those of %s are used", arch, nearest)
    return nearest


@functools.cache
def entries(arch: str) -> dict[str, list[dict[str, Any]]]:
    """The list that serves `arch`: for each kernel dtype, shape, config and source of every entry."""
    return json.loads((CONFIGS / f"{_listed(arch)}.json").read_text())["kernels"]


def shipped(kernel: str, arch: str) -> list[tuple[torch.dtype, dict[str, int], Config]]:
    """Every listed configuration of a kernel, with the dtype and the shape that it was chosen for.

    Raises:
        ValueError: if the list of `arch` does not have the kernel.
    """
    found = entries(arch).get(kernel)
    if not found:
        raise ValueError(f"kernel {kernel!r} has no configuration for {arch}")
    return [(getattr(torch, e["dtype"]), e["shape"], Config(**e["config"])) for e in found]


def choose(kernel: str, arch: str, dtype: torch.dtype, shape: Mapping[str, int]) -> Config:
    """The configuration of the nearest shape, by the ratio of sizes.

    Args:
        shape: sizes by their letters, all of those that the kernel's entries name.

    Raises:
        ValueError: if the list of `arch` has no entry of that kernel in that dtype.
    """
    return _choose(kernel, arch, dtype, tuple(shape.items()))


@functools.lru_cache(maxsize=4096)
def _choose(kernel: str, arch: str, dtype: torch.dtype, sizes: tuple[tuple[str, int], ...]) -> Config:
    shape = dict(sizes)
    candidates = [(listed, config) for kind, listed, config in shipped(kernel, arch) if kind == dtype]
    if not candidates:
        raise ValueError(f"kernel {kernel!r} has no configuration in {dtype} for {arch}")

    def distance(listed: Mapping[str, int]) -> float:
        return sum(math.log(max(shape[letter], 1) / size) ** 2 for letter, size in listed.items())

    nearest, config = min(candidates, key=lambda candidate: distance(candidate[0]))
    _log.debug("%s in %s on %s at %s: %s of %s", kernel, dtype, arch, shape, config, nearest)
    return config
