"""compute-sanitizer over every kernel: python -m gatematch.bench.compute_sanitizer RESULTS

memcheck looks for accesses outside of an allocation, racecheck for races in shared memory. What they do not
report counts only if they see errors at all: each must first report that of planted.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gatematch.kernels.config import architecture

from .results import describe_machine, write_results
from .sanitized import compile_all

# The exit code of a program that this machine has no means for: EX_UNAVAILABLE of sysexits.h.
UNAVAILABLE = 69
TOOLKIT = "/usr/local/cuda/bin"


@dataclass(frozen=True)
class Tool:
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


def find() -> str:
    """compute-sanitizer on the PATH, where toolkits are installed, or beside nvcc.

    Raises:
        FileNotFoundError: it is in none of them.
    """
    nvcc = shutil.which("nvcc")
    folders = [
        os.environ.get("PATH", os.defpath),
        TOOLKIT,
        *([str(Path(nvcc).resolve().parent)] if nvcc else []),
    ]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if found is None:
        raise FileNotFoundError(f"compute-sanitizer is not on the PATH, in {TOOLKIT} or beside nvcc")
    return found


def run_tool(path: str, tool: str) -> dict[str, Any]:
    """A row: what a tool of compute-sanitizer finds, or why it cannot say."""
    row = {"case": f"sanitizer/{tool}"}
    code, output = _watched(path, tool, "gatematch.bench.planted", tool)
    if TOOLS[tool].sees not in output:
        reason = f"does not see a planted error: {_first_words(output) or f'exit code {code}'}"
        return {**row, "status": "not available", "reason": reason}
    return {**row, **judged(tool, *_watched(path, tool, "gatematch.bench.sanitized"))}


def _watched(path: str, tool: str, *program: str) -> tuple[int, str]:
    """Exit code and output, which is passed on as it comes."""
    command = [path, "--tool", tool, *TOOLS[tool].options, *OPTIONS, *KERNELS, sys.executable, "-m", *program]
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
    if summary and not code and not any(counts.values()):
        return {"status": "passed", **counts}
    said = _first_words(output)
    if not any(counts.values()):
        last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")
        said = f"exit code {code}: {said if summary is None and said else last}"
    return {"status": "failed", **counts, "reason": said}


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


def main(results: Path, device: torch.device) -> int:
    try:
        path = find()
    except FileNotFoundError as error:
        print(error)
        return UNAVAILABLE
    version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.strip()
    rows: list[dict[str, Any]] = []
    compile_all(architecture(device))
    for tool in TOOLS:
        rows.append({**run_tool(path, tool), "version": version.rpartition("\n")[2]})
        print(summary(rows[-1]), flush=True)
        write_results(results, describe_machine(device), rows)
    print(", ".join(map(summary, rows)))
    statuses = {row["status"] for row in rows}
    return 1 if "failed" in statuses else 0 if "passed" in statuses else UNAVAILABLE


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), torch.device("cuda")))
