"""What a call of the LSTM must look like, and the one sentence that says what is wrong with it.

`fits` is the quick test that every call passes through; only a call that it does not recognise as plain
is looked at closely. Every message names the argument, what was expected and what came.
"""

import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gatematch.torch_private import transformed

State = tuple[Tensor, Tensor]
KERNELS = ("resident", "persistent", "step")
IMPLS = ("auto", "torch", "triton", *KERNELS)


class Spec(NamedTuple):
    """The sizes of an LSTM, with the names and shapes of its parameters in torch's order."""

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    bidirectional: bool
    proj_size: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of_sizes(
        cls,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        bidirectional: bool = False,
        proj_size: int = 0,
    ) -> "Spec":
        state_size, gates = proj_size or hidden_size, 4 * hidden_size
        suffixes = ("", "_reverse") if bidirectional else ("",)
        names: list[str] = []
        shapes: list[tuple[int, ...]] = []
        for layer in range(num_layers):
            width = input_size if layer == 0 else state_size * len(suffixes)
            for suffix in suffixes:
                kinds = ["weight_ih", "weight_hh"]
                shapes += [(gates, width), (gates, state_size)]
                if bias:
                    kinds += ["bias_ih", "bias_hh"]
                    shapes += [(gates,), (gates,)]
                if proj_size:
                    kinds += ["weight_hr"]
                    shapes += [(proj_size, hidden_size)]
                names += [f"{kind}_l{layer}{suffix}" for kind in kinds]
        bidirectional = len(suffixes) == 2
        return cls(
            input_size, hidden_size, num_layers, bias, bidirectional, proj_size, tuple(names), tuple(shapes)
        )

    @classmethod
    def of_params(cls, params: Mapping[str, Tensor], x: Any = None) -> "Spec":
        """The sizes that a mapping named as torch.nn.LSTM's state_dict implies; x helps where it is wrong."""
        if not isinstance(params, Mapping):
            raise TypeError(f"params: expected a mapping from names to tensors, got {type(params).__name__}")
        for name in ("weight_ih_l0", "weight_hh_l0"):
            if name not in params:
                raise ValueError(f"params: expected {name!r} among the names, got {list(params)}")
        for name in ("weight_ih_l0", "weight_hh_l0", "weight_hr_l0"):
            if name in params:
                check_matrix(name, params[name])
        projected = "weight_hr_l0" in params
        x = x.data if isinstance(x, PackedSequence) else x
        input_size, hidden_size = _sizes(x, params["weight_ih_l0"], params["weight_hh_l0"], projected)
        num_layers = 1
        while f"weight_ih_l{num_layers}" in params:
            num_layers += 1
        spec = cls.of_sizes(
            input_size,
            hidden_size,
            num_layers,
            "bias_ih_l0" in params,
            "weight_ih_l0_reverse" in params,
            min(params["weight_hr_l0"].shape) if projected else 0,
        )
        if params.keys() != set(spec.names):
            missing = [name for name in spec.names if name not in params]
            unexpected = [name for name in params if name not in spec.names]
            raise ValueError(
                "params: expected the names of a torch.nn.LSTM with "
                f"num_layers={num_layers}, bias={spec.bias}, bidirectional={spec.bidirectional}, "
                f"projection={spec.proj_size > 0}, got missing {missing} and unexpected {unexpected}"
            )
        return spec

    def state_shapes(self, batch: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of h_0 and c_0, for an unbatched x if `batch` is None."""
        cells = self.num_layers * (2 if self.bidirectional else 1)
        lead = (cells,) if batch is None else (cells, batch)
        return (*lead, self.proj_size or self.hidden_size), (*lead, self.hidden_size)


def fits(x: Any, weights: list[Tensor], spec: Spec, hx: State | None, batch_first: bool) -> bool:
    """Whether this is a plain call, on a padded or unbatched tensor, with nothing wrong."""
    try:
        shape, shapes = x.shape, spec.shapes
        T = shape[1 if batch_first and len(shape) == 3 else 0]
        if T == 0 or len(shape) not in (2, 3) or shape[-1] != spec.input_size:
            return False
        if hx is not None:
            h_shape, c_shape = spec.state_shapes(None if len(shape) == 2 else shape[0 if batch_first else 1])
            weights, shapes = [*weights, *hx], (*shapes, h_shape, c_shape)
        return _alike(x, weights, shapes) and (hx is None or isinstance(hx, (tuple, list)))
    except (AttributeError, IndexError, TypeError, ValueError):
        return False


def cell_fits(x: Any, weights: Sequence[Tensor], hx: State | None) -> bool:
    """Whether the shapes are those of a plain call of the cell, weights and biases in torch's order.

    Only what torch's op would broadcast, promote or compute, on the meta device or in complex numbers: the
    rest it refuses.
    """
    try:
        shape = x.shape
        H = weights[1].shape[1]
        gates = 4 * H
        if weights[0].shape != (gates, shape[-1]) or weights[1].shape != (gates, H):
            return False
        if len(weights) == 4 and not weights[2].shape == weights[3].shape == (gates,):
            return False
        if hx is not None:
            h, c = hx
            if not h.shape == c.shape == (*shape[:-1], H) or not isinstance(hx, (tuple, list)):
                return False
            if c.dtype is not x.dtype:
                return False
        cpu = x.is_cpu
        if not x.is_floating_point() or not 0 < len(shape) < 3:
            return False
        return all(weight.is_cpu is cpu for weight in weights)
    except (AttributeError, TypeError, ValueError, IndexError):
        return False


def _alike(x: Tensor, tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> bool:
    # The fused op does not look at the shapes of the weights and reads past the end of one that is too
    # small, so they are compared in every call. `is_cpu` costs a third of comparing devices.
    dtype, device = x.dtype, None if x.is_cpu else x.device
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype is not dtype:
            return False
        if not tensor.is_cpu if device is None else tensor.device != device:
            return False
    return dtype.is_floating_point


def check_call(
    x: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    spec: Spec,
    hx: State | None,
    batch_first: bool,
) -> None:
    """Raise an error, in one sentence, unless this is a call that the LSTM can answer."""
    ranks: tuple[int, ...] = (2, 3)
    if isinstance(x, PackedSequence):
        B = int(x.batch_sizes[0])
        data, expected, ranks = x.data, f"data of shape (sum of lengths, {spec.input_size})", (2,)
    else:
        check_tensor("x", x, " or PackedSequence")
        order = "B, T" if batch_first else "T, B"
        data = x
        expected = f"shape ({order}, {spec.input_size}) or (T, {spec.input_size})"
    if data.dim() not in ranks or data.shape[-1] != spec.input_size:
        transposed = data is x and data.dim() in ranks and spec.input_size in data.shape[:-1]
        hint = "; it looks transposed" if transposed else ""
        raise ValueError(f"x: expected {expected}, got {tuple(data.shape)}{hint}")
    check_floating("x", data)
    for name, weight, shape in zip(spec.names, weights, spec.shapes, strict=True):
        check_tensor(name, weight)
        check_shape(name, weight, shape)
    # Where x and the weights differ, it is usually x that the caller can mend.
    for name, tensor in zip(("x", *spec.names[1:]), (data, *weights[1:]), strict=True):
        check_alike(name, tensor, spec.names[0], weights[0])

    if isinstance(x, Tensor):
        batched = x.dim() == 3
        T, B = (x.shape[1], x.shape[0]) if batched and batch_first else (x.shape[0], x.shape[1])
        if T == 0:
            # Not ValueError: code written for torch.nn.LSTM catches the RuntimeError that it raises here.
            raise RuntimeError(f"x: expected at least one time step, got T = 0 in shape {tuple(x.shape)}")
    if hx is not None:
        unbatched = isinstance(x, Tensor) and x.dim() == 2
        check_state(hx, data, *spec.state_shapes(None if unbatched else B))


def check_cell(x: Tensor, weights: Sequence[Tensor | None], hx: State | None) -> None:
    """`check_call` for one step."""
    check_tensor("x", x)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: len(weights)]
    for name, weight in zip(names, weights, strict=True):
        check = check_matrix if name.startswith("weight") else check_tensor
        check(name, weight)
    tensors = [weight for weight in weights if weight is not None]
    I, H = _sizes(x, tensors[0], tensors[1])
    shapes = ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    for name, weight, shape in zip(names, tensors, shapes, strict=False):
        check_shape(name, weight, shape)
    if x.dim() not in (1, 2) or x.shape[-1] != I:
        hint = "; it looks transposed" if x.dim() == 2 and x.shape[0] == I else ""
        raise ValueError(f"x: expected shape (B, {I}) or ({I},), got {tuple(x.shape)}{hint}")
    check_floating("x", x)
    for name, tensor in zip(("x", *names[1:]), (x, *tensors[1:]), strict=True):
        check_alike(name, tensor, "weight_ih", tensors[0])
    if hx is not None:
        check_state(hx, x, (*x.shape[:-1], H), (*x.shape[:-1], H))


def _sizes(x: Any, weight_ih: Tensor, weight_hh: Tensor, projected: bool = False) -> tuple[int, int]:
    """I and H, so that of arguments which do not go together the odd one out is blamed.

    H is told by weight_hh alone if that is (4H, H), or transposed; I by weight_ih if one side of it is 4H.
    """
    state_size, gates = min(weight_hh.shape), max(weight_hh.shape)  # sorted() cannot be compiled
    plausible = gates % 4 == 0 if projected else gates == 4 * state_size
    H = gates // 4 if plausible else max(weight_ih.shape[0] // 4, 1)
    rows, columns = weight_ih.shape
    if rows != 4 * H and columns == 4 * H:
        return rows, H
    width = x.shape[-1] if isinstance(x, Tensor) and x.dim() > 0 else columns
    return width if rows != 4 * H and width == rows else columns, H


def checked_impl(impl: str) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    return impl


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


def check_dropout(dropout: Any) -> None:
    if not isinstance(dropout, Real) or isinstance(dropout, bool) or not 0 <= float(dropout) <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being "
            f"zeroed, got {dropout!r}"
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    got = tuple(tensor.shape)
    if got != shape:
        hint = "; it looks transposed" if sorted(got) == sorted(shape) else ""
        raise ValueError(f"{name}: expected shape {shape}, got {got}{hint}")


def check_state(hx: Any, x: Tensor, h_shape: tuple[int, ...], c_shape: tuple[int, ...]) -> None:
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
        hint = "; lengths are passed by name" if isinstance(hx, Tensor) and hx.dim() == 1 else ""
        raise TypeError(f"hx: expected a pair of tensors (h_0, c_0), got {got}{hint}")
    for name, state, shape in (("hx[0]", hx[0], h_shape), ("hx[1]", hx[1], c_shape)):
        check_tensor(name, state)
        check_shape(name, state, shape)
        check_alike(name, state, "x", x)


def check_alike(name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    """Raise ValueError unless both are on one device and, outside autocast, of one dtype."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {like}, got {tensor.device}")
    if tensor.dtype != other.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(f"{name}: expected dtype {other.dtype} as {like}, got {tensor.dtype}")


def check_lengths(lengths: Any, x: Tensor | PackedSequence, batch_first: bool) -> None:
    """`check_call` for the lengths, with an x that has passed it."""
    if isinstance(x, PackedSequence):
        got = type(lengths).__name__
        raise ValueError(f"lengths: expected None with a PackedSequence, which has its own, got {got}")
    if x.dim() == 2:
        raise ValueError(f"lengths: expected None for an unbatched x (T, I), got {type(lengths).__name__}")
    check_tensor("lengths", lengths)
    device = x.device
    T, B = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    dtype = lengths.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        hint = "; of a mask, its sums over time" if lengths.dim() == 2 else ""
        raise ValueError(f"lengths: expected an integer dtype, got {dtype}{hint}")
    check_shape("lengths", lengths, (B,))
    if lengths.device != device and lengths.device.type != "cpu":
        either = "cpu" if device.type == "cpu" else f"{device} or cpu"
        raise ValueError(f"lengths: expected device {either}, got {lengths.device}")
    # Reading the values would wait for a device, and can be neither traced nor batched.
    if B > 0 and not transformed() and not torch.compiler.is_compiling():
        values = lengths.to(torch.int64)
        if lengths.is_cpu:
            low, high = (int(bound) for bound in values.aminmax())
            if low < 0 or high > T:
                raise ValueError(
                    f"lengths: expected values from 0 to T = {T}, got {low if low < 0 else high}"
                )
        elif os.environ.get("GATEMATCH_DEBUG") == "1":
            torch._assert_async(((values >= 0) & (values <= T)).all())


def check_tensor(name: str, value: Any, alternative: str = "") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor{alternative}, got {type(value).__name__}")


def check_matrix(name: str, value: Any) -> None:
    check_tensor(name, value)
    if value.dim() != 2 or value.numel() == 0:
        raise ValueError(f"{name}: expected a matrix, got shape {tuple(value.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
