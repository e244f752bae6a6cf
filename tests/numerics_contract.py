"""What the kernels' activations promise, as a check against float64, on any device."""

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


def check_activations(dtype, device="cpu"):
    """Both signs, from the smallest to where everything is saturated, and around where tanh changes form.

    A few roundings, in the interpreter; on a GPU |x| more of a float32 where sigmoid is small.
    """
    x = torch.cat([torch.logspace(-30, 2, 3000), torch.linspace(0.6, 0.65, 200), torch.linspace(0, 20, 3000)])
    x = torch.cat([x, -x, torch.tensor([0.0, 1e4, -1e4])]).to(device, dtype)
    more = 0.0 if device == "cpu" else torch.finfo(torch.float32).eps * x.double().abs()
    for got, function in zip(activations(x), (torch.sigmoid, torch.tanh), strict=True):
        want = function(x.double())
        # Below the smallest normal number nothing is promised but that it is small.
        bound = (3 * torch.finfo(dtype).eps + more) * want.abs() + torch.finfo(dtype).tiny
        assert ((got.double() - want).abs() <= bound).all()
