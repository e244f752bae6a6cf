"""tests/interpreted in processes of their own, for a plain `pytest tests`; `make test` runs them directly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "marked",
    [
        "not slow and not fresh",
        pytest.param("slow", marks=pytest.mark.slow),
        pytest.param("fresh", marks=pytest.mark.fresh),
    ],
)
def test_interpreted(marked):
    two = ["-n", "2", "--dist", "worksteal"]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *two, "-m", marked, Path(__file__).with_name("interpreted")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr
