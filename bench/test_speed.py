"""The cases of `gatematch-bench speed` as a pytest-benchmark suite.

Run it with `pytest bench --benchmark-only`.
"""

import pytest
import torch

from gatematch.bench.cases import CASES, build
from gatematch.bench.problems import Case
from gatematch.bench.speed import MODES, run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_speed(benchmark, case: Case, mode: str) -> None:  # type: ignore[no-untyped-def]
    problem = build(case, torch.device("cpu"), compiled=False)
    upstream = torch.randn_like(problem.ours())
    benchmark(run, problem.ours, problem.ours_wrt, upstream, mode)
