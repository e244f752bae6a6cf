"""Triton's interpreter without what it does again for every operation and every call of a device function.

After `install` kernels compute what they did, in about a third of the time. One check of the interpreter is
off: that integers do not overflow. A reduction by a function of one's own combines halves, as a GPU does,
where the interpreter goes from number to number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Change the interpreter of this process for good."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = once(interpreter._patch_lang)
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
    interpreter.ReduceOps.generic_reduce = reduce_by_halves
    tl.dtype.__eq__ = identical_or(tl.dtype.__eq__)
    tl.core._type_for_tuple_values = of_sizes(tl.core._type_for_tuple_values)


def once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """triton.language is made the interpreter's for each module of kernels once, and stays so."""
    patched: dict[int, Any] = {}  # by identity, and kept, so that none gets the identity of another
    unchanged = interpreter._LangPatchScope()

    def patch_lang(function: Callable[..., Any]) -> Any:
        module = id(function.__globals__)
        if module not in patched:
            patch(function)
            patched[module] = function.__globals__
        return unchanged

    return patch_lang


def by_name(of: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[str, Any] = {}

    def np_dtype(dtype: Any) -> Any:
        if type(dtype) is not tl.dtype:  # pointers and blocks
            return of(dtype)
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = of(dtype)
        return found

    return np_dtype


def identical_or(equal: Callable[..., bool]) -> Callable[..., bool]:
    return lambda self, other: self is other or equal(self, other)


def of_sizes(types_of: Callable[..., Any]) -> Callable[..., Any]:
    """The type of a shape, which every tensor has, is made once for all of the same sizes."""
    known = functools.cache(lambda sizes: types_of(list(sizes)))

    def types(values: Any, fields: Any = None) -> Any:
        sizes = tuple([x.value if type(x) is tl.constexpr else x for x in values])
        if fields is None and all([type(x) is int for x in sizes]):
            return known(sizes)
        return types_of(values, fields)

    return types


def reduce_by_halves(self: Any, operands: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    axis = self.axis
    data = [x.handle.data if axis is not None else x.handle.data.ravel() for x in operands]
    while (size := data[0].shape[axis or 0]) > 1:
        halves = [np.split(x, [size // 2], axis or 0) for x in data]
        pairs = [
            [self.to_tensor(half[i], x.dtype) for half, x in zip(halves, operands, strict=True)]
            for i in (0, 1)
        ]
        combined = self.combine_fn.fn(*pairs[0], *pairs[1])
        data = [x.handle.data for x in (combined if isinstance(combined, tuple) else (combined,))]
    if axis is None:
        data = [x.reshape((1,) * len(operands[0].shape) if self.keep_dims else ()) for x in data]
    elif not self.keep_dims:
        data = [np.squeeze(x, axis) for x in data]
    return [self.to_tensor(x, y.dtype) for x, y in zip(data, operands, strict=True)]
