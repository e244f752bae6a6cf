"""How tensors are laid out for the kernels, and how many programs they take.

Lengths and strides are never specialised on. Strides go in divided by a power of two that divides all of
them, which is compiled in, so that loads are as wide as the layout allows: a kernel has at most four such
variants.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Indices and offsets inside a tile of up to 128 rows are of 32 bits. Rows further apart than MAX_STRIDE are
# copied; loops step past the last row, or the last program, by less than 2**20; up to three parts of a row's
# features lie side by side.
MAX_STRIDE = 2**24
MAX_ROWS = MAX_PROGRAMS = 2**31 - 2**20
MAX_FEATURES = 2**22
# Hidden sizes of an LSTM are filled up to a multiple of it.
HIDDEN_MULTIPLE = 16


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def obstacle(x: Tensor) -> str | None:
    """Why kernels cannot run on tensors like x, or None if they can."""
    if x.dtype == torch.float64:
        return "the kernels take float32, float16 and bfloat16; got float64"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the kernels run on CUDA; got {x.device}"
    if not _HAS_TRITON:
        return "triton is not installed"
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"the kernels need compute capability 8.0; got {torch.cuda.get_device_name(x.device)}"
    return None


def rows(x: Tensor) -> Tensor:
    """x (B, L, D) as the kernels read it: features side by side, rows not too far apart.

    Raises:
        ValueError: if there are more rows or features than the kernels count.
    """
    if x.shape[1] > MAX_ROWS or x.shape[2] > MAX_FEATURES:
        raise ValueError(
            f"q, a and v: expected up to {MAX_ROWS} rows of up to {MAX_FEATURES} features, got "
            f"{tuple(x.shape)}; impl='torch' takes more"
        )
    return x if (x.stride(2) == 1 or x.shape[2] == 1) and x.stride(1) < MAX_STRIDE else x.contiguous()


def packed(lengths: Tensor | None) -> Tensor | None:
    """Lengths side by side."""
    return None if lengths is None else lengths.contiguous()


def width(itemsize: int, *steps: int) -> int:
    """The widest load, in elements, that starts at a multiple of its width at every one of these steps."""
    step = math.gcd(*steps)
    return min(step & -step, 16 // itemsize) if step else 16 // itemsize


def layout(*tensors: Tensor, size: int = 0) -> tuple[int, list[int]]:
    """The width of loads from tensors (B, L, size), and in its units the strides of batches and rows."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
    vec = width(tensors[0].element_size(), size, *strides)
    return vec, [stride // vec for stride in strides]


def product_precision(dtype: torch.dtype, precision: str, arch: str) -> str:
    """What tl.dot is told; for 16-bit inputs, only where rows less their centre are multiplied."""
    if arch.startswith("gfx"):
        return "ieee"
    return "tf32x3" if dtype == torch.float32 and precision == "float32" else "tf32"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has; in the interpreter as many as an H200, so that it sees as many ranges."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132


def programs(number: int) -> tuple[int, int, int]:
    """A flat grid."""
    if number > MAX_PROGRAMS:
        raise ValueError(f"q and a: expected up to {MAX_PROGRAMS} tiles, got {number}; split the batch")
    return number, 1, 1


def launch_steps(
    kernel: Any,
    grid: tuple[int, ...],
    steps: Sequence[int],
    arguments: Callable[[int], tuple[Any, ...]],
    **options: Any,
) -> None:
    """Launch a kernel for one step after the other, which from the second one on differ in the argument `s`.

    To find the program for its arguments takes Triton longer than a GPU for most steps: what it has found for
    the second step is launched in all others, with addresses for tensors. Where kernels are interpreted it
    finds none.

    Args:
        arguments: of a step, in the kernel's order, all but those that `options` gives by name.
        options: the arguments that are compiled in, and the compiler's.
    """
    program = None
    for s in steps[:2]:
        program = kernel[grid](*arguments(s), **options)
    if program is None:
        for s in steps[2:]:
            kernel[grid](*arguments(s), **options)
    elif len(steps) > 2:
        names = list(kernel.arg_names)
        given = arguments(steps[1])
        values = [x.data_ptr() if isinstance(x, Tensor) else x for x in given]
        values += [options[name] for name in names[len(given) :]]
        at, launch = names.index("s"), program[grid]
        for s in steps[2:]:
            values[at] = s
            launch(*values)


# Compiled programs, by the kernel and all that its arguments decide of them.
_programs: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`, for a kernel that is over before Triton has found its program.

    None of its numbers may be specialised on: then its program depends on the dtypes of its tensors, on
    whether they are there and start at a multiple of 16 bytes, and on what is compiled in.
    """
    key: list[Any] = [kernel.fn, *options.values()]
    values = []
    for x in arguments:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            key += (x.dtype, address % 16 == 0, x.get_device())
            values.append(address)
        else:
            key.append(x is None)
            values.append(x)
    program = _programs.get(tuple(key))
    if program is not None:
        program[grid](*values, *(options[name] for name in kernel.arg_names[len(values) :]))
    elif torch.version.hip is None:
        found = kernel[grid](*arguments, **options)
        if found is not None:  # not where kernels are interpreted
            _programs[tuple(key)] = found
    else:  # there it depends on the sizes of its tensors, too
        kernel[grid](*arguments, **options)
