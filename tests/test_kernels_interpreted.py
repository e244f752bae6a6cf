"""tests/interpreted in Triton's interpreter, each file in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted(path.name for path in Path(__file__).with_name("interpreted").glob("test_*.py"))
# Those that take minutes are cut, so that one of them is not the last that everybody waits for.
PARTS = {"test_lstm.py": 6, "test_pairwise.py": 4, "test_pairwise_tiles.py": 2, "test_transforms.py": 3}


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("file", "part"),
    [(file, f"{n}/{parts}") for file in FILES for parts in [PARTS.get(file, 1)] for n in range(parts)],
)
def test_interpreted(file, part, marked):
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", marked, Path(__file__).with_name("interpreted") / file],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "GATEMATCH_TEST_PART": part},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    nothing_is_slow = marked == "slow" and child.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert child.returncode == 0 or nothing_is_slow, child.stdout + child.stderr
