"""The kernels' activations in Triton's interpreter, against float64."""

import pytest
import torch
import triton
import triton.language as tl

from gatematch.kernels.numerics import sigmoid, tanh


@triton.jit
def activate(x_ptr, sigmoid_ptr, tanh_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n).to(tl.float32)
    tl.store(sigmoid_ptr + i, sigmoid(x).to(sigmoid_ptr.dtype.element_ty), i < n)
    tl.store(tanh_ptr + i, tanh(x).to(tanh_ptr.dtype.element_ty), i < n)


def activations(x):
    outputs = torch.empty_like(x), torch.empty_like(x)
    activate[(triton.cdiv(len(x), 1024),)](x, *outputs, len(x), BLOCK=1024)
    return outputs


def values(dtype):
    """Both signs, from the smallest to where everything is saturated, and around where tanh changes form."""
    x = torch.cat([torch.logspace(-30, 2, 3000), torch.linspace(0.6, 0.65, 200), torch.linspace(0, 20, 3000)])
    return torch.cat([x, -x, torch.tensor([0.0, 1e4, -1e4])]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_within_a_few_roundings_everywhere(dtype):
    x = values(dtype)
    for got, function in zip(activations(x), (torch.sigmoid, torch.tanh), strict=True):
        want = function(x.double())
        # Below the smallest normal number nothing is promised but that it is small.
        bound = 3 * torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).tiny
        assert ((got.double() - want).abs() <= bound).all()


def test_what_is_no_number():
    s, t = activations(torch.tensor([torch.inf, -torch.inf, torch.nan]))
    assert s[:2].tolist() == [1, 0] and t[:2].tolist() == [1, -1]
    assert s[2].isnan() and t[2].isnan()
