"""Accesses of interpreted kernels watched: a lane outside every tensor argument, an element never written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, TensorHandle, interpreter_builder

# The interpreter's memory accesses, with the places of their pointers and masks among the arguments.
ACCESSES: dict[str, tuple[int, int | None]] = {
    "create_masked_load": (0, 1),
    "create_masked_store": (0, 2),
    "create_atomic_rmw": (1, 3),
    "create_atomic_cas": (0, None),
}


class OutOfBounds(AssertionError):
    pass


@contextlib.contextmanager
def bounds() -> Iterator[None]:
    """Every unmasked lane of a kernel must lie inside some tensor that it was given.

    Inside the tensor, not its storage: a view of a larger one ends where the view does. An access that lands
    in another argument of the same kernel is not seen.
    """
    extents: list[tuple[int, int]] = []
    take_arguments = GridExecutor._init_args_hst

    def note_extents(self: GridExecutor, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = take_arguments(self, args, kwargs)
        extents[:] = [
            _extent(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.numel() > 0
        ]
        return args, kwargs

    def watched(name: str) -> Callable[..., Any]:
        access = getattr(interpreter_builder, name)
        pointer_at, mask_at = ACCESSES[name]

        def checked(*args: Any) -> Any:
            if mask_at is not None:  # a scalar condition makes it one of integers, which Triton 3.9 refuses
                args[mask_at].data = args[mask_at].data.astype(bool)
            _check(name, extents, args[pointer_at], None if mask_at is None else args[mask_at])
            return access(*args)

        return checked

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(GridExecutor, "_init_args_hst", note_extents))
        for name in ACCESSES:
            patches.enter_context(mock.patch.object(interpreter_builder, name, watched(name)))
        yield


def _extent(x: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _check(
    name: str, extents: list[tuple[int, int]], pointers: TensorHandle, mask: TensorHandle | None
) -> None:
    start = np.atleast_1d(pointers.data).astype(np.uint64)
    end = start + np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
    outside = np.ones(start.shape, bool)
    for first, past in extents:
        outside &= (start < np.uint64(first)) | (end > np.uint64(past))
    if mask is not None:
        outside &= mask.data
    if outside.any():
        lane = tuple(int(index) for index in np.argwhere(outside)[0])
        raise OutOfBounds(
            f"{name.removeprefix('create_')} in program {interpreter_builder.grid_idx}: {int(outside.sum())} "
            f"of {outside.size} lanes lie outside all arguments, the first at {lane}"
        )


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors of torch.empty and its relatives hold NaN, or the largest integer, until written."""
    with contextlib.ExitStack() as patches:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ):
            patches.enter_context(mock.patch.object(owner, name, _filled(getattr(owner, name))))
        yield


def _filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def filled(*args: Any, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        inexact = made.is_floating_point() or made.is_complex()
        value = float("nan") if inexact else made.dtype == torch.bool or torch.iinfo(made.dtype).max
        made.detach().fill_(value)
        return made

    return filled
