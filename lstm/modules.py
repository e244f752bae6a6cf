"""`LSTM` and `LSTMCell`, which hold the parameters as torch.nn's do, and `convert`.

They are plain `nn.Module`s rather than subclasses of torch.nn.LSTM: TorchDynamo refuses to trace those.
There is no flat copy of the weights behind the parameters. Each is read by its name in every call, so it
may be tied, parametrised, replaced, or swapped by `torch.func.functional_call`.
"""

import math
import warnings
from contextlib import suppress
from numbers import Integral
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from gatematch.checks import GivenLengths, check_choice, check_int, check_kind
from gatematch.plan import fx_node

from .functional import check_dropout, lstm_cell, run
from .spec import IMPLS, Spec, State

_CELL_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class LSTM(nn.Module):
    """A multi-layer LSTM with the constructor, attributes, parameters and results of `torch.nn.LSTM`.

    A state_dict of either loads into the other, and both draw the same initial weights from a seed.

    Args:
        input_size: I, the width of the input.
        hidden_size: H, the width of the cell state, and of the output without a projection.
        num_layers: layers, each reading the output of the one below.
        bias: whether there are biases, two for each gate.
        batch_first: input and output are (B, T, ...) instead of (T, B, ...).
        dropout: probability of dropping an output between layers, in training.
        bidirectional: each layer reads the sequence in both directions.
        proj_size: P, the width to which h is projected; 0 for none.
        device: of the parameters.
        dtype: of the parameters.
        impl: "auto", "torch", "triton" or a kernel's name, as in `gatematch.lstm.lstm`.

    Raises:
        TypeError, ValueError: as torch.nn.LSTM does, and for a `bidirectional` that is neither a bool nor a
            number, or an unknown impl.

    Attributes named as arguments can be set later, with weights to match; the next call checks them.
    """

    mode = "LSTM"
    __constants__ = nn.LSTM.__constants__  # the options, which decide what weights there are
    # Made anew by the call after one of the options has been set.
    _spec: Spec | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self.impl = impl
        for name in ("input_size", "hidden_size"):  # of these two torch takes no other integers
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} should be of type int, got: {type(getattr(self, name)).__name__}")
        spec = _spec(self)
        check_choice("impl", impl, IMPLS)
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={dropout} and num_layers={num_layers}",
                stacklevel=2,
            )
        self.dropout = float(dropout)
        self.num_layers, self.bidirectional = spec.num_layers, spec.bidirectional
        self.proj_size = spec.proj_size
        self._spec = spec
        for name, shape in zip(spec.names, spec.shapes, strict=True):
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every weight and bias uniform in ±1/√H, drawn in the order of `parameters()`."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__constants__:
            self.__dict__.pop("_spec", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_spec", None)  # it may be that of another version

    def _current(self) -> Spec:
        """The sizes as the attributes say now, which pruning and other surgery change."""
        spec = self._spec or _spec(self)
        if not torch.compiler.is_compiling():
            self._spec = spec
        return spec

    # What libraries read and call on torch.nn.LSTM, where it belongs to the flat copy of the weights.

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flat copy of the weights. Kept for code written for torch.nn.LSTM."""

    _init_flat_weights = flatten_parameters

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, as computed now."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _all_weights(self) -> list[list[str]]:
        spec = self._current()
        size = len(spec.names) // (spec.num_layers * (1 + spec.bidirectional))
        return [list(spec.names[start : start + size]) for start in range(0, len(spec.names), size)]

    @property
    def _flat_weights_names(self) -> list[str]:
        return list(self._current().names)

    @property
    def _flat_weights(self) -> tuple[Tensor | None, ...]:
        """A tuple: what a list were given in place of an element would be lost."""
        return tuple([getattr(self, name, None) for name in self._current().names])

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        lengths: GivenLengths | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]:
        """y, (h_n, c_n), and the last layer's cell states with `return_cells`.

        The input, called x everywhere else, is (T, B, I), (B, T, I) with batch_first, unbatched (T, I), or a
        PackedSequence; h_0 and c_0 are (L * D, B, P) and (L * D, B, H), P being H without a projection and D
        the number of directions; lengths is (B,). Results, dtypes and errors are those of
        `gatematch.lstm.lstm`.
        """
        if type(input) is not Tensor and isinstance(input, Proxy):
            return fx_node(self, input, hx, lengths, return_cells)
        spec, parameters = self._spec or self._current(), self._parameters
        try:  # much quicker than attribute access, which reaches `_parameters` last
            weights: list[Any] = [parameters[name] for name in spec.names]
        except KeyError:
            weights = list(self._flat_weights)
        return run(
            input,
            weights,
            spec,
            hx,
            lengths,
            self.batch_first,
            self.dropout,
            self.training,
            return_cells,
            self.impl,
        )

    def extra_repr(self) -> str:
        shown = {
            "proj_size": 0,
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0,
            "bidirectional": False,
            "impl": "auto",
        }
        changed = [
            f"{name}={getattr(self, name)}"
            for name, default in shown.items()
            if getattr(self, name) != default
        ]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *changed])


class LSTMCell(nn.Module):
    """One step of an LSTM with the constructor, attributes, parameters and results of `torch.nn.LSTMCell`.

    Args:
        input_size: I, the width of the input.
        hidden_size: H, the width of both states.
        bias: whether there are biases, two for each gate.
        device: of the parameters.
        dtype: of the parameters.
        impl: "auto", "torch", "triton" or "step", as in `gatematch.lstm.lstm_cell`.
    """

    __constants__ = nn.LSTMCell.__constants__

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        input_size, hidden_size = _integer("input_size", input_size), _integer("hidden_size", hidden_size)
        check_int("input_size", input_size, 0)
        check_int("hidden_size", hidden_size, 0)
        bias = _truth("bias", bias)
        check_choice("impl", impl, IMPLS)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.impl = impl
        gates = 4 * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(gates, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(gates, hidden_size, device=device, dtype=dtype))
        for name in ("bias_ih", "bias_hh"):
            value = nn.Parameter(torch.empty(gates, device=device, dtype=dtype)) if bias else None
            self.register_parameter(name, value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every weight and bias uniform in ±1/√H, drawn in the order of `parameters()`."""
        bound = 1.0 / math.sqrt(self.hidden_size or 1)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """The next h and c, from (B, I) or (I,) and h and c (B, H) or (H,): `gatematch.lstm.lstm_cell`."""
        if type(input) is not Tensor and isinstance(input, Proxy):
            return fx_node(self, input, hx)
        parameters = self._parameters
        try:
            weights: list[Any] = [parameters[name] for name in _CELL_NAMES]
        except KeyError:
            weights = [getattr(self, name, None) for name in _CELL_NAMES]
        return lstm_cell(input, hx, *weights, impl=self.impl)

    def extra_repr(self) -> str:
        bias = "" if self.bias is True else f", bias={self.bias}"
        impl = "" if self.impl == "auto" else f", impl={self.impl}"
        return f"{self.input_size}, {self.hidden_size}{bias}{impl}"


def convert(module: nn.Module) -> nn.Module:
    """Replace every torch.nn.LSTM and LSTMCell in a module, and the module itself if it is one, by ours.

    The new ones own the same Parameter objects, buffers and hooks and are in the same mode, so optimisers,
    hook handles and tied weights stay good; parametrizations are kept, and a module that stands at
    several places stays one.

    Returns:
        `module`, changed in place, or what replaces it. A warning says if there was none to replace.

    Raises:
        TypeError: there is a subclass of torch.nn.LSTM or LSTMCell, or one with its own `forward`, whose
            behaviour would be lost. Nothing has been changed then.
    """
    check_kind("module", module, nn.Module, "a torch.nn.Module")
    found = [
        (name, inner) for name, inner in module.named_modules() if isinstance(inner, (nn.LSTM, nn.LSTMCell))
    ]
    if not found and not any(isinstance(inner, (LSTM, LSTMCell)) for inner in module.modules()):
        warnings.warn(
            f"module: expected a torch.nn.LSTM or LSTMCell in it, got none in a {type(module).__name__}",
            stacklevel=2,
        )
    replaced: dict[nn.Module, nn.Module] = {inner: _adopt(name or "module", inner) for name, inner in found}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    return replaced.get(module, module)


def _adopt(name: str, theirs: nn.Module) -> nn.Module:
    """Ours, with everything that an instance of torch's holds."""
    ours: type[nn.Module] = LSTM if isinstance(theirs, nn.LSTM) else LSTMCell
    theirs_type = type(theirs)
    members: dict[str, Any] = {}
    if nn.utils.parametrize.is_parametrized(theirs):
        # Registering a parametrization made a class for this one instance: a property for each
        # parametrised name, and how to copy and pickle it. Ours is made from the same members.
        members = {
            k: v for k, v in vars(theirs_type).items() if k not in ("__dict__", "__weakref__", "__doc__")
        }
        theirs_type = nn.utils.parametrize.type_before_parametrizations(theirs)
    if theirs_type not in (nn.LSTM, nn.LSTMCell) or "forward" in vars(theirs):
        own = "forward" in vars(theirs)
        got = "one with a forward of its own" if own else f"its subclass {theirs_type.__name__}"
        raise TypeError(f"{name}: expected a torch.nn.{ours.__name__} itself, got {got}")
    cls = type(f"Parametrized{ours.__name__}", (ours,), members) if members else ours
    module: nn.Module = nn.Module.__new__(cls)
    state = {k: v for k, v in vars(theirs).items() if k not in _TORCH_ONLY}
    module.__dict__.update(state, impl="auto")
    return module


# What torch.nn.LSTM keeps beside its parameters, for its flat copy of them.
_TORCH_ONLY = ("mode", "_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights")


# What is wrong with an option is said as torch's constructors say it.


def _spec(module: LSTM) -> Spec:
    """The sizes of a module, from its attributes."""
    check_dropout(module.dropout)
    for name in ("bias", "batch_first"):
        if not isinstance(getattr(module, name), bool):
            raise TypeError(f"{name} should be of type bool, got: {type(getattr(module, name)).__name__}")
    bidirectional = _truth("bidirectional", module.bidirectional)
    input_size, hidden_size, num_layers = (
        _size(name, getattr(module, name)) for name in ("input_size", "hidden_size", "num_layers")
    )
    none = isinstance(module.proj_size, (bool, np.bool_)) and not module.proj_size  # torch takes no True here
    proj_size = 0 if none else _integer("proj_size", module.proj_size, but=True)
    if proj_size < 0:
        raise ValueError(
            f"proj_size should be a positive integer or zero to disable projections, got {proj_size}"
        )
    if proj_size >= hidden_size:
        raise ValueError(f"proj_size has to be smaller than hidden_size ({hidden_size}), got {proj_size}")
    return Spec.of_sizes(input_size, hidden_size, num_layers, module.bias, bidirectional, proj_size)


def _truth(name: str, value: Any) -> bool:
    """torch takes numbers here, NumPy's too, and people use them."""
    if not isinstance(value, (Integral, np.bool_)):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    return bool(value)


def _integer(name: str, value: Any, but: Any = None) -> int:
    """NumPy's too, and tensors of one."""
    with suppress(TypeError):
        if value is not but:
            return int(index(value))
    raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")


def _size(name: str, value: Any) -> int:
    size = _integer(name, value)
    if size <= 0:
        raise ValueError(f"{name} must be greater than zero, got {size}")
    return size
