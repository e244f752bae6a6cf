"""Fresh random inputs under a printed seed, and tests that need a CUDA device skipped where there is none."""

import os
import random

import pytest
import torch

SEED = int(os.environ.get("GATEMATCH_TEST_SEED", random.SystemRandom().randrange(10**6)))


def pytest_report_header() -> str:
    return f"GATEMATCH_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(SEED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
