"""`gatematch-bench gpu`: what only a GPU can show, stage by stage, in one results file.

A stage is a process of its own, with a limit to its time, so that one that hangs or dies leaves the others
and what is already written. Those that time nothing run side by side: most of what they do is compiling.
Beside the results file FILE.json lie FILE-STAGE.log, all that the stage printed, and FILE-STAGE.json or .xml,
its own results.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import torch

from gatematch.kernels.config import architecture

from .results import describe_machine, read_results, write_results
from .sanitizer import UNAVAILABLE

CORES = os.cpu_count() or 1
# Each has a context of its own on the device.
PROCESSES = min(CORES, 16)
# Seconds between asking a stage to end and ending it, and after which a test prints where it is.
GRACE, PATIENCE = 10.0, 120.0


def _bench(*arguments: str) -> tuple[str, ...]:
    return "-m", "gatematch.bench", *arguments, "--json", "{results}"


def _pytest(selected: str, *options: str) -> tuple[str, ...]:
    chosen = "-m", "gpu", "{tests}", "-k", selected
    return "-m", "pytest", *chosen, "-o", "faulthandler_timeout={patience}", "--junitxml", "{junit}", *options


def _speed(cases: str) -> tuple[str, ...]:
    return _bench("speed", "--device", "cuda", "--seconds", "0.1", "--filter", cases)


# Arguments of this Python. Of those that run alone what most depends on comes first, should time run out.
STAGES = {
    "tests": _pytest(
        "not same_bits",
        *(("-n", str(PROCESSES), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()),
    ),
    "check": _bench("check", "--device", "cuda"),
    "expansion": _bench("expansion", "--device", "cuda"),
    "sanitizer": ("-m", "gatematch.bench.sanitizer", "{results}"),
    "determinism": _pytest("same_bits"),
    "barrier": _bench("barrier", "--device", "cuda"),
    "speed-lstm": _speed("lstm/"),
    "speed-pairwise": _speed("pairwise/"),
    "compile": _bench("kernels", "--arch", "{arch}", "--jobs", str(CORES)),
}
TOGETHER = ("tests", "check", "expansion", "sanitizer", "determinism")
# Processes side by side need no threads.
ENVIRONMENT = {"tests": {"OMP_NUM_THREADS": "1"}}
# What of two calls must be equal for their results to lie in one file.
SAME = ("device", "driver", "python", "torch", "triton", "gatematch", "commit")


def chosen_stages(stages: Sequence[str], tests: Path) -> list[str]:
    """Those named, or all, in their order; ValueError for an unknown name and for tests that do not exist."""
    if unknown := [name for name in stages if name not in STAGES]:
        raise ValueError(f"--stage must be of {', '.join(STAGES)}; got {unknown[0]!r}")
    chosen = [name for name in STAGES if name in stages or not stages]
    if not tests.exists() and any("{tests}" in STAGES[name] for name in chosen):
        raise ValueError(f"--tests must be a file of tests; {tests} does not exist")
    return chosen


def run_gpu(
    device: torch.device, stages: Sequence[str], results: Path, limit: float, tests: Path
) -> list[dict[str, Any]]:
    """Run the stages, all if none is named, and write `results` anew after each.

    What an earlier call found in other stages stays in the file, if it ran the same code on the same machine.

    Returns:
        A row for each stage of this call.
    """
    chosen = chosen_stages(stages, tests)
    arch = architecture(device)
    meta = describe_machine(device) | {"arch": arch}
    rows = _earlier(results, meta)
    side_by_side = [name for name in chosen if name in TOGETHER]
    groups = [side_by_side] * bool(side_by_side) + [[name] for name in chosen if name not in TOGETHER]
    with _told_to_end():
        for group in groups:
            print(f"== {', '.join(group)} of {len(chosen)} stages", flush=True)
            stopped = threading.Event()
            run = partial(run_stage, arch=arch, results=results, limit=limit, tests=tests, stopped=stopped)
            with ThreadPoolExecutor(len(group)) as pool:
                try:
                    futures = {pool.submit(run, name): name for name in group}
                    for future in as_completed(futures):
                        rows[futures[future]] = future.result()
                        every = [row for stage in STAGES for row in rows.get(stage, [])]
                        write_results(results, meta, every)
                finally:
                    stopped.set()
    return [rows[name][0] for name in chosen]


def _earlier(results: Path, meta: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each stage in a results file of the same code and machine."""
    rows: dict[str, list[dict[str, Any]]] = {}
    with suppress(ValueError):
        written = read_results(results)
        if all(written["meta"].get(key) == meta[key] for key in SAME):
            for row in written["rows"]:
                rows.setdefault(row.get("stage", ""), []).append(row)
    return rows


def run_stage(
    name: str, arch: str, results: Path, limit: float, tests: Path, stopped: threading.Event
) -> list[dict[str, Any]]:
    """The stage's own row, then those that it wrote."""
    row: dict[str, Any] = {"case": f"gpu/{name}", "stage": name}
    if reason := _obstacle(name, arch):
        return [row | {"status": "not available", "seconds": 0.0, "reason": reason}]
    log, own, junit = (results.with_name(f"{results.stem}-{name}{end}") for end in (".log", ".json", ".xml"))
    for path in (log, own, junit):
        path.unlink(missing_ok=True)
    words = {"arch": arch, "results": own, "junit": junit, "tests": tests, "patience": PATIENCE}
    command = [sys.executable, *(argument.format(**words) for argument in STAGES[name])]
    began = time.monotonic()
    code = _run(command, {**os.environ, **ENVIRONMENT.get(name, {})}, log, limit, stopped)
    row["seconds"] = round(time.monotonic() - began, 1)
    found, written = _found(junit, own)
    last = _last_words(log)
    row |= {"status": _status(code, found), **found}
    if row["status"] == "passed":
        row["what"] = _what(found, last)
    else:
        row |= {"what": _what(found, ""), "reason": _reason(code, found, last, limit)}
    return [row, *({**other, "stage": name} for other in written)]


def _obstacle(name: str, arch: str) -> str | None:
    """Why a stage cannot be run on an architecture."""
    if name == "compile":
        from .kernels import ARCHITECTURES  # which needs Triton

        if arch not in ARCHITECTURES:
            return f"kernels are compiled ahead for {', '.join(ARCHITECTURES)}; this is {arch}"
    return None


def _run(
    command: list[str], environment: dict[str, str], log: Path, limit: float, stopped: threading.Event
) -> int | None:
    """Exit code, or None where time ran out. The process writes its log itself, and we show what is there."""
    with log.open("wb") as out, log.open("rb") as shown:
        # In a group of its own, so that all that it starts is ended with it.
        child = subprocess.Popen(
            command,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if _ended(child, limit, shown, stopped):
                return child.returncode
            os.killpg(child.pid, signal.SIGINT)
            _ended(child, GRACE, shown, stopped)
            return None
        finally:
            # A process that the driver holds may outlive even this: it is not waited for long.
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(child.pid, signal.SIGKILL)
                child.wait(GRACE)
            _show(shown)


def _ended(child: subprocess.Popen[bytes], seconds: float, shown: BinaryIO, stopped: threading.Event) -> bool:
    """Whether it ends within so many seconds and before we are stopped; what it prints meanwhile is shown."""
    until = time.monotonic() + seconds
    while child.poll() is None:
        if time.monotonic() > until or stopped.is_set():
            return False
        _show(shown)
        time.sleep(0.05)
    return True


def _show(log: BinaryIO) -> None:
    sys.stdout.buffer.write(log.read())
    sys.stdout.buffer.flush()


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Being told to end, or losing the terminal, ends the stages too: they would go on using the device.

    That SIGINT is handled here lets a stage be asked to end by it: under nohup it is ignored, which processes
    pass on.
    """

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before: dict[int, Callable[..., Any] | int | None] = {
        number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _found(junit: Path, own: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a stage has written, in numbers, and its rows."""
    found: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with suppress(ElementTree.ParseError, FileNotFoundError):
        found = _tests(junit)
    with suppress(ValueError):
        results = read_results(own)
        rows = results["rows"]
        found["rows"] = len(rows)
        if "ceilings" in results["meta"]:
            found["ceilings"] = results["meta"]["ceilings"]
    return found, rows


def _tests(junit: Path) -> dict[str, Any]:
    """Counts, and the names of what failed, of a file that pytest wrote."""
    passed, skipped, bad = 0, 0, []
    for test in ElementTree.parse(junit).iter("testcase"):
        parts = {part.tag for part in test}
        if parts & {"failure", "error"}:
            bad.append(test.attrib["name"])
        elif "skipped" in parts:
            skipped += 1
        else:
            passed += 1
    bad = list(dict.fromkeys(bad))  # one that took its process with it is there twice
    counts = {"passed": passed, "failed": len(bad), "skipped": skipped}
    return counts | ({"failed_tests": bad} if bad else {})


def _status(code: int | None, found: dict[str, Any]) -> str:
    """Of an exit code, None where time ran out. To have done nothing is no success."""
    if code is None:
        return "timed out"
    if code == UNAVAILABLE:
        return "not available"
    return "failed" if code or not found or found.get("passed") == 0 else "passed"


def _reason(code: int | None, found: dict[str, Any], last: str, limit: float, most: int = 5) -> str:
    """Why a stage has not passed: what failed, or the last that it said."""
    if code is None:
        return f"stopped after {limit:g} s"
    if code == UNAVAILABLE:
        return last
    if bad := found.get("failed_tests"):
        return ", ".join([*bad[:most], *([f"and {len(bad) - most} more"] if len(bad) > most else [])])
    ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{ended}: {last}"


def _what(found: dict[str, Any], sentence: str) -> str:
    """In a few words what was found: counts of tests, the sentence that a command ends with, or of rows."""
    if "passed" in found:
        return ", ".join(f"{found[key]} {key}" for key in ("passed", "failed", "skipped") if found[key])
    if sentence and not sentence.startswith("results: "):
        return sentence
    return f"{found['rows']} rows" if found else ""


def _last_words(log: Path) -> str:
    """The last line with a word in it, without the frame that typer may draw around it."""
    lines = log.read_text(errors="replace").splitlines()
    return next((line.strip(" │=") for line in reversed(lines) if re.search(r"\w", line)), "")


def failed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["status"] in ("failed", "timed out")]
