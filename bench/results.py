"""Results as data: every measuring command writes ``{"meta": {...}, "rows": [...]}``, and tables and
pictures are drawn from such files alone."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of gatematch's checkout in the current folder, with ``+`` for uncommitted changes; where
    there is no repository what GATEMATCH_COMMIT says.
    """
    return _checked_out() or os.environ.get("GATEMATCH_COMMIT")


def _checked_out() -> str | None:
    project = Path("pyproject.toml")
    if not project.exists() or 'name = "gatematch"' not in project.read_text():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        if head.returncode:
            return None
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout
    except OSError:
        return None
    return head.stdout.strip() + ("+" if dirty.strip() else "")


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip() or None
    except OSError:
        return None


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a number depends on: device, versions, commit, and the command that made it."""
    cuda = device.type == "cuda"
    command = [Path(sys.argv[0]).name.replace("__main__.py", "gatematch-bench"), *sys.argv[1:]]
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "driver": _driver() if cuda else None,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gatematch": _version("gatematch"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command),
    }


def writable(option: str, path: Path) -> None:
    """Find out before hours of work, not after, that a results file cannot be written.

    Raises:
        ValueError: naming the option, if `path` is a folder or nothing can be created beside it.
    """
    if path.is_dir():
        raise ValueError(f"{option} must be a file; got the folder {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} must be a file that can be written; got {path}: {error.strerror}"
        ) from None


def write_results(path: Path, meta: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a results file. A number that is not finite becomes null, which JSON has in its place."""
    results = _finite({"meta": meta, "rows": list(rows)})
    write_whole(path, json.dumps(results, indent=1, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_text(what: str, path: Path, encoding: str = "utf-8") -> str:
    """A file that the user names, or ValueError with `what` it should be."""
    try:
        return path.read_text(encoding)
    except FileNotFoundError:
        raise ValueError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} must be UTF-8 text; byte {error.start} is not") from None


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file, with an error that says what is wrong with it."""
    try:
        results = json.loads(read_text("results file", path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"results file {path} is not JSON: {error}") from None
    rows = results.get("rows") if isinstance(results, dict) else None
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(row, dict) and "case" in row for row in rows)
    ):
        raise ValueError(f'results file {path} must hold {{"meta": ..., "rows": [{{"case": ...}}, ...]}}')
    return results


def kind_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The command, or "example", that a results file comes from; by its first row."""
    if "peers" in rows[0]:
        return "speed"
    if "gradient_bound" in rows[0]:
        return "check"
    return str(rows[0]["case"]).partition("/")[0]


def matches(option: str, pattern: str) -> Callable[[str], bool]:
    """Whether a name matches the regular expression that an option gives.

    Raises:
        ValueError: it is none.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{option} must be a regular expression; got {pattern!r}: {error}") from None
    return lambda name: compiled.search(name) is not None
