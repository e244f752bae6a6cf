"""Runs a layer of the LSTM on the Triton kernels, forward and backward; ops.py has its autograd.

The kernels compute the recurrence; what does not depend on it is one library product over all steps:

    z = x W_ihᵀ + b_ih + b_hh                              before it, with all directions and steps
    dx = dz W_ih,  dW_ih = dzᵀ x,  db = sum of dz,
    dW_hh = dzᵀ h of the step before                       after its backward

**Projection.** With m = o tanh(c) and h = m W_hrᵀ, the recurrence h_{t-1} W_hhᵀ = m_{t-1} (W_hh W_hr)ᵀ is
that of a plain LSTM in m, so the kernels know of none: W_hh W_hr is multiplied out once a call, h_0 W_hhᵀ is
added to the first step, and y = m W_hrᵀ is one product over all steps.

**Lengths.** x is 0 past them: products over all steps take those rows in.

**Padding.** Hidden sizes that are no multiple of 16 are filled up with units of zero weights; they stay 0.

**Which kernel** computes a layer, by `select`:

    resident     H up to 64: W_hh fits one multiprocessor, and programs do not synchronise
    persistent   beyond: W_hh is spread over the chip, with one grid barrier a step
    resident     H up to 128 in 16 bits, where persistent cannot serve
    step         otherwise, for any H, and where another could not be launched: one launch a step

On an H200 both take about as long forward at H 64, and resident less backward; at H 128 persistent takes
less forward. While W_hh fits the chip, persistent reads less memory than step, which reads all of W_hh in
every step.

Shapes: x (T, B, I), h_0 (N, B, P or H), c_0 (N, B, H), y (T, B, N·P or N·H), z, gates and dz (N, T, B, 4H),
cells (N, T, B, H) in float32, m (T, B, N·H); N directions.
Inside, H is filled up.
"""

import contextlib
import functools
import importlib
import logging
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from gatematch.kernels.config import architecture
from gatematch.kernels.launch import HIDDEN_MULTIPLE
from gatematch.kernels.recurrence import processors
from gatematch.precision import library_products

from .spec import KERNELS

_log = logging.getLogger("gatematch")


class Layer(NamedTuple):
    """What the choice depends on."""

    hidden_size: int
    dtype: torch.dtype
    precision: str
    device: torch.device


@functools.cache
def _module(kernel: str) -> ModuleType:
    return importlib.import_module(f"gatematch.kernels.lstm_{kernel}")


# To which H a layer is rather computed by a multiprocessor than by many that wait for each other.
_RESIDENT = 64

# Layers, forward or backward, whose kernel could not be launched: it is tried once.
_refused: set[tuple[Layer, bool]] = set()


@functools.lru_cache(maxsize=1024)
def serves(kernel: str, layer: Layer, backward: bool) -> bool:
    """Whether a kernel can compute such a layer on its device."""
    arch = architecture(layer.device)
    H, dtype, precision, device = layer
    if kernel == "step":
        return True
    if kernel == "persistent":
        return bool(_module(kernel).serves(H, dtype, precision, arch, processors(device), backward))
    return bool(_module(kernel).serves(H, dtype, precision, arch))


def select(layer: Layer, backward: bool, refused: bool = False) -> str:
    """The kernel by the rule above; `refused` says that what it gives could not be launched."""
    if refused:
        return "step"
    kernels: tuple[str, ...] = ("resident", "persistent")
    if layer.hidden_size > _RESIDENT:
        kernels = kernels[::-1]
    return next((kernel for kernel in kernels if serves(kernel, layer, backward)), "step")


def launch(impl: str, layer: Layer, backward: bool, *args: Any, **options: Any) -> Any:
    """Run the kernel that `impl` names, or the one that the rule selects and, should it fail, `step`.

    A kernel that is named has no substitute, but for a backward that it does not have.

    Raises:
        ValueError: the kernel that `impl` names cannot serve the layer.
    """
    named = impl in KERNELS
    if named and not serves(impl, layer, backward):
        if not backward:
            H, dtype, precision, device = layer
            raise ValueError(
                f"impl: expected 'triton', got {impl!r}; it cannot serve hidden_size {H} in {dtype} "
                f"({precision}) on {device}"
            )
        named = False
    kernel = impl if named else select(layer, backward, (layer, backward) in _refused)
    run = "backward" if backward else "forward"
    try:
        return getattr(_module(kernel), run)(*args, **options)
    except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
        # The first launch fails or none: nothing is written yet. Only one RuntimeError is about the launch.
        refused = not isinstance(error, RuntimeError) or "cooperative launch" in str(error)
        if named or kernel == "step" or not refused:
            raise
        _log.warning(
            "the LSTM's %s kernel cannot be launched for %s, step takes it: %s", kernel, layer, error
        )
        _refused.add((layer, backward))
        return getattr(_module("step"), run)(*args, **options)


_RNN: Any = torch.backends.cudnn.rnn


def precision() -> str:
    """That of float32 products: what torch allows its own LSTM."""
    return "tf32" if _RNN.fp32_precision == "tf32" else "float32"


def products(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Library products in the precision of the recurrence."""
    return library_products(x.device.type, "tf32" if x.is_cuda and precision() == "tf32" else "ieee")


class _Direction(NamedTuple):
    """The weights of one direction."""

    weight_ih: Tensor
    weight_hh: Tensor
    biases: list[Tensor]
    weight_hr: Any  # a Tensor with a projection


def _directions(weights: list[Tensor], N: int, projected: bool) -> list[_Direction]:
    size = len(weights) // N
    own = [weights[d * size : (d + 1) * size] for d in range(N)]
    return [_Direction(w[0], w[1], w[2 : size - projected], w[-1] if projected else None) for w in own]


def _recurrent_weight(direction: _Direction, H: int, filled: int) -> Tensor:
    """W_hh, or W_hh W_hr with a projection, filled up."""
    weight = direction.weight_hh
    if direction.weight_hr is not None:
        weight = (weight.float() @ direction.weight_hr.float()).to(weight.dtype)
    return weight.contiguous() if filled == H else pad(_fill(weight, H, filled), (0, filled - H))


def _fill(gates: Tensor, H: int, filled: int) -> Tensor:
    """(4H, ...) with H filled up."""
    sides = (0, 0, 0, filled - H) if gates.dim() == 2 else (0, filled - H)
    return pad(gates.unflatten(0, (4, H)), sides).flatten(0, 1)


def _filled(state: Tensor, H: int) -> Tensor:
    missing = H - state.shape[-1]
    return pad(state, (0, missing)) if missing else state.contiguous()


def _cut(x: Tensor, groups: int, H: int) -> Tensor:
    """The last dimension, `groups` of filled-up units each, without what they were filled up with."""
    return x if x.shape[-1] == groups * H else x.unflatten(-1, (groups, -1))[..., :H].flatten(-2).contiguous()


def _first_steps(x: Tensor, d: int, lengths: Tensor | None) -> Tensor:
    """x (T, B, ...) at each row's step 0 in direction d: (B, ...). Rows of length 0 give any."""
    if d == 0:
        return x[0]
    return x[-1] if lengths is None else x[_last(lengths, len(x)), torch.arange(x.shape[1], device=x.device)]


def _last(lengths: Tensor, T: int) -> Tensor:
    """The time of each row's last valid step, 0 for rows of length 0."""
    return lengths.long().clamp(1, T) - 1


def _sizes(x: Tensor, weights: list[Tensor]) -> tuple[int, int, int, Layer]:
    """T, H, H filled up, and the layer that a kernel is chosen for."""
    H = weights[1].shape[0] // 4
    filled = H + -H % HIDDEN_MULTIPLE
    kind = precision() if x.dtype == torch.float32 else "float32"
    return x.shape[0], H, filled, Layer(filled, x.dtype, kind, x.device)


def forward(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    lengths: Tensor | None,
    weights: list[Tensor],
    projected: bool,
    impl: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, h_n, c_n and, if `save`, cells, gates and, with a projection, m."""
    N, B = len(h_0), x.shape[1]
    T, H, filled, layer = _sizes(x, weights)
    directions, exact = _directions(weights, N, projected), filled == H
    rows = x.flatten(0, 1)
    with products(x):
        z = x.new_empty(N, T, B, 4 * filled)
        for d, direction in enumerate(directions):
            bias = direction.biases[0] + direction.biases[1] if direction.biases else None
            weight, out = direction.weight_ih, z[d].flatten(0, 1)
            if not exact:
                weight, bias = _fill(weight, H, filled), None if bias is None else _fill(bias, H, filled)
            if bias is None:
                torch.mm(rows, weight.T, out=out)
            else:
                torch.addmm(bias, rows, weight.T, out=out)
            if projected:
                _add_to_first_steps(z[d], d, lengths, h_0[d] @ _fill(direction.weight_hh, H, filled).T)
        if projected:
            start = h_0.new_zeros(N, B, filled)
        else:
            start = h_0.contiguous() if exact else _filled(h_0, filled)
        m, h_n, c_n, cells = launch(
            impl,
            layer,
            False,
            z,
            [_recurrent_weight(direction, H, filled) for direction in directions],
            start,
            c_0.contiguous() if exact else _filled(c_0, filled),
            lengths,
            precision=layer.precision,
            save=save,
        )
        y = m
        if not exact:
            y, h_n, c_n = _cut(m, N, H), _cut(h_n, 1, H), _cut(c_n, 1, H)
        if projected:
            y, h_n = _project(m, H, filled, directions), _projected_state(h_n, h_0, lengths, directions)
    return y, h_n, c_n, cells, z if save else None, m if save and projected else None


def _add_to_first_steps(z: Tensor, d: int, lengths: Tensor | None, addend: Tensor) -> None:
    if d == 0:
        z[0] += addend
    elif lengths is None:
        z[-1] += addend
    else:
        z[_last(lengths, len(z)), torch.arange(z.shape[1], device=z.device)] += addend


def _project(m: Tensor, H: int, filled: int, directions: list[_Direction]) -> Tensor:
    T, B, _ = m.shape
    P = len(directions[0].weight_hr)
    y = m.new_empty(T, B, len(directions) * P)
    for d, direction in enumerate(directions):
        values = m[..., d * filled : d * filled + H].flatten(0, 1)
        y[..., d * P : (d + 1) * P] = (values @ direction.weight_hr.T).view(T, B, P)
    return y


def _projected_state(m: Tensor, h_0: Tensor, lengths: Tensor | None, directions: list[_Direction]) -> Tensor:
    h_n = torch.stack([m[d] @ direction.weight_hr.T for d, direction in enumerate(directions)])
    return h_n if lengths is None else torch.where((lengths > 0)[:, None], h_n, h_0)


def backward(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    lengths: Tensor | None,
    weights: list[Tensor],
    y: Tensor,
    cells: Tensor,
    gates: Tensor,
    m: Tensor | None,
    g_y: Tensor | None,
    g_h_n: Tensor | None,
    g_c_n: Tensor | None,
    g_cells: Tensor | None,
    projected: bool,
    impl: str,
    wanted: list[bool],
) -> list[Tensor | None]:
    """Gradients of x, h_0, c_0 and the weights, None where not wanted."""
    N = len(h_0)
    T, H, filled, layer = _sizes(x, weights)
    directions = _directions(weights, N, projected)
    g_h_n = torch.zeros_like(h_0) if g_h_n is None else g_h_n
    g_c_n = torch.zeros_like(c_0) if g_c_n is None else g_c_n
    with products(x):
        if projected and lengths is not None and g_y is not None:  # anything may stand past the lengths
            g_y = g_y.masked_fill((torch.arange(T, device=x.device)[:, None] >= lengths)[..., None], 0)
        g_m, g_m_n = g_y, g_h_n
        if projected:
            g_m = None if g_y is None else _from_projection(g_y, filled, directions)
            ended = g_h_n if lengths is None else torch.where((lengths > 0)[:, None], g_h_n, 0)
            g_m_n = torch.stack([ended[d] @ direction.weight_hr for d, direction in enumerate(directions)])
        elif g_y is not None and filled > H:
            g_m = pad(g_y.unflatten(-1, (N, H)), (0, filled - H)).flatten(-2)
        dz, dh_0, dc_0 = launch(
            impl,
            layer,
            True,
            gates,
            cells,
            [_recurrent_weight(direction, H, filled) for direction in directions],
            _filled(c_0, filled),
            lengths,
            None if g_m is None else g_m.contiguous(),
            _filled(g_m_n, filled),
            _filled(g_c_n, filled),
            None if g_cells is None else g_cells.contiguous(),
            precision=layer.precision,
        )
        dz, dh_0, dc_0 = _cut(dz, 4, H), _cut(dh_0, 1, H), _cut(dc_0, 1, H)
        if projected:
            dh_0 = torch.stack(
                [
                    _first_steps(dz[d], d, lengths) @ direction.weight_hh
                    for d, direction in enumerate(directions)
                ]
            )
            if lengths is not None:
                dh_0 = torch.where((lengths > 0)[:, None], dh_0, g_h_n)
        found: list[Tensor | None] = [dh_0, dc_0]
        dx = None
        size = len(weights) // N
        for d, direction in enumerate(directions):
            flat = dz[d].flatten(0, 1)
            if wanted[0]:
                dx = flat @ direction.weight_ih if dx is None else dx.addmm_(flat, direction.weight_ih)
            need = wanted[3 + d * size : 3 + (d + 1) * size]
            found += _weight_gradients(direction, d, need, x, h_0[d], lengths, y, m, dz[d], g_y, g_h_n[d])
    found = [None if dx is None else dx.view_as(x), *found]
    return [grad if want else None for grad, want in zip(found, wanted, strict=True)]


def _from_projection(g_y: Tensor, H: int, directions: list[_Direction]) -> Tensor:
    """The gradient of m (T, B, N·H) from that of y."""
    parts = g_y.unflatten(-1, (len(directions), -1)).unbind(2)
    products = [part @ direction.weight_hr for part, direction in zip(parts, directions, strict=True)]
    return torch.cat([pad(product, (0, H - product.shape[-1])) for product in products], -1)


def _weight_gradients(
    direction: _Direction,
    d: int,
    need: list[bool],
    x: Tensor,
    h_0: Tensor,
    lengths: Tensor | None,
    y: Tensor,
    m: Tensor | None,
    dz: Tensor,
    g_y: Tensor | None,
    g_h_n: Tensor,
) -> list[Tensor | None]:
    """Those of one direction, in the order of its weights."""
    T, B, _ = x.shape
    # dz of all steps but the first of the sequence, and of all but the last, in the direction's own order.
    later, sooner = (slice(1, None), slice(None, -1)) if d == 0 else (slice(None, -1), slice(1, None))
    width = h_0.shape[1]
    flat = dz.flatten(0, 1)
    grads: list[Tensor | None] = [flat.T @ x.flatten(0, 1) if need[0] else None]
    recurrent = None
    if need[1]:
        if lengths is not None:  # rows of length 0 take no step, whatever their state
            h_0 = torch.where((lengths > 0)[:, None], h_0, 0)
        recurrent = _first_steps(dz, d, lengths).T @ h_0
        before = y[sooner, :, d * width : (d + 1) * width].flatten(0, 1)
        recurrent.addmm_(dz[later].flatten(0, 1).T, before)
    grads.append(recurrent)
    if direction.biases:
        bias = flat.sum(0) if need[2] or need[3] else None
        grads += [bias, None if bias is None else bias.clone()]
    if m is not None and need[-1]:
        # Of h: what comes from y, from the next step and from h_n.
        dh = dz.new_zeros(T, B, width) if g_y is None else g_y[..., d * width : (d + 1) * width].clone()
        dh[sooner] += dz[later] @ direction.weight_hh
        if d == 1:
            dh[0] += g_h_n
        elif lengths is None:
            dh[-1] += g_h_n
        else:
            dh[_last(lengths, T), torch.arange(B, device=dh.device)] += g_h_n
        filled = m.shape[-1] // (y.shape[-1] // width)
        values = m[..., d * filled : d * filled + direction.weight_hh.shape[0] // 4]
        grads.append(dh.flatten(0, 1).T @ values.flatten(0, 1))
    elif direction.weight_hr is not None:
        grads.append(None)
    return grads
