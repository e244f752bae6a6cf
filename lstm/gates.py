"""The gate matrices of an LSTM by name, and initialisers that work on one gate at a time.

An LSTM cell has eight weight matrices, an input and a recurrent one for each of the gates i, f, g, o.
They are stored packed, four blocks of H rows in that order, so that one product of width 4H serves all
gates:

    weight_ih (4H, I) = [W_ii; W_if; W_ig; W_io]      bias_ih (4H,) = [b_ii; b_if; b_ig; b_io]
    weight_hh (4H, R) = [W_hi; W_hf; W_hg; W_ho]      bias_hh (4H,) = [b_hi; b_hf; b_hg; b_ho]
    weight_hr (P, H)  =  W_hr                         R = P with a projection, else H

The names are those of https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html. Only parameter
names and attributes are relied on, so `torch.nn.LSTM` and `torch.nn.LSTMCell` are served as well as ours.
"""

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor, nn

from gatematch.checks import check_bool, check_choice, check_kind, check_number, check_tensor
from gatematch.torch_private import writes

GATES = "ifgo"
# Each packed parameter, in torch's order, and how the names of its gates begin; W_hr is a whole name.
PARAMETERS = {"weight_ih": "W_i", "weight_hh": "W_h", "bias_ih": "b_i", "bias_hh": "b_h", "weight_hr": "W_hr"}
PRESETS = ("torch", "keras", "tf1")
Module = TypeVar("Module", bound=nn.Module)


def packed_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The packed weights and biases of an LSTM or LSTMCell by name, in the order of `parameters()`.

    A parametrised weight (`torch.nn.utils.parametrize`) comes as computed, a plain tensor.
    Raises TypeError for any other module, `torch.nn.GRU` included.
    """
    suffixes = [""]
    if layers := getattr(module, "num_layers", None):
        directions = ("", "_reverse") if getattr(module, "bidirectional", False) else ("",)
        suffixes = [f"_l{layer}{direction}" for layer in range(layers) for direction in directions]
    names = [kind + suffix for suffix in suffixes for kind in PARAMETERS]
    packed = {name: getattr(module, name) for name in names if getattr(module, name, None) is not None}
    for name, tensor in packed.items():
        if isinstance(tensor, Tensor):
            check_tensor(name, tensor)
    recurrent = packed.get("weight_hh" + suffixes[0])
    if recurrent is None or len(recurrent) != 4 * getattr(module, "hidden_size", 0):
        raise TypeError(f"module: expected an LSTM or LSTMCell, got {type(module).__name__}")
    return packed


def named_gates(module: nn.Module, *, grad: bool = False) -> dict[str, Tensor]:
    """Every gate's matrices and biases as named views into the packed parameters of an LSTM or LSTMCell.

    Args:
        module: `gatematch.lstm.LSTM`, `LSTMCell` or torch's, any number of layers and directions.
        grad: views into the parameters' `.grad` instead; parameters without a gradient are left out.

    Returns, by layer and direction, in the dtype and on the device of the parameters,

        W_ii, W_if, W_ig, W_io   (H, I)   input matrices
        W_hi, W_hf, W_hg, W_ho   (H, H)   recurrent matrices; (H, P) with a projection
        b_ii, b_if, b_ig, b_io   (H,)     input biases, and b_hi ... b_ho, the recurrent ones
        W_hr                     (P, H)   projection

    each followed by the layer's suffix: `W_ii_l0`, `W_ii_l1_reverse`; none for a cell. In layers above
    the first, I is the width of the layer below.

    The views belong to the autograd graph: `(named_gates(lstm)["W_hf_l0"] ** 2).sum().backward()` adds
    to `lstm.weight_hh_l0.grad`. Writing to one writes the parameter and, as for any parameter, is done
    under `torch.no_grad()` or by a `torch.nn.init` function. Of a parametrised weight they show the value
    computed by this call, and what is written to them is lost; so it is once a parameter has been given other
    memory, as `module.to(...)` does: call again.

    Raises TypeError for a module that is no LSTM, and a `grad` that is no bool.
    """
    check_bool("grad", grad)
    gates: dict[str, Tensor] = {}
    for name, tensor in packed_parameters(module).items():
        if not grad:
            gates |= _gate_views(name, tensor)
        elif tensor.is_leaf and tensor.grad is not None:
            gates |= _gate_views(name, tensor.grad)
    return gates


def init_gates_(module: Module, rules: Mapping[str, float | Callable[[Tensor], object]]) -> Module:
    """Initialise an LSTM or LSTMCell in place, gate by gate.

    ```python
    lstm = torch.nn.LSTM(3, 4)
    init_gates_(lstm, {"W_i*": nn.init.xavier_uniform_, "W_h[ifgo]*": nn.init.orthogonal_,
                       "b_*": 0.0, "b_if*": 1.0})
    ```

    Args:
        module: see `named_gates`.
        rules: shell-style patterns over the names of `named_gates`, case-sensitive, each with a constant
            or a function that writes in place to the view it is given. They are applied in order, each
            to every name that it matches, so a later rule overrides an earlier one. `W_h?*` includes
            the projection W_hr; `W_h[ifgo]*` does not. The two biases of a gate are added in use, so
            `"b_?f*": 1.0` would make a forget bias of 2.

    Returns the module. Raises, before anything is written, TypeError for a rule that is neither, and
    ValueError for a constant that is not finite and for a pattern that matches no name or that matches a
    gate of a parametrised weight, which has no memory of its own to write to. Raises TypeError for a function
    that returns another tensor instead of writing to its view; rules before it have been applied then.
    """
    check_kind("rules", rules, Mapping, "a mapping from patterns")
    for pattern, rule in rules.items():
        check_kind(f"rules[{pattern!r}]", rule, (Real, Callable), "a number or a function")
        if not callable(rule):
            check_number(f"rules[{pattern!r}]", rule)
    gates = named_gates(module)
    computed = _computed_gates(module)
    matches = {rule: [name for name in gates if fnmatchcase(name, rule)] for rule in rules}
    for pattern, names in matches.items():
        if not names:
            raise ValueError(
                f"rules: expected patterns that match one of {', '.join(gates)}, got {pattern!r}"
            )
        if lost := computed.intersection(names):
            raise ValueError(
                f"rules: expected patterns of parameters, got {pattern!r} for {min(lost)}, computed by a "
                "parametrisation; initialise the weight before parametrising it"
            )
    with torch.no_grad():
        for pattern, rule in rules.items():
            for name in matches[pattern]:
                view = gates[name]
                if not callable(rule):
                    view.fill_(rule)
                    continue
                before = writes(view)
                found = rule(view)
                if found is not None and writes(view) == before is not None and not _shared(found, view):
                    raise TypeError(
                        f"rules[{pattern!r}]: expected a function that writes to the view it is given, "
                        f"got one that returns a {type(found).__name__} and leaves {name} as it was"
                    )
    return module


def _shared(found: object, view: Tensor) -> bool:
    """Whether a function returned a part of what it was given, as after a write through `view.data`."""
    if not isinstance(found, Tensor) or found.layout != torch.strided:
        return False
    return found.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()


def init_preset_(module: Module, preset: str, generator: torch.Generator | None = None) -> Module:
    """Initialise every parameter of an LSTM or LSTMCell in place, as another library does by default.

    - "torch": U(-1/sqrt(H), 1/sqrt(H)) for all, W_hr and biases included; the same values as
      `reset_parameters()` from the same random state.
    - "keras": as `keras.layers.LSTM`. Input kernel Glorot uniform over the fused (I, 4H), limit
      sqrt(6 / (I + 4H)); recurrent kernel orthogonal over the fused (R, 4H), so the columns of
      weight_hh are orthonormal; biases 0 and the forget bias 1, if there are biases.
      Keras has no projection: W_hr gets Glorot uniform, its default for a dense kernel.
    - "tf1": as TensorFlow 1's `BasicLSTMCell` and `LSTMCell`. Glorot uniform over the fused [x, h] kernel
      (I + R, 4H), limit sqrt(6 / (I + R + 4H)), that is sqrt(6 / (I + 5H)) without a projection;
      biases 0. The forget_bias 1 which those cells add in every step is put in the forget bias, so
      a module without biases is refused. W_hr is Glorot uniform, as `LSTMCell`'s projection kernel.

    torch has two biases where these libraries have one: the forget bias 1 goes to b_if and b_hf is 0.
    Glorot: https://proceedings.mlr.press/v9/glorot10a.html; orthogonal: https://arxiv.org/abs/1312.6120.

    Args:
        module: see `named_gates`. Any floating dtype.
        preset: "torch", "keras" or "tf1".
        generator: source of the random numbers, on the module's device; the global one if None.

    Returns the module. Raises ValueError for an unknown preset, for a parametrised weight and for "tf1"
    without biases.
    """
    packed = packed_parameters(module)
    check_choice("preset", preset, PRESETS)
    if generator is not None:
        check_kind("generator", generator, torch.Generator)
    if computed := _computed_gates(module):
        raise ValueError(
            f"module: expected parameters, got {min(computed)}, computed by a parametrisation; "
            "initialise the weight before parametrising it"
        )
    if preset == "tf1" and not any(name.startswith("bias") for name in packed):
        raise ValueError("module: expected biases for 'tf1', which adds 1 to the forget gate's, got none")

    hidden = len(next(iter(packed.values()))) // 4
    for name, tensor in packed.items():
        kind, suffix = _parse(name)
        if tensor.numel() == 0:  # of a cell without inputs or hidden units
            continue
        if preset == "torch":
            _uniform_(tensor, 1 / math.sqrt(hidden), generator)
        elif kind.startswith("bias"):
            nn.init.zeros_(tensor)
            if kind == "bias_ih":
                nn.init.ones_(_gate_views(name, tensor)["b_if" + suffix])
        elif preset == "keras" and kind == "weight_hh":
            _orthogonal_(tensor, generator)
        elif preset == "tf1" and kind != "weight_hr":
            inputs, recurrent = packed["weight_ih" + suffix].shape[1], packed["weight_hh" + suffix].shape[1]
            _uniform_(tensor, math.sqrt(6 / (inputs + recurrent + 4 * hidden)), generator)
        else:
            nn.init.xavier_uniform_(tensor, generator=generator)
    return module


def _parse(name: str) -> tuple[str, str]:
    """Split a parameter's name: weight_ih_l0_reverse -> weight_ih, _l0_reverse."""
    kind = next(kind for kind in PARAMETERS if name.startswith(kind))
    return kind, name.removeprefix(kind)


def _gate_views(name: str, packed: Tensor) -> dict[str, Tensor]:
    kind, suffix = _parse(name)
    stem = PARAMETERS[kind]
    if kind == "weight_hr":
        return {stem + suffix: packed[:]}
    # Slices, not chunk(): autograd refuses in-place writes to the outputs of functions with several.
    hidden = len(packed) // 4
    return {stem + gate + suffix: packed[k * hidden : (k + 1) * hidden] for k, gate in enumerate(GATES)}


def _computed_gates(module: nn.Module) -> set[str]:
    """Names of the gates whose weight is no parameter but computed from others."""
    packed = packed_parameters(module)
    computed = [name for name, tensor in packed.items() if not isinstance(tensor, nn.Parameter)]
    return {gate for name in computed for gate in _gate_views(name, packed[name])}


def _uniform_(tensor: Tensor, limit: float, generator: torch.Generator | None) -> None:
    nn.init.uniform_(tensor, -limit, limit, generator=generator)


def _orthogonal_(tensor: Tensor, generator: torch.Generator | None) -> None:
    # The QR decomposition behind it has no 16-bit version.
    wide = torch.empty_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
    nn.init.orthogonal_(wide, generator=generator)
    with torch.no_grad():
        tensor.copy_(wide)
