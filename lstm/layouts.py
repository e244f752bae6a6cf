"""LSTM weights to and from the layouts of Keras, TensorFlow 1 and ONNX.

                 input weights       recurrent weights   bias                     gates
    torch, ours  weight_ih (4H, I)   weight_hh (4H, H)   bias_ih, bias_hh (4H,)   i, f, g, o
    Keras        kernel (I, 4H)      recurrent (H, 4H)   bias (4H,)               i, f, c, o   c is g
    TF 1         kernel (I + H, 4H), both in one         bias (4H,)               i, j, f, o   j is g
    ONNX         W (dirs, 4H, I)     R (dirs, 4H, H)     B (dirs, 8H), both       i, o, f, c   c is g

A projection, P wide, replaces H by P in the recurrent weights; TF 1 has it too, Keras and ONNX do not.

The functions are pure. `from_*` takes a flat list of arrays or tensors, layer after layer and within a
layer forward before reverse; it returns new tensors under the names of `torch.nn.LSTM`'s state_dict,
for `load_state_dict`. (An `LSTMCell` has the same names without the suffix `_l0`.) `to_*` takes an
LSTM, an LSTMCell, torch's or ours, or such a dict, and returns the flat list as NumPy arrays. The dtype
is kept, except that NumPy has no bfloat16, so exporting that raises TypeError. Where the other side has one
bias, export gives the sum of our two, and import sets the second to zero; without biases in the list there
are none in the dict.

An array of the wrong shape raises ValueError with its name, the shape expected and the shape got; what is no
array, or not of a floating dtype, and a `weights` or `source` that is none of the above raise TypeError.
Arrays may be in either byte order. All assume the usual activations: sigmoid for i, f and o, tanh for g and
for the output.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from gatematch.checks import check_bool, check_dtype, check_kind, check_number, check_shape, check_tensor

from .gates import PARAMETERS, packed_parameters

NumpyArray: TypeAlias = np.ndarray[Any, Any]
Array: TypeAlias = NumpyArray | Tensor
Source: TypeAlias = nn.Module | Mapping[str, Array]

# For each gate of the target in turn, its place in the source.
TORCH_FROM_TF1 = TF1_FROM_TORCH = (0, 2, 1, 3)
TORCH_FROM_ONNX = (0, 2, 3, 1)
ONNX_FROM_TORCH = (0, 3, 1, 2)


class _Cell(NamedTuple):
    """One direction of one layer in torch's layout; the fields are `gates.PARAMETERS`."""

    weight_ih: Tensor  # (4H, I)
    weight_hh: Tensor  # (4H, R), R = P with a projection, else H
    bias_ih: Tensor | None = None  # (4H,)
    bias_hh: Tensor | None = None  # (4H,)
    weight_hr: Tensor | None = None  # (P, H)

    def bias(self) -> Tensor | None:
        return None if self.bias_ih is None or self.bias_hh is None else self.bias_ih + self.bias_hh


def from_keras(weights: Sequence[Array], *, bidirectional: bool = False) -> dict[str, Tensor]:
    """A state_dict from the weights of `keras.layers.LSTM`.

    Args:
        weights: kernel (I, 4H), recurrent_kernel (H, 4H) and, with `use_bias`, bias (4H,), for every
            direction of every layer: what `get_weights()` gives for an `LSTM`, for a `Bidirectional`
            or for a `Sequential` of several of them with equal units.
        bidirectional: whether the layers are `Bidirectional(LSTM(...))`, merge_mode "concat"; where
            I = H the shapes alone do not tell.
    """
    check_bool("bidirectional", bidirectional)
    arrays = _tensors(weights)
    names = ("kernel", "recurrent_kernel", "bias")[: 3 if any(array.ndim == 1 for array in arrays) else 2]
    directions = 2 if bidirectional else 1
    _check_count(arrays, names, directions)
    hidden = min(arrays[1].shape, default=0)

    cells: list[_Cell] = []
    for start in range(0, len(arrays), len(names)):
        group = arrays[start : start + len(names)]
        inputs = _input_size(cells, directions)
        _check_group(group, names, start, ((inputs, 4 * hidden), (hidden, 4 * hidden), (4 * hidden,)))
        kernel, recurrent, *bias = group
        cells.append(_Cell(kernel.T, recurrent.T, *_two_biases(*bias)))
    return _state_dict(cells, directions)


def to_keras(source: Source) -> list[NumpyArray]:
    """The weights for `set_weights` of a `keras.layers.LSTM`, a `Bidirectional` or a `Sequential` of them.

    Returns kernel (I, 4H), recurrent_kernel (H, 4H) and, if there are biases, bias (4H,), for every
    direction of every layer. Raises ValueError for an LSTM with a projection.
    """
    cells, _ = _cells(source)
    _refuse_projection(cells, "Keras")
    arrays = []
    for cell in cells:
        arrays += [cell.weight_ih.T, cell.weight_hh.T]
        if (bias := cell.bias()) is not None:
            arrays.append(bias)
    return _numpy(arrays)


def from_tf1(
    weights: Sequence[Array], *, bidirectional: bool = False, forget_bias: float = 1.0
) -> dict[str, Tensor]:
    """A state_dict from the variables of TensorFlow 1's `BasicLSTMCell`, `LSTMBlockCell` or `LSTMCell`.

    Args:
        weights: kernel (I + H, 4H) and bias (4H,) for every direction of every layer; with `num_proj`,
            kernel (I + P, 4H), bias (4H,) and projection_kernel (H, P), P < H. The layers are those of
            a `MultiRNNCell` or of `stack_bidirectional_dynamic_rnn`. Peepholes have no counterpart.
        bidirectional: whether forward and backward cells alternate.
        forget_bias: what the cells add to the forget gate in every step; it becomes part of the bias.
    """
    check_bool("bidirectional", bidirectional)
    check_number("forget_bias", forget_bias)
    arrays = _tensors(weights)
    biases = [array for array in arrays if array.ndim == 1]
    names = ("kernel", "bias", "projection_kernel")[: 3 if len(arrays) == 3 * len(biases) else 2]
    directions = 2 if bidirectional else 1
    _check_count(arrays, names, directions)
    hidden = max((biases or arrays)[0].shape, default=0) // 4  # without a bias, the check says so
    output = min(arrays[2].shape, default=0) if len(names) == 3 else hidden

    cells: list[_Cell] = []
    for start in range(0, len(arrays), len(names)):
        group = arrays[start : start + len(names)]
        inputs = _input_size(cells, directions)
        rows = None if inputs is None else inputs + output
        _check_group(group, names, start, ((rows, 4 * hidden), (4 * hidden,), (hidden, output)))
        kernel, bias, *projection = group
        if len(kernel) <= output:
            raise ValueError(f"weights[{start}] (kernel): expected over {output} rows, got {len(kernel)}")
        kernel, bias = _reorder(kernel.T, TORCH_FROM_TF1), _reorder(bias, TORCH_FROM_TF1)
        bias[hidden : 2 * hidden] += forget_bias
        w_ih, w_hh = kernel[:, :-output], kernel[:, -output:]
        cells.append(_Cell(w_ih, w_hh, *_two_biases(bias), *(array.T for array in projection)))
    return _state_dict(cells, directions)


def to_tf1(source: Source, *, forget_bias: float = 1.0) -> list[NumpyArray]:
    """The variables of TensorFlow 1's `BasicLSTMCell` or, with a projection, `LSTMCell`.

    Args:
        source: an LSTM or LSTMCell, torch's or ours, or a state_dict. TensorFlow's cells always have a bias;
            one that is absent counts as 0.
        forget_bias: that of the cells: they add it in every step, so it is subtracted here.

    Returns kernel (I + H, 4H) and bias (4H,) for every direction of every layer; with a projection
    kernel (I + P, 4H), bias (4H,) and projection_kernel (H, P).
    """
    check_number("forget_bias", forget_bias)
    arrays = []
    for cell in _cells(source)[0]:
        kernel = torch.cat((cell.weight_ih, cell.weight_hh), 1)
        bias = cell.bias()
        if bias is None:
            bias = kernel.new_zeros(len(kernel))
        hidden = len(bias) // 4
        bias[hidden : 2 * hidden] -= forget_bias
        arrays += [_reorder(kernel, TF1_FROM_TORCH).T, _reorder(bias, TF1_FROM_TORCH)]
        if cell.weight_hr is not None:
            arrays.append(cell.weight_hr.T)
    return _numpy(arrays)


def from_onnx(weights: Sequence[Array]) -> dict[str, Tensor]:
    """A state_dict from the initialisers of LSTM nodes, https://onnx.ai/onnx/operators/onnx__LSTM.html.

    Args:
        weights: W (dirs, 4H, I), R (dirs, 4H, H) and, if the nodes have it, B (dirs, 8H), for every
            layer, that is every node. dirs is 1, direction "forward", or 2, "bidirectional"; "reverse"
            alone has no counterpart in `torch.nn.LSTM`, and neither have peepholes.
    """
    arrays = _tensors(weights)
    names = ("W", "R", "B")[: 3 if any(array.ndim == 2 for array in arrays) else 2]
    _check_count(arrays, names, 1)
    directions = 2 if arrays[0].shape[:1] == (2,) else 1
    hidden = min(arrays[1].shape[1:], default=0)

    cells: list[_Cell] = []
    for start in range(0, len(arrays), len(names)):
        group = arrays[start : start + len(names)]
        inputs = _input_size(cells, directions)
        shapes = ((4 * hidden, inputs), (4 * hidden, hidden), (8 * hidden,))
        _check_group(group, names, start, [(directions, *shape) for shape in shapes])
        for w, r, *b in zip(*group, strict=True):
            biases = [_reorder(half, TORCH_FROM_ONNX) for both in b for half in both.chunk(2)]
            cells.append(_Cell(_reorder(w, TORCH_FROM_ONNX), _reorder(r, TORCH_FROM_ONNX), *biases))
    return _state_dict(cells, directions)


def to_onnx(source: Source) -> list[NumpyArray]:
    """The initialisers of ONNX LSTM nodes, one node for every layer.

    Returns W (dirs, 4H, I), R (dirs, 4H, H) and, if there are biases, B (dirs, 8H), for every layer.
    Raises ValueError for an LSTM with a projection.
    """
    cells, directions = _cells(source)
    _refuse_projection(cells, "ONNX")
    arrays = []
    for start in range(0, len(cells), directions):
        layer = []
        for cell in cells[start : start + directions]:
            w, r, *b = (_reorder(tensor, ONNX_FROM_TORCH) for tensor in cell if tensor is not None)
            layer.append([w, r, torch.cat(b)] if b else [w, r])
        arrays += [torch.stack(both) for both in zip(*layer, strict=True)]
    return _numpy(arrays)


def _tensor(name: str, array: Any) -> Tensor:
    """A copy, so that nothing returned shares memory with an argument."""
    if isinstance(array, Tensor):
        check_tensor(name, array)
        check_dtype(name, array.dtype)
        return array.detach().clone()
    if not hasattr(array, "__array__"):
        hint = "; onnx.numpy_helper.to_array makes one of it" if type(array).__name__ == "TensorProto" else ""
        raise TypeError(f"{name}: expected an array or a tensor, got {type(array).__name__}{hint}")
    array = np.asarray(array)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise TypeError(f"{name}: expected dtype float64, float32 or float16, got {array.dtype}")
    return torch.from_numpy(
        array.astype(array.dtype.newbyteorder("="))
    )  # torch has this machine's order alone


def _tensors(weights: Sequence[Array]) -> list[Tensor]:
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise TypeError(f"weights: expected a list of arrays, got {type(weights).__name__}")
    return [_tensor(f"weights[{index}]", array) for index, array in enumerate(weights)]


def _numpy(tensors: Sequence[Tensor]) -> list[NumpyArray]:
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("source: expected tensors that hold values, got device meta")
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise TypeError(
            "source: expected a dtype that NumPy has, got torch.bfloat16; convert to float32 first"
        )
    return [tensor.contiguous().cpu().numpy() for tensor in tensors]


def _reorder(packed: Tensor, order: Sequence[int]) -> Tensor:
    blocks = packed.chunk(4)
    return torch.cat([blocks[k] for k in order])


def _two_biases(*bias: Tensor) -> tuple[Tensor, ...]:
    return tuple(both for one in bias for both in (one, torch.zeros_like(one)))


def _refuse_projection(cells: Sequence[_Cell], library: str) -> None:
    if cells[0].weight_hr is not None:
        raise ValueError(f"source: expected no projection, as {library}'s LSTM has none, got weight_hr")


def _input_size(cells: Sequence[_Cell], directions: int) -> int | None:
    """The input size that the next cell must have, given those before it; None where it is free."""
    if not cells:
        return None
    if len(cells) < directions:
        return cells[0].weight_ih.shape[1]
    return directions * cells[0].weight_hh.shape[1]


def _state_dict(cells: Sequence[_Cell], directions: int) -> dict[str, Tensor]:
    state = {}
    for index, cell in enumerate(cells):
        layer, direction = divmod(index, directions)
        for kind, tensor in cell._asdict().items():
            if tensor is not None:
                state[f"{kind}_l{layer}{'_reverse' * direction}"] = tensor.contiguous()
    return state


def _cells(source: Source) -> tuple[list[_Cell], int]:
    """The cells of a module or state_dict, by layer and direction, and the number of directions."""
    check_kind("source", source, (nn.Module, Mapping), "a module or a state_dict")
    state = packed_parameters(source) if isinstance(source, nn.Module) else source
    directions = ("", "_reverse") if "weight_ih_l0_reverse" in state else ("",)
    layers = sum(f"weight_ih_l{layer}" in state for layer in range(len(state)))
    suffixes = [f"_l{layer}{direction}" for layer in range(layers) for direction in directions] or [""]
    expected = {kind + suffix for suffix in suffixes for kind in PARAMETERS}
    if not state or not expected.issuperset(state):
        raise ValueError(f"source: expected the names of an LSTM's state_dict, got {', '.join(state)}")

    cells: list[_Cell] = []
    for suffix in suffixes:
        names = {kind: kind + suffix for kind in PARAMETERS if kind + suffix in state}
        found = {kind: _tensor(name, state[name]) for kind, name in names.items()}
        if not {"weight_ih", "weight_hh"} <= found.keys() or ("bias_ih" in found) != ("bias_hh" in found):
            raise ValueError(
                f"source: expected weight_ih{suffix}, weight_hh{suffix} and both biases or none, "
                f"got {', '.join(kind + suffix for kind in found)}"
            )
        hidden = max(found["weight_hh"].shape, default=0) // 4
        output = min(found["weight_hr"].shape, default=0) if "weight_hr" in found else hidden
        shapes = {
            "weight_ih": (4 * hidden, _input_size(cells, len(directions))),
            "weight_hh": (4 * hidden, output),
            "bias_ih": (4 * hidden,),
            "bias_hh": (4 * hidden,),
            "weight_hr": (output, hidden),
        }
        for kind, tensor in found.items():
            check_shape(kind + suffix, tensor, shapes[kind])
        cells.append(_Cell(**found))
    return cells, len(directions)


def _check_count(arrays: Sequence[Tensor], names: Sequence[str], directions: int) -> None:
    if not arrays or len(arrays) % (len(names) * directions):
        per = "direction of every layer, two directions a layer" if directions == 2 else "layer"
        raise ValueError(f"weights: expected {', '.join(names)} for every {per}, got {len(arrays)} arrays")


def _check_group(
    group: Sequence[Tensor], names: Sequence[str], start: int, shapes: Sequence[Sequence[int | None]]
) -> None:
    for index, (array, name, shape) in enumerate(zip(group, names, shapes, strict=False), start):
        check_shape(f"weights[{index}] ({name})", array, shape)
