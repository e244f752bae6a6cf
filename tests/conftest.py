"""Fresh random inputs under a printed seed, and tests that need a CUDA device skipped where there is none."""

import os
import random
from collections.abc import Iterator

import pytest
import torch

# Kept in the environment: processes of pytest-xdist, and those that tests start, have the same.
SEED = int(os.environ.setdefault("GATEMATCH_TEST_SEED", str(random.SystemRandom().randrange(10**6))))


def pytest_report_header() -> str:
    return f"GATEMATCH_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def bfloat16_lstm() -> None:
    """Skips where torch.nn.LSTM raises under autocast: oneDNN has no bfloat16 for some CPUs, as AVX2 ones."""
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        try:
            torch.nn.LSTM(3, 4)(torch.zeros(2, 1, 3))
        except RuntimeError as error:
            pytest.skip(f"torch.nn.LSTM raises under autocast on this CPU: {error}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """After a kernel's access to memory that is not there every call of CUDA fails in its process. With
    pytest-xdist a new process takes over; without, nothing more can be found.
    """
    result = yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if hasattr(item.config, "workerinput"):
                os._exit(1)
            pytest.exit(f"the CUDA device is lost: {error}", returncode=1)
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
