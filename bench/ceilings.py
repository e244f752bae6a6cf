"""What a GPU does at best, measured in the run that is judged by it: copies, products and special functions.

Datasheets give rates at clocks that a card may not keep; a share of what was measured on the same card
minutes before says how much is left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.testing import do_bench

from gatematch.precision import library_products

_COPIED = 1 << 32  # bytes
_SIDE = 8192  # of the square matrices
_ROOTS = 1 << 12  # of each number


@triton.jit
def roots(x_ptr, y_ptr, number, BLOCK: tl.constexpr):
    """Reciprocal square roots of reciprocal square roots: one special function each and nothing else."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    for _ in range(number):
        x = tl.rsqrt(x)
    tl.store(y_ptr + i, x)


def ceilings(device: torch.device) -> dict[str, float]:
    """Rates a second: `bytes` read and written, the `flops` of each kind of product, and `specials`."""
    with torch.cuda.device(device):
        rates = {"bytes": _copy(device)}
        for name, dtype, precision in (
            ("bfloat16", torch.bfloat16, "ieee"),
            ("float16", torch.float16, "ieee"),
            ("tf32", torch.float32, "tf32"),
            ("float32", torch.float32, "ieee"),
        ):
            rates[f"{name}_flops"] = _product(device, dtype, precision)
        return rates | {"specials": _specials(device)}


def _best(function: Callable[[], object]) -> float:
    """Seconds of the shortest of many calls: the first ones bring the clocks up."""
    return float(do_bench(function, warmup=100, rep=200, return_mode="min")) / 1e3


def _copy(device: torch.device) -> float:
    source = torch.empty(_COPIED, dtype=torch.int8, device=device).random_(-128, 127)
    target = torch.empty_like(source)
    return 2 * _COPIED / _best(lambda: target.copy_(source))


def _product(device: torch.device, dtype: torch.dtype, precision: str) -> float:
    x, y = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))  # zeros would be faster
    with library_products("cuda", precision):
        return 2 * _SIDE**3 / _best(lambda: x @ y)


def _specials(device: torch.device) -> float:
    programs, block = 64 * torch.cuda.get_device_properties(device).multi_processor_count, 1024
    x = torch.rand(programs * block, device=device) + 0.5
    y = torch.empty_like(x)
    return x.numel() * _ROOTS / _best(lambda: roots[(programs,)](x, y, _ROOTS, BLOCK=block, num_warps=4))
