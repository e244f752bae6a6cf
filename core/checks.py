"""Checks of arguments. The sentence is "q: expected ..., got ...", and after "; " a hint where there is one.

A wrong type or dtype raises TypeError; a wrong shape, value or device raises ValueError.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import permutations
from numbers import Integral, Real
from types import NoneType
from typing import Any, ParamSpec, TypeAlias

import numpy as np
import torch
import torch.fx
from torch import Tensor

from .torch_private import assert_async, surroundings, tracing

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
P = ParamSpec("P")
# As a caller may give them; compiled or traced, a tensor alone.
GivenLengths: TypeAlias = Tensor | Sequence[int] | np.ndarray


def check_kind(name: str, value: Any, kind: Any, expected: str = "", hint: str = "") -> None:
    """`kind` is one type, or a tuple of them described by `expected`."""
    if not isinstance(value, kind):
        if isinstance(value, torch.fx.Proxy):
            hint = "; torch.fx takes a function of this library as one node after torch.fx.wrap(name)"
        raise TypeError(
            f"{name}: expected {expected or f'a {kind.__name__}'}, got {type(value).__name__}{hint}"
        )


def check_tensor(name: str, value: Any, expected: str = "", hint: str = "") -> None:
    """Strided: some ops of torch take the memory of another layout for that of a strided tensor."""
    check_kind(name, value, Tensor, expected, hint)
    if value.layout is not torch.strided or value.is_nested:
        got = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a strided tensor, got {got}")


def has_nested(values: Iterable[Any]) -> bool:
    """Whether a RuntimeError about a shape is one that `check_tensor` can say better.

    Any other one must be raised again: torch.jit.trace, which refuses a parameter that the traced function
    captures, has stopped tracing by then, and crashes if the function goes on.
    """
    return any(isinstance(value, Tensor) and value.is_nested for value in values)


def check_bool(name: str, value: Any) -> None:
    """NumPy's count too, here and in `check_int` and `check_number`."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_number(name: str, value: Any, over: float | None = None) -> None:
    """Finite as a float, and greater than `over` if that is given."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got bool")
    check_kind(name, value, Real, "a number")
    if not abs(value) <= sys.float_info.max or (over is not None and value <= over):
        bound = "" if over is None else f" over {over}"
        raise ValueError(f"{name}: expected a finite number{bound}, got {value}")


def check_choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    kind = (str, NoneType) if None in choices else str
    # An array would be compared element by element.
    if isinstance(value, kind) and value in choices:
        return
    expected = f"one of {', '.join(map(repr, choices))}"
    check_kind(name, value, kind, expected)
    raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_dtype(name: str, dtype: torch.dtype, allowed: Sequence[torch.dtype] = FLOATING) -> None:
    if dtype not in allowed:
        *others, last = map(str, allowed)
        raise TypeError(f"{name}: expected dtype {', '.join(others)} or {last}, got {dtype}")


def check_alike(name: str, tensor: Tensor, like: str, other: Any, autocast: bool = False) -> None:
    """Both must be on one device and of one dtype, or with `autocast` of two that it casts now."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {like}, got {tensor.device}")
    if tensor.dtype != other.dtype and not (autocast and autocast_dtype(tensor) and autocast_dtype(other)):
        raise TypeError(f"{name}: expected dtype {other.dtype} as {like}, got {tensor.dtype}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast on x's device casts x now; None where it does not, as float64."""
    casts = x.dtype in FLOATING[1:] and not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if casts else None


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | None], hint: str = "") -> None:
    """None in `shape` stands for any size."""
    got = tuple(tensor.shape)
    if got != shape and not _fits(got, shape):
        if len(got) == len(shape) and any(_fits(order, shape) for order in permutations(got)):
            hint = "; it looks transposed"
        expected = str(tuple(shape)).replace("None", "any")
        raise ValueError(f"{name}: expected shape {expected}, got {got}{hint}")


def _fits(got: Sequence[int], shape: Sequence[int | None]) -> bool:
    pairs = zip(got, shape, strict=False)
    return len(got) == len(shape) and all([want is None or size == want for size, want in pairs])


def check_lengths(name: str, lengths: Any, like: str, x: Tensor, time: int = 1, size: str = "T") -> Tensor:
    """Integers (B,), from 0 to T, on the device of x or on the CPU; only for a batched x, with 3 dimensions.

    Args:
        lengths: a tensor, or a list, tuple or array.
        like: the name of x in messages.
        time: the dimension of x, 0 or 1, that has T elements; the other one has B.
        size: the name of T in messages.

    Returns:
        The lengths as a tensor.
    """
    got = type(lengths).__name__
    if isinstance(lengths, (list, tuple, np.ndarray)):
        lengths = _tensor_of(name, lengths)
    check_tensor(name, lengths, "a tensor or a list of integers")
    if x.dim() == 2:
        raise ValueError(f"{name}: expected None for an unbatched {like}, got {got}")
    dtype = lengths.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        hint = "; of a mask, its sums over time" if lengths.dim() == 2 else ""
        raise TypeError(f"{name}: expected an integer dtype, got {dtype}{hint}")
    check_shape(name, lengths, (x.shape[1 - time],))
    if not lengths.is_cpu and lengths.device != x.device:
        either = "cpu" if x.is_cpu else f"{x.device} or cpu"
        raise ValueError(f"{name}: expected device {either}, got {lengths.device}")
    check_range(name, lengths, x.shape[time], size)
    result: Tensor = lengths
    return result


def _tensor_of(name: str, integers: Any) -> Tensor:
    """A list, tuple or array of integers as a tensor on the CPU."""
    if torch.compiler.is_compiling() or tracing():  # they would be part of the program, not of its inputs
        got = type(integers).__name__
        raise TypeError(f"{name}: expected a tensor inside of what is compiled or traced, got {got}")
    try:
        array = np.asarray(integers)
    except (ValueError, TypeError, RuntimeError):  # a ragged list; tensors that are on a device
        array = np.asarray(None)
    if array.size > 0 and array.dtype.kind not in "iu":
        kind = f"array of {array.dtype}" if isinstance(integers, np.ndarray) else type(integers).__name__
        raise TypeError(f"{name}: expected integers, got a {kind} that holds others")
    return torch.as_tensor(array.astype(np.int64), device="cpu")


def check_range(name: str, values: Tensor, most: int, size: str, hint: str = "") -> None:
    """Integers must be from 0 to `most`, which a message calls `size`.

    Only those on the CPU are read: for others the host would wait. GATEMATCH_DEBUG=1 asserts them on their
    device. What is traced or batched has no values to read.
    """
    if surroundings((values,)) != "nothing" or values.numel() == 0:
        return
    values = values.long()  # torch does not order its wider unsigned integers
    if values.is_cpu:
        low, high = map(int, values.aminmax())
        if low < 0 or high > most:
            wrong = low if low < 0 else high
            raise ValueError(f"{name}: expected values from 0 to {size} = {most}, got {wrong}{hint}")
    elif os.environ.get("GATEMATCH_DEBUG") == "1":
        assert_async(((values >= 0) & (values <= most)).all())


def by_keyword(init: Callable[P, None]) -> Callable[P, None]:
    """A constructor with one positional argument, which names its keywords where there are more."""
    _, first, *others = inspect.signature(init).parameters

    @wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        if len(args) > 2:
            raise TypeError(
                f"{type(args[0]).__name__}: expected {first} and the keywords {', '.join(others)}, "
                f"got {len(args) - 1} arguments by position"
            )
        init(*args, **kwargs)

    return checked
