"""Tests of kernels in Triton's interpreter, which is chosen before Triton is imported: for the whole process.

`make test` runs them so: TRITON_INTERPRET=1 pytest tests/interpreted. `pytest tests` does by
tests/test_kernels_interpreted.py.
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

else:
    collect_ignore_glob = ["test_*.py"]
