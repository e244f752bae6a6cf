"""The kernels' activations in Triton's interpreter, against float64."""

import pytest
import torch
from numerics_contract import activations, check_activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_within_a_few_roundings_everywhere(dtype):
    check_activations(dtype)


def test_what_is_no_number():
    s, t = activations(torch.tensor([torch.inf, -torch.inf, torch.nan]))
    assert s[:2].tolist() == [1, 0] and t[:2].tolist() == [1, -1]
    assert s[2].isnan() and t[2].isnan()
