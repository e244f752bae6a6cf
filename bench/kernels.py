"""What every kernel compiles to, on a machine without a GPU: `gatematch-bench kernels`.

The launchers themselves are called, with CPU tensors. Triton's own launch code then specialises and compiles
each kernel for the architecture asked for, as it would there, and stops before the launch. Registers, spills
and instructions are read from the binary.
"""

from __future__ import annotations

import functools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gatematch.bench.launches import LAUNCHES, Sample, entries, launched_with, samples, served
from gatematch.bench.progress import track
from gatematch.kernels import config
from gatematch.kernels.config import Config

# What a report is made for, and how many bytes of shared memory a program may take there.
ARCHITECTURES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def target(arch: str) -> GPUTarget:
    """An architecture as Triton's driver names it on such a device."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@functools.cache
def settle_keys() -> None:
    """Have Triton work out the keys of all kernels now, in one order.

    It does so when a function is first needed, and the key depends on which of the functions that it calls
    have theirs by then (Triton 3.6.0): processes that begin with other kernels would not find each other's
    programs.
    """
    for name in sorted(name for name in sys.modules if name.startswith("gatematch.kernels.")):
        for function in vars(sys.modules[name]).values():
            if isinstance(function, JITFunction):
                function.cache_key  # noqa: B018


def compiled(kernel: str, arch: str, launch: Callable[[], object]) -> list[Any]:
    """What Triton compiles for every launch of `kernel` that `launch` makes, as if on `arch`."""
    settle_keys()
    found = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if self.fn.__name__ == kernel:
            found.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    # The device is also the key of Triton's caches: one for each architecture.
    pretended = SimpleNamespace(
        get_current_target=lambda: target(arch),
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(driver, "_active", pretended),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(config, "architecture", lambda device: arch),
    ):
        launch()
    return found


def workers(jobs: int) -> ProcessPoolExecutor:
    """Processes that compile. What they have compiled a launch on such a device finds in Triton's cache: its
    key is made of the source, the specialised arguments, the options, the target and the compiler.
    """
    # CUDA does not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, spawn, initializer=torch.set_num_threads, initargs=(1,))


def stop(pool: ProcessPoolExecutor) -> None:
    """End the workers, also in the middle of a compilation: Ctrl-C and a time limit wait for none."""
    for process in multiprocessing.active_children():
        process.terminate()
    pool.shutdown(cancel_futures=True)


def run_kernels(archs: list[str], pattern: str = "", jobs: int = 1) -> list[dict[str, Any]]:
    """A row for every kernel, shipped configuration and variant whose kernel, arch and dtype match.

    With several jobs as many processes compile; the rows are the same, in the same order.
    """
    if unknown := [arch for arch in archs if arch not in ARCHITECTURES]:
        raise ValueError(f"--arch must be of {', '.join(ARCHITECTURES)}; got {unknown[0]!r}")
    launches = [
        (entry.kernel, entry.arch, sample, entry.tile)
        for entry in entries(archs, pattern)
        for sample in samples(entry.kernel, entry.dtype, entry.shape)
        if served(entry.kernel, entry.arch, sample)
    ]
    with ExitStack() as stack:
        each: Callable[..., Iterable[list[dict[str, Any]]]] = map
        if jobs > 1:
            pool = workers(jobs)
            stack.callback(stop, pool)
            each = pool.map
        found = each(kernel_rows, *zip(*launches, strict=True))
        # Two shapes may share a configuration, and one case be two programs, by the dtype of what they store.
        rows = {repr(row): row for of_launch in track(found, "kernels", len(launches)) for row in of_launch}
    return list(rows.values())


def kernel_rows(kernel: str, arch: str, sample: Sample, tile: Config) -> list[dict[str, Any]]:
    """What becomes of the launches of one kernel on one sample."""
    with launched_with(kernel, tile):
        binaries = compiled(kernel, arch, lambda: LAUNCHES[kernel](sample)())
    return [_row(kernel, arch, sample, tile, binary) for binary in binaries]


def _row(kernel: str, arch: str, sample: Sample, tile: Config, binary: Any) -> dict[str, Any]:
    names = list(binary.src.fn.arg_names)
    constants = {names[path[0]]: value for path, value in binary.src.constants.items()}
    # A launcher may have changed a size of its own.
    variant = _described({name: v for name, v in constants.items() if (name, v) not in tile.numbers.items()})
    dtype = str(sample.dtype).removeprefix("torch.")
    return {
        "case": f"kernels/{kernel}/{arch}/{dtype}/{_described(tile.numbers)}/{variant}",
        "kernel": kernel,
        "arch": arch,
        "triton": triton.__version__,
        "dtype": dtype,
        "config": tile.numbers,
        "variant": variant,
        "shared_bytes": binary.metadata.shared,
        "shared_limit": ARCHITECTURES[arch],
        "tensor_core_products": _tensor_core_products(binary.asm),
        **(_read_cubin(binary.asm["cubin"]) if "cubin" in binary.asm else _read_amdgcn(binary.asm["amdgcn"])),
    }


def _described(constants: Mapping[str, Any]) -> str:
    """Compile-time values in a few words: ``no centre_ptr, VEC_D=4, TRANSPOSED``."""
    words = []
    for name, value in constants.items():
        if value is None:
            words.append(f"no {name}")
        elif value is True:
            words.append(name)
        elif value is not False:
            words.append(f"{name}={value}")
    return ", ".join(words)


def _tensor_core_products(asm: Mapping[str, Any]) -> int:
    """Products in the source that tensor cores can do: all but those of float32 in full precision."""
    products = re.findall(r"tt\.dot\b.*", asm["ttir"])
    return sum("inputPrecision" in product or "xf32> *" not in product for product in products)


def _read_cubin(cubin: bytes) -> dict[str, int]:
    """Resources and instructions. Spills: loads and stores of local memory, wherever they come from."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cubin")
        path.write_bytes(cubin)
        usage = _output([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)])
        sass = _output([triton.knobs.nvidia.nvdisasm.path, "-c", str(path)])
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", sass, re.M)

    def resource(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump reports no {name}: {usage}")
        return int(found[1])

    def count(pattern: str) -> int:
        return sum(re.match(pattern, opcode) is not None for opcode in opcodes)

    return {
        "registers": resource("REG"),
        "stack_bytes": resource("STACK"),
        "spills": count("STL|LDL"),
        "tensor_core_instructions": count("HMMA|HGMMA|UTC.*MMA"),
        "async_copies": count("LDGSTS"),
        "instructions": len(opcodes),
    }


def _read_amdgcn(text: str) -> dict[str, int]:
    def resource(name: str) -> int:
        return int(re.findall(rf"^\s*\.{name}:\s*(\d+)", text, re.M)[-1])

    return {
        "registers": resource("vgpr_count"),
        "stack_bytes": resource("private_segment_fixed_size"),
        "spills": resource("vgpr_spill_count"),
        "tensor_core_instructions": len(re.findall(r"^\s+v_mfma", text, re.M)),
        "async_copies": len(re.findall(r"^\s+(?:buffer|global)_load_\w+ .*\blds\b", text, re.M)),
        "instructions": len(re.findall(r"^\t[a-z]\w+ ", text, re.M)),
    }


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def faults(row: Mapping[str, Any]) -> list[str]:
    """Why a kernel should not be shipped so. AMD's are reported only: the project has been run on none."""
    if row["arch"].startswith("gfx"):
        return []
    found = []
    if row["spills"] or row["stack_bytes"]:
        found.append(f"{row['spills']} spills, {row['stack_bytes']} bytes of stack")
    if row["shared_bytes"] > row["shared_limit"]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, and there are {row['shared_limit']}")
    if row["tensor_core_products"] and not row["tensor_core_instructions"]:
        found.append("no tensor-core instruction")
    return found
