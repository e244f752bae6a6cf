"""Tests of kernels in Triton's interpreter, which is chosen before Triton is imported: for the whole process.

tests/test_kernels_interpreted.py runs them; to run one by hand: TRITON_INTERPRET=1 pytest tests/interpreted
Every test has honest arithmetic, every lane inside its tensors, and NaN in what is not written yet.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreted import bounds, honest, quick

    honest.install()
    quick.install()

    @pytest.fixture(autouse=True)
    def _watched() -> Iterator[None]:
        with bounds.bounds(), bounds.poisoned():
            yield

    @pytest.fixture(autouse=True)
    def _float32_products() -> Iterator[None]:
        """No TF32 in the LSTM, but where a test sets it."""
        rnn: Any = torch.backends.cudnn.rnn
        before, rnn.fp32_precision = rnn.fp32_precision, "ieee"
        yield
        rnn.fp32_precision = before

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        """Every n-th of the tests that -m leaves, from the k-th on, where GATEMATCH_TEST_PART is k/n."""
        part, parts = map(int, os.environ.get("GATEMATCH_TEST_PART", "0/1").split("/"))
        items[:] = items[part::parts]

else:
    collect_ignore_glob = ["test_*.py"]
