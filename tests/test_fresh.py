"""The contracts on sizes and data that every seed draws anew, on the CPU without kernels.

Root mean squares of several draws are compared, so that none fails by its seed alone.
"""

import random

import pytest
import torch
from lstm_contract import DTYPES, check_any_layer
from pairwise_contract import check_draws

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.fresh,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


@pytest.fixture
def rng(request):
    return random.Random(f"{torch.initial_seed()} {request.node.name}")


@pytest.mark.parametrize("case", range(10))
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers(dtype, case, rng):
    check_any_layer(dtype, "torch", rng, most=200)


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["attention", "attend", "rows", "sums"])
def test_pairs(op, dtype, case, rng):
    check_draws(op, dtype, "auto", rng)
