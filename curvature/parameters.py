"""Parameters of any shapes as one vector of length P: which tensors, under which names, in which rows."""

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gatematch.checks import check_dtype, check_tensor

Params: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]


class Parameters:
    """The tensors that a loss is differentiated by, each flattened in row-major order, one after the other.

    Attributes:
        index: name -> slice of the rows, in order.
        tensors: in the same order; they are the caller's own.
        size: P, the elements of all.
        dtypes: theirs.
        dtype: the one that torch promotes all of them to.
        device: theirs.
        module: the one whose parameters they are, if they came as one.
    """

    def __init__(self, params: Params) -> None:
        self.module = params if isinstance(params, nn.Module) else None
        self.index: dict[str, slice] = {}
        self.tensors: list[Tensor] = []
        self.size = 0
        known: set[int] = set()
        for name, tensor in _named(params):
            _check(name, tensor)
            if id(tensor) in known:
                continue  # tied: its rows are those of its first name
            known.add(id(tensor))
            self.index[name] = slice(self.size, self.size + tensor.numel())
            self.tensors.append(tensor)
            self.size += tensor.numel()
        if not self.tensors:
            trainable = " that requires gradients" if isinstance(params, nn.Module) else ""
            raise ValueError(f"params: expected at least one tensor{trainable}, got none")
        self.dtypes = [tensor.dtype for tensor in self.tensors]
        self.device = self.tensors[0].device
        self.dtype = self.tensors[0].dtype
        for name, tensor in zip(self.index, self.tensors, strict=True):
            if tensor.device != self.device:
                raise ValueError(
                    f"params[{name!r}]: expected device {self.device} as the others, got {tensor.device}"
                )
            self.dtype = torch.promote_types(self.dtype, tensor.dtype)

    def check_unchanged(self) -> None:
        """Raise RuntimeError if a module has other parameters now, or one has another dtype or is frozen."""
        now = self.tensors
        if self.module is not None:
            now = list({id(p): p for p in self.module.parameters() if p.requires_grad}.values())
        same = len(now) == len(self.tensors) and all(map(operator.is_, now, self.tensors))
        if not same or self.dtypes != [p.dtype for p in now] or not all(p.requires_grad for p in now):
            raise RuntimeError(
                "params: expected those that the operator was made for, got one that was replaced, converted "
                "or frozen; make a new operator"
            )

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector (P,) as tensors of the parameters' shapes."""
        pieces = vector.split([tensor.numel() for tensor in self.tensors])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, self.tensors, strict=True)]


def parameter_index(params: Params) -> dict[str, slice]:
    """Which rows (and columns) of the Hessian belong to which parameter.

    Args:
        params: what `hessian` takes. A generator is used up by this call as by any other.

    Returns:
        name -> slice, in the order of the rows. Names are a module's `named_parameters()`, a mapping's keys,
        or "0", "1", ... for a list. A parameter's elements follow in row-major order, whatever its strides:
        `H[index["weight"]].view(*weight.shape, -1)`. A tensor that occurs twice has rows once, under its
        first name; a module's parameters with `requires_grad=False` have none.

    Raises:
        TypeError, ValueError: as `hessian`, for params.
    """
    return Parameters(params).index


def _named(params: Params) -> Iterator[tuple[str, Any]]:
    if isinstance(params, nn.Module):
        return ((name, p) for name, p in params.named_parameters() if p.requires_grad)
    if isinstance(params, Mapping):
        for name in params:
            if not isinstance(name, str):
                raise TypeError(f"params: expected strings as names, got {name!r}")
        return iter(params.items())
    if isinstance(params, Iterable) and not isinstance(params, (str, Tensor)):
        return ((str(k), tensor) for k, tensor in enumerate(params))
    hint = "; put it in a list" if isinstance(params, Tensor) else ""
    got = type(params).__name__
    raise TypeError(f"params: expected a module, a mapping or an iterable of tensors, got {got}{hint}")


def _check(name: str, tensor: Any) -> None:
    name = f"params[{name!r}]"
    hint = "; for named_parameters(), pass dict(named_parameters())" if isinstance(tensor, tuple) else ""
    check_tensor(name, tensor, hint=hint)
    check_dtype(name, tensor.dtype)
    if not tensor.requires_grad:
        raise ValueError(f"{name}: expected requires_grad=True, got False; leave it out or requires_grad_()")
