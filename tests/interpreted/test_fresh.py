"""The contracts on sizes and data that every seed draws anew, in Triton's interpreter.

Root mean squares of several draws are compared, so that none fails by its seed alone.
"""

import random

import pytest
import torch
from interpreted.test_lstm import KERNELS, steps
from lstm_contract import DTYPES, check_any_layer
from pairwise_contract import check_draws

from gatematch.kernels import pairwise

torch.set_num_threads(1)
pytestmark = pytest.mark.fresh


@pytest.fixture
def rng(request):
    return random.Random(f"{torch.initial_seed()} {request.node.name}")


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_layers(kernel, dtype, case, rng):
    with steps(kernel):
        check_any_layer(dtype, kernel, rng)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["attention", "attend", "rows", "sums"])
def test_pairs(op, dtype, rng):
    check_draws(op, dtype, "triton", rng)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_of_prepared_rows(dtype, rng, monkeypatch):
    monkeypatch.setattr(pairwise, "PREPARED", 1)
    check_draws("attention", dtype, "triton", rng)
