"""What a call of the LSTM must look like.

`fits` and `cell_fits` are quick tests of every call. A call that fails them goes through the full checks.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gatematch.checks import check_alike, check_dtype, check_kind, check_shape
from gatematch.torch_private import is_any_autocast_enabled

from .spec import Spec, State, check_matrix, sizes

KERNELS = ("resident", "persistent", "step")
IMPLS = ("auto", "torch", "triton", *KERNELS)


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
        check_kind("x", x, Tensor, "a Tensor or PackedSequence")
        order = "B, T" if batch_first else "T, B"
        data = x
        expected = f"shape ({order}, {spec.input_size}) or (T, {spec.input_size})"
    if data.dim() not in ranks or data.shape[-1] != spec.input_size:
        transposed = data is x and data.dim() in ranks and spec.input_size in data.shape[:-1]
        hint = "; it looks transposed" if transposed else ""
        raise ValueError(f"x: expected {expected}, got {tuple(data.shape)}{hint}")
    check_dtype("x", data.dtype)
    for name, weight, shape in zip(spec.names, weights, spec.shapes, strict=True):
        check_kind(name, weight, Tensor)
        check_shape(name, weight, shape)
    autocast = is_any_autocast_enabled()
    # Where x and the weights differ, it is usually x that the caller can mend.
    for name, tensor in zip(("x", *spec.names[1:]), (data, *weights[1:]), strict=True):
        check_alike(name, tensor, spec.names[0], weights[0], autocast)

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
    check_kind("x", x, Tensor)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: len(weights)]
    check_matrix("weight_ih", weights[0])
    check_matrix("weight_hh", weights[1])
    for name, bias in zip(names[2:], weights[2:], strict=True):
        check_kind(name, bias, Tensor)
    tensors = [weight for weight in weights if weight is not None]
    I, H = sizes(x, tensors[0], tensors[1])
    shapes = ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    for name, weight, shape in zip(names, tensors, shapes, strict=False):
        check_shape(name, weight, shape)
    if x.dim() not in (1, 2) or x.shape[-1] != I:
        hint = "; it looks transposed" if x.dim() == 2 and x.shape[0] == I else ""
        raise ValueError(f"x: expected shape (B, {I}) or ({I},), got {tuple(x.shape)}{hint}")
    check_dtype("x", x.dtype)
    autocast = is_any_autocast_enabled()
    for name, tensor in zip(("x", *names[1:]), (x, *tensors[1:]), strict=True):
        check_alike(name, tensor, "weight_ih", tensors[0], autocast)
    if hx is not None:
        check_state(hx, x, (*x.shape[:-1], H), (*x.shape[:-1], H))


def check_state(hx: Any, x: Tensor, h_shape: tuple[int, ...], c_shape: tuple[int, ...]) -> None:
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
        hint = "; lengths are passed by name" if isinstance(hx, Tensor) and hx.dim() == 1 else ""
        raise TypeError(f"hx: expected a pair of tensors (h_0, c_0), got {got}{hint}")
    for name, state, shape in (("hx[0]", hx[0], h_shape), ("hx[1]", hx[1], c_shape)):
        check_kind(name, state, Tensor)
        check_shape(name, state, shape)
        check_alike(name, state, "x", x, is_any_autocast_enabled())


def check_dropout(dropout: Any) -> None:
    if not isinstance(dropout, Real) or isinstance(dropout, bool) or not 0 <= float(dropout) <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being "
            f"zeroed, got {dropout!r}"
        )
