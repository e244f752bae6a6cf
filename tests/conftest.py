"""Seeds, fixed or fresh, and tests that need a CUDA device skipped where there is none.

GATEMATCH_TEST_SEED=7 takes that seed instead of 0, GATEMATCH_TEST_SEED=fresh draws one and prints it.
Hypothesis draws the same examples every time.
"""

import os
import random
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

if os.environ.get("GATEMATCH_TEST_SEED") == "fresh":
    # Kept in the environment: processes of pytest-xdist, and those that tests start, have the same.
    os.environ["GATEMATCH_TEST_SEED"] = str(random.SystemRandom().randrange(10**6))
SEED = int(os.environ.get("GATEMATCH_TEST_SEED", "0"))
torch.manual_seed(SEED)  # for what test files draw when they are imported
with suppress(ModuleNotFoundError):  # a machine that runs the CUDA tests alone may lack it
    import hypothesis

    hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("steady")


def pytest_report_header() -> str:
    return f"GATEMATCH_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(SEED)
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
