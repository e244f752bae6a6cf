"""compute-sanitizer over every kernel, a stage of `gatematch-bench gpu`: python -m gatematch.bench.sanitizer

    RESULTS         memcheck and racecheck of every kernel, and a results file of what they find
    kernels         what they watch: every kernel on small odd shapes
    planted TOOL    the error that a tool is for

memcheck looks for accesses outside of an allocation, racecheck for races in shared memory. A run
without reports counts only if the tool has first reported the planted error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gatematch.kernels import config

from .ahead import compile_ahead
from .launches import LAUNCHES, Sample, samples, served
from .results import describe_machine, write_results

# The exit code of a program that this machine has no means for: EX_UNAVAILABLE of sysexits.h.
UNAVAILABLE = 69
TOOLKIT = "/usr/local/cuda/bin"


class Tool(NamedTuple):
    options: tuple[str, ...]
    sees: str  # what it says of the planted error
    summary: str


TOOLS = {
    # Allocations apart from each other, so that an access past one is in none. A kernel with an error ends,
    # and the others still run.
    "memcheck": Tool(
        ("--padding", "4096", "--report-api-errors", "no", "--destroy-on-device-error", "kernel"),
        "Invalid __global__ write",
        r"ERROR SUMMARY: (?P<errors>\d+) errors?",
    ),
    "racecheck": Tool(
        (),
        "Race reported between",
        r"RACECHECK SUMMARY: (?P<hazards>\d+) hazards? displayed "
        r"\((?P<errors>\d+) errors?, (?P<warnings>\d+) warnings?\)",
    ),
}
# It waits 10 seconds for the first use of the device, in which a cold disk does not read torch.
OPTIONS = ("--target-processes", "application-only", "--launch-timeout", "300")
# torch's kernels are not ours to check.
KERNELS = tuple(
    word for part in ("pairwise_", "lstm_", "planted_") for word in ("--kernel-name", f"kns={part}")
)

# What is watched. More than one tile in most directions, and no multiple of a tile; rows start at a multiple
# of 16 bytes, which the samples vary.
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


def launch(case: tuple[str, Sample]) -> None:
    kernel, sample = case
    LAUNCHES[kernel](sample)()


def launch_all(device: torch.device) -> None:
    for case in cases(config.architecture(device), str(device)):
        print(case[0], case[1].dtype, flush=True)
        launch(case)
        torch.cuda.synchronize()


@triton.jit
def planted_store(y_ptr):
    """Stores 4096 bytes past the first element."""
    tl.store(y_ptr + 1024, 1)


@triton.jit
def planted_race(x_ptr, y_ptr, THREADS: tl.constexpr):
    """All threads write one word of shared memory and read it, and do not wait in between."""
    i = tl.arange(0, THREADS)
    read = tl.inline_asm_elementwise(
        """{
        .shared .align 4 .b32 planted;
        st.volatile.shared.b32 [planted], $1;
        ld.volatile.shared.b32 $0, [planted];
        }""",
        "=r,r",
        [tl.load(x_ptr + i)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(y_ptr + i, read)


def plant(tool: str, device: str) -> None:
    """Make the error that a tool must see."""
    if tool == "memcheck":
        planted_store[(1,)](torch.zeros(1, dtype=torch.int32, device=device))
    else:
        x = torch.arange(128, dtype=torch.int32, device=device)
        planted_race[(1,)](x, torch.empty_like(x), THREADS=128, num_warps=4)


def find() -> str:
    """compute-sanitizer on the PATH, where toolkits are installed, or beside nvcc.

    Raises:
        FileNotFoundError: it is in none of them.
    """
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parent)] if nvcc else []
    folders = os.pathsep.join([os.environ.get("PATH", os.defpath), TOOLKIT, *beside])
    if (found := shutil.which("compute-sanitizer", path=folders)) is None:
        raise FileNotFoundError(f"compute-sanitizer is not on the PATH, in {TOOLKIT} or beside nvcc")
    return found


def run_tool(path: str, tool: str) -> dict[str, Any]:
    """A row: what a tool of compute-sanitizer finds, or why it cannot say."""
    row = {"case": f"sanitizer/{tool}"}
    code, output = _watched(path, tool, "planted", tool)
    if TOOLS[tool].sees not in output:
        reason = f"does not see a planted error: {_first_words(output) or f'exit code {code}'}"
        return {**row, "status": "not available", "reason": reason}
    return {**row, **judged(tool, *_watched(path, tool, "kernels"))}


def _watched(path: str, tool: str, *program: str) -> tuple[int, str]:
    """Exit code and output, which is passed on as it comes."""
    options = [*TOOLS[tool].options, *OPTIONS, *KERNELS]
    command = [path, "--tool", tool, *options, sys.executable, "-m", "gatematch.bench.sanitizer", *program]
    # Every tensor an allocation of its own.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    lines = []
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return child.returncode, "".join(lines)


def judged(tool: str, code: int, output: str) -> dict[str, Any]:
    """Status and counts of a run. No summary, or a program that failed under the tool, is no pass."""
    summary = re.search(TOOLS[tool].summary, output)
    counts = {name: int(number) for name, number in summary.groupdict().items()} if summary else {}
    if any(counts.values()):
        return {"status": "failed", **counts, "reason": _first_words(output)}
    if summary and not code:
        return {"status": "passed", **counts}
    last = next((line.strip("= ") for line in reversed(output.splitlines()) if line.strip("= ")), "")
    return {"status": "failed", **counts, "reason": f"exit code {code}: {last}"}


def _first_words(output: str) -> str:
    """The tool's first message, with where it happened: ``Invalid __global__ read ... at kernel+0x10``."""
    lines = [line.strip() for line in re.findall(r"^=========(.*)", output, re.M)]
    said = [line for line in lines if line not in ("", "COMPUTE-SANITIZER")]
    where = said[1:2] if said[1:2] and said[1].startswith(("at ", "and ")) else []
    return " ".join(said[:1] + where)


def summary(row: dict[str, Any]) -> str:
    tool = row["case"].removeprefix("sanitizer/")
    kind = "hazards" if tool == "racecheck" else "errors"
    if row["status"] == "not available":
        return f"{tool} not available, {row['reason']}"
    return f"{tool} {row.get(kind, '?')} {kind}" + (f": {row['reason']}" if "reason" in row else "")


def run_sanitizer(results: Path, device: torch.device) -> int:
    """The exit code of the stage."""
    try:
        path = find()
    except FileNotFoundError as error:
        print(error)
        return UNAVAILABLE
    version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.strip()
    rows: list[dict[str, Any]] = []
    if device.type == "cuda":  # under the tool it would be one kernel after the other
        print(compile_ahead([*cases(config.architecture(device), str(device))], launch, device), flush=True)
    for tool in TOOLS:
        rows.append({**run_tool(path, tool), "version": version.rpartition("\n")[2]})
        print(summary(rows[-1]), flush=True)
        write_results(results, describe_machine(device), rows)
    print(", ".join(map(summary, rows)))
    statuses = {row["status"] for row in rows}
    return 1 if "failed" in statuses else 0 if "passed" in statuses else UNAVAILABLE


def main(program: str, tool: str = "") -> int:
    device = torch.device("cuda", torch.cuda.current_device())
    if program == "kernels":
        launch_all(device)
    elif program == "planted":
        plant(tool, str(device))
        torch.cuda.synchronize()
    else:
        return run_sanitizer(Path(program), device)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
