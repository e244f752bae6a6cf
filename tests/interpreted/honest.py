"""Arithmetic of Triton's interpreter made that of the hardware, where it silently differs.

The interpreter keeps bfloat16 as its 16 bits in an unsigned integer and computes with those; it multiplies
float32 exactly whatever `input_precision` says. After `install`, bfloat16 arithmetic is done in float32 and
rounded to nearest even, and products are those of the operands as tensor cores see them:

    tf32     the low 13 bits are not read
    tf32x3   a = big + small, each rounded to tf32: small·big + big·small (0 where NaN) + big·big

Sums are float32 sums; the order and the rounding of a tensor core's own accumulation are not imitated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Array = npt.NDArray[Any]
PRECISION = interpreter._ir.INPUT_PRECISION


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: Array) -> Array:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(x.shape)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def truncated_to_tf32(x: Array) -> Array:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(x.shape)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def rounded_to_tf32(x: Array) -> Array:
    """To nearest, ties away from zero, as the instruction cvt.rna does; infinities and NaN stay."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(x.shape)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar.name == tl.bfloat16.name


def widened(handle: Any) -> Any:
    return TensorHandle(from_bfloat16(handle.data), tl.float32) if is_bfloat16(handle) else handle


def in_float32(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """An operation of the interpreter that computes on bfloat16 as it should."""

    @functools.wraps(method)
    def operation(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        result = method(self, *map(widened, operands))
        if any(map(is_bfloat16, operands)) and result.data.dtype == np.float32:
            return TensorHandle(to_bfloat16(result.data), tl.bfloat16)
        return result  # no bfloat16, or a comparison

    return operation


def install() -> None:
    """Change the interpreter of this process for good."""
    builder = InterpreterBuilder
    for name in ("unary_op", "binary_op", "ternary_op", "create_fma", "create_erf", "create_rsqrt"):
        setattr(builder, name, in_float32(getattr(builder, name)))
    cast, dot = builder.cast_impl, builder.create_dot
    check_tensor = interpreter.ReduceScanOpInterface.check_tensor

    def get_bf16(self: InterpreterBuilder, value: float) -> TensorHandle:
        return TensorHandle(to_bfloat16(np.array([value], np.float32)), tl.bfloat16)

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype) -> TensorHandle:
        if to.scalar == tl.bfloat16:
            return TensorHandle(to_bfloat16(widened(source).data.astype(np.float32)), tl.bfloat16)
        if is_bfloat16(source) and to.scalar == tl.float32:
            return widened(source)
        return cast(self, widened(source), to)

    def create_dot(
        self: InterpreterBuilder,
        a: TensorHandle,
        b: TensorHandle,
        sum_before: TensorHandle,
        precision: Any,
        *options: Any,
    ) -> TensorHandle:
        def product(x: Array, y: Array, total: TensorHandle) -> TensorHandle:
            handles = TensorHandle(x, tl.float32), TensorHandle(y, tl.float32)
            return dot(self, *handles, total, PRECISION.IEEE, *options)

        in_single = a.dtype.scalar == b.dtype.scalar == tl.float32
        if in_single and precision == PRECISION.TF32:
            return product(truncated_to_tf32(a.data), truncated_to_tf32(b.data), sum_before)
        if in_single and precision == PRECISION.TF32x3:
            a_big, b_big = rounded_to_tf32(a.data), rounded_to_tf32(b.data)
            with np.errstate(invalid="ignore"):
                a_small, b_small = rounded_to_tf32(a.data - a_big), rounded_to_tf32(b.data - b_big)
                zero = TensorHandle(np.zeros_like(sum_before.data), tl.float32)
                corrections = product(a_big, b_small, product(a_small, b_big, zero)).data
                corrections = np.where(np.isnan(corrections), np.float32(0), corrections)
                result = product(a_big, b_big, TensorHandle(corrections, tl.float32))
            return TensorHandle(result.data + sum_before.data, sum_before.dtype)
        return dot(self, widened(a), widened(b), sum_before, precision, *options)

    def check(self: interpreter.ReduceScanOpInterface, tensors: tuple[tl.tensor, ...]) -> None:
        if any(is_bfloat16(tensor.handle) for tensor in tensors):
            raise NotImplementedError("reductions and scans of bfloat16: convert to float32 first")
        check_tensor(self, tensors)

    builder.get_bf16 = get_bf16
    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    interpreter.ReduceScanOpInterface.check_tensor = check
