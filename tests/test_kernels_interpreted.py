"""tests/interpreted in Triton's interpreter, each file in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted(path.name for path in Path(__file__).with_name("interpreted").glob("test_*.py"))


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", FILES)
def test_interpreted(file, marked):
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", marked, Path(__file__).with_name("interpreted") / file],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    nothing_is_slow = marked == "slow" and child.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert child.returncode == 0 or nothing_is_slow, child.stdout + child.stderr
