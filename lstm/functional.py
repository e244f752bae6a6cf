"""The LSTM as functions: check the call, choose who computes it.

`impl="torch"` uses torch's fused LSTM (oneDNN, cuDNN or its native loop) if it supports what was asked for.
Under `torch.func` and torch.compile a custom op wraps the fused LSTM. `reference.py` serves `return_cells`
and forward mode. `impl="triton"` uses the kernels. `impl="auto"` uses the kernels on CUDA where they can
serve the call, and is "torch" elsewhere.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from numbers import Real
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gatematch.checks import (
    GivenLengths,
    autocast_dtype,
    check_alike,
    check_dtype,
    check_kind,
    check_lengths,
    check_shape,
    check_tensor,
    has_nested,
)
from gatematch.plan import TABLE, who_computes
from gatematch.torch_private import surroundings, tracing

from . import ops
from .fused import Options, Packing, with_lengths
from .reference import lstm_cell_reference, lstm_reference, scatter_rows
from .spec import KERNELS, Spec, State, check_matrix, sizes


def lstm(
    x: Tensor | PackedSequence,
    params: Mapping[str, Tensor],
    hx: State | None = None,
    *,
    lengths: GivenLengths | None = None,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    return_cells: bool = False,
    impl: str = "auto",
) -> tuple[Any, ...]:
    """A multi-layer LSTM, as `torch.nn.LSTM` computes it, with the weights as an argument.

    Shape letters: T time, B batch, I input, H hidden, P projection (else P = H), L layers, and D
    directions, 1 or 2. Gates in the order i, f, g, o.

    Args:
        x: (T, B, I), or (B, T, I) with `batch_first`, or unbatched (T, I), or a PackedSequence, sorted or
            not; float64, float32, float16 or bfloat16, T at least 1. B may be 0.
        params: tensors named as in torch.nn.LSTM's state_dict: `weight_ih_l0` (4H, I), `weight_hh_l0`
            (4H, P), and as they apply `bias_ih_l0`, `bias_hh_l0` (4H,), `weight_hr_l0` (P, H), the same
            with `_reverse`, and with `_l1` and so on. Layers, biases, directions and projection follow
            from the names. Any strides; the same tensor may stand under several names.
        hx: h_0 (L * D, B, P) and c_0 (L * D, B, H), without B for an unbatched x; zeros if None.
        lengths: (B,) integers, on x's device or on the CPU, or a list, tuple or array of them: the valid
            steps of each row, 0 to T; compiled or traced, a tensor. Steps past
            them are never looked at and give 0; the state stays that of the row's last valid step.
            impl="torch" reads them on the host, for which a call on CUDA waits for the device.
        dropout: probability of dropping an output between layers, if `training`. A seed draws what
            torch.nn.LSTM draws: for the padded x, or with `lengths` for the packed x, except that where
            lengths are not read, by the kernels, under torch.compile and `torch.func`, it draws for the
            padded x.
        training: whether dropout is applied.
        return_cells: also return the cell states of the last layer at every step.
        impl: "auto": the Triton kernels on CUDA where they can serve the call, "torch" elsewhere. "triton":
            the kernels, or an error that says why not. "torch": PyTorch's own. Also one kernel by name:
            "resident", "persistent" or "step". In float32 the kernels take TF32 products where
            torch.backends.cudnn.rnn.fp32_precision allows them, as torch's own do.

    Returns:
        y, (h_n, c_n), and c with `return_cells`. y is (T, B, D * P), batch_first and unbatched as x, or a
        PackedSequence if x is one; h_n and c_n are shaped as hx; c, before projection, is (T, B, D * H)
        arranged as y.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong name, shape, device, length or option.
        RuntimeError: T is 0, as in torch.nn.LSTM.
    """
    check_dropout(dropout)
    check_kind("batch_first", batch_first, bool)
    check_kind("training", training, bool)
    spec = Spec.of_params(params, x)
    weights = [params[name] for name in spec.names]
    return run(x, weights, spec, hx, lengths, batch_first, dropout, training, return_cells, impl)


def lstm_cell(
    x: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    impl: str = "auto",
) -> State:
    """One step of an LSTM, as `torch.nn.LSTMCell` computes it.

    Args:
        x: (B, I) or (I,).
        hx: h and c, (B, H) each, (H,) for an unbatched x; zeros if None.
        weight_ih: (4H, I), the gates in the order i, f, g, o.
        weight_hh: (4H, H).
        bias_ih: (4H,); both biases or none.
        bias_hh: (4H,).
        impl: "auto", "torch" or "triton", as for `lstm`, or "step", the only kernel of a single step.

    Returns:
        The next h and c, shaped as hx.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a wrong shape, device or option.
    """
    if bias_ih is None and bias_hh is None:
        weights: tuple[Any, ...] = (weight_ih, weight_hh)
    else:
        weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    if not cell_fits(x, weights, hx):
        check_cell(x, weights, hx)
    # torch's own op can be compiled, and neither mapped nor differentiated by torch.func.
    around = surroundings((), (x,), hx, weights)
    plain = around == "nothing" or not around.startswith(("torch.func", "forward mode"))
    by_kernel = who_computes(x, impl, around, KERNELS, ("step",)) == "triton"
    by_kernel = by_kernel and 0 not in (x.numel(), len(weight_hh))
    # The reference promotes, and the kernel takes, what torch's op refuses.
    if not plain or (by_kernel and any([weight.dtype is not x.dtype for weight in weights])):
        check_cell(x, weights, hx)
    if unbatched := x.dim() == 1:
        x = x.unsqueeze(0)
        hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
    if hx is None:
        zeros = x.new_zeros(x.shape[0], weight_hh.shape[1])
        hx = (zeros, zeros)
    if by_kernel:
        h, c = ops.one_step(x, hx, weights)
    elif not plain:
        h, c = lstm_cell_reference(x, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    else:
        try:
            h, c = torch.lstm_cell(x, hx, weight_ih, weight_hh, bias_ih, bias_hh)
        except RuntimeError:
            check_cell(x, weights, hx)
            raise
    return (h.squeeze(0), c.squeeze(0)) if unbatched else (h, c)


def run(
    x: Tensor | PackedSequence,
    weights: list[Tensor],
    spec: Spec,
    hx: State | None,
    lengths: GivenLengths | None,
    batch_first: bool,
    dropout: float,
    training: bool,
    return_cells: bool,
    impl: str,
) -> tuple[Any, ...]:
    """`lstm` with the parameters as a list in the order of `spec.names`; the module's way in."""
    if return_cells is not True and return_cells is not False:
        check_kind("return_cells", return_cells, bool)
    if not fits(x, weights, spec, hx, batch_first):
        check_call(x, weights, spec, hx, batch_first)
    if isinstance(x, PackedSequence):
        if lengths is not None:
            got = type(lengths).__name__
            raise ValueError(f"lengths: expected None with a PackedSequence, which has its own, got {got}")
        return _run_packed(x, weights, spec, hx, dropout, training, return_cells, impl)
    if lengths is not None:
        lengths = check_lengths("lengths", lengths, "x", x, 1 if batch_first else 0)
    if unbatched := x.dim() == 2:
        batch_first = False
        x = x.unsqueeze(1)
        hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
    around = surroundings((x, lengths), (x,), hx, weights)
    path = who_computes(x, impl, around, KERNELS, KERNELS)
    if path == "torch" and around == "torch.jit.trace" and lengths is None and not return_cells:
        path = "eager"  # a trace has one node for torch's own op, too, and runs where this library is not
    if path == "triton" and x.numel() == 0:  # there is nothing to launch
        path = TABLE[around][1]
    time = 1 if batch_first else 0
    if path == "triton" and x.shape[time] == 1 and lengths is None and not (return_cells or unbatched):
        single = ops.single_step(x, weights, spec, hx, time, impl)
        if single is not None:
            return single
    if hx is None:
        hx = _zero_state(x, spec, x.shape[0 if batch_first else 1])
    packing = None
    # Cell states come from the reference, which needs the packing only to draw dropout as the fused op does.
    needed = not return_cells or (training and dropout > 0)
    if lengths is not None and not lengths.is_meta and needed and path == "eager":
        packing = Packing.of(lengths, x.shape[1 if batch_first else 0])

    cells: tuple[Tensor, ...] = ()
    # The fused op takes no packing without a step.
    fused = path == "eager" and (lengths is None or (packing is not None and len(packing.order) > 0))
    try:
        if return_cells or not fused:
            x = x.transpose(0, 1) if batch_first else x
            rows = None if packing is None else packing.rows(x.shape, batch_first=False)
            call = (x, weights, spec, hx, lengths, dropout, training, rows, return_cells)
            y, h_n, c_n, c = ops.layers(*call, impl) if path == "triton" else _as_fused(*call, path)
            cells = () if c is None else (c,)
            if batch_first:
                y, cells = y.transpose(0, 1), tuple(c.transpose(0, 1) for c in cells)
        elif packing is not None:
            options = _options(x, spec, dropout, training)
            y, h_n, c_n = with_lengths(x, weights, hx, packing, batch_first, options)
        else:
            options = _options(x, spec, dropout, training)
            y, h_n, c_n = torch.lstm(x, hx, weights, *options, batch_first)
    except RuntimeError:
        # Parameters change so seldom that their layouts are not looked at in every call.
        for name, weight in zip(spec.names, weights, strict=True):
            check_tensor(name, weight)
        raise
    if unbatched:
        return y.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1)), *(c.squeeze(1) for c in cells)
    return y, (h_n, c_n), *cells


def _run_packed(
    x: PackedSequence,
    weights: list[Tensor],
    spec: Spec,
    hx: State | None,
    dropout: float,
    training: bool,
    return_cells: bool,
    impl: str,
) -> tuple[Any, ...]:
    data, batch_sizes, sorted_indices, unsorted_indices = x
    batch_sizes = batch_sizes.contiguous()  # torch's op looks at no strides, and reads past the end
    B: Any = batch_sizes[0] if tracing() else int(batch_sizes[0])  # a trace would keep the number
    if hx is None:
        hx = _zero_state(data, spec, B)
    elif sorted_indices is not None:
        hx = (hx[0].index_select(1, sorted_indices), hx[1].index_select(1, sorted_indices))

    around = surroundings((data, batch_sizes), (data,), hx, weights)
    path = who_computes(data, impl, around, KERNELS, KERNELS)
    if path != "eager" or return_cells:
        valid = torch.arange(B, device="cpu") < batch_sizes[:, None]  # (T, B)
        index = valid.flatten().nonzero().squeeze(1).to(data.device, non_blocking=True)
        padded = scatter_rows(data, index, valid.shape)
        call = (padded, weights, spec, hx, valid.sum(0), dropout, training, index, return_cells)
        y, h_n, c_n, c = ops.layers(*call, impl) if path == "triton" else _as_fused(*call, path)
        chosen = (y, c) if c is not None else (y,)
        outputs = [tensor.flatten(0, 1).index_select(0, index) for tensor in chosen]
    else:
        options = _options(data, spec, dropout, training)
        y, h_n, c_n = torch.lstm(data, batch_sizes, hx, weights, *options)
        outputs = [y]
    if unsorted_indices is not None:
        h_n, c_n = h_n.index_select(1, unsorted_indices), c_n.index_select(1, unsorted_indices)
    packed = [PackedSequence(out, batch_sizes, sorted_indices, unsorted_indices) for out in outputs]
    return packed[0], (h_n, c_n), *packed[1:]


def _as_fused(
    x: Tensor,
    weights: list[Tensor],
    spec: Spec,
    hx: State,
    lengths: Tensor | None,
    dropout: float,
    training: bool,
    packed_rows: Tensor | None,
    return_cells: bool,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, h_n, c_n, c by the ops or the reference, in the dtypes that autocast would give the fused op's."""
    device = x.device.type
    autocast = autocast_dtype(x)
    dtype = low = autocast or x.dtype
    onednn = lengths is None and spec.proj_size == 0 and x.numel() > 0
    if autocast and device == "cpu" and not onednn:
        # oneDNN's op has everything in autocast's dtype; torch's own loop, in use for the rest, only the
        # products.
        dtype = torch.promote_types(low, hx[1].dtype)
    x, *weights = (tensor.to(low).to(dtype) for tensor in (x, *weights))
    hx = (hx[0].to(dtype), hx[1].to(dtype))
    lengths = None if lengths is None else lengths.to(x.device, torch.int64)
    packed_rows = None if packed_rows is None else packed_rows.to(x.device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        if path == "torch":
            call = (x, weights, spec, hx, lengths, dropout, training, packed_rows, return_cells)
            y, h_n, c_n, c = ops.layers(*call, "torch")
        else:
            y, (h_n, c_n), cells = lstm_reference(
                x,
                dict(zip(spec.names, weights, strict=True)),
                hx,
                lengths=lengths,
                dropout=dropout,
                training=training,
                packed_rows=packed_rows,
            )
            c = cells if return_cells else None
    # A projection is the last product of a step.
    return (y.to(low), h_n.to(low), c_n, c) if spec.proj_size else (y, h_n, c_n, c)


def _zero_state(x: Tensor, spec: Spec, batch: int) -> State:
    cells = spec.num_layers * (1 + spec.bidirectional)
    c = x.new_zeros(cells, batch, spec.hidden_size)
    return (x.new_zeros(cells, batch, spec.proj_size) if spec.proj_size else c), c


def _options(x: Tensor, spec: Spec, dropout: float, training: bool) -> Options:
    """The fused op's has_biases, num_layers, dropout, train, bidirectional."""
    if training:
        return spec.bias, spec.num_layers, dropout, True, spec.bidirectional
    # cuDNN has a backward only in training mode, which without dropout computes the same.
    train = x.is_cuda and (torch.is_grad_enabled() or tracing())
    return spec.bias, spec.num_layers, 0.0, train, spec.bidirectional


# `fits` and `cell_fits` are quick tests of every call. One that fails them goes through the full checks.


def fits(x: Any, weights: list[Tensor], spec: Spec, hx: State | None, batch_first: bool) -> bool:
    """Whether this is a plain call, on a padded or unbatched tensor, with nothing wrong."""
    try:
        shape, shapes = x.shape, spec.shapes
        T = shape[1 if batch_first and len(shape) == 3 else 0]
        if T == 0 or len(shape) not in (2, 3) or shape[-1] != spec.input_size:
            return False
        if x.layout is not torch.strided:
            return False
        if hx is not None:
            if not hx[0].layout is hx[1].layout is torch.strided:
                return False
            h_shape, c_shape = spec.state_shapes(None if len(shape) == 2 else shape[0 if batch_first else 1])
            weights, shapes = [*weights, *hx], (*shapes, h_shape, c_shape)
        return _alike(x, weights, shapes) and (hx is None or isinstance(hx, (tuple, list)))
    except (AttributeError, LookupError, TypeError, ValueError):
        return False
    except RuntimeError:
        if not has_nested((x, *weights, *(hx if isinstance(hx, (tuple, list)) else ()))):
            raise
        return False


def cell_fits(x: Any, weights: Sequence[Tensor], hx: State | None) -> bool:
    """Whether this is a plain call of the cell, weights and biases in torch's order.

    Only what torch's op would broadcast, promote or compute, on the meta device or in complex numbers, and
    what is no tensor: the rest it refuses.
    """
    try:
        shape, dtype, cpu = x.shape, x.dtype, x.is_cpu
        recurrent = weights[1].shape
        H = recurrent[1]
        gates = 4 * H
        if weights[0].shape != (gates, shape[-1]) or recurrent != (gates, H):
            return False
        if len(weights) == 4 and not weights[2].shape == weights[3].shape == (gates,):
            return False
        if hx is not None:
            h, c = hx
            if not h.shape == c.shape == (*shape[:-1], H) or not isinstance(hx, (tuple, list)):
                return False
            if h.dtype is not dtype or c.dtype is not dtype:
                return False
        if not dtype.is_floating_point or not 0 < len(shape) < 3 or x.layout is not torch.strided:
            return False
        return all([weight.is_cpu is cpu for weight in weights])
    except (AttributeError, LookupError, TypeError, ValueError):
        return False
    except RuntimeError:
        if not has_nested((x, *weights, *(hx if isinstance(hx, (tuple, list)) else ()))):
            raise
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
        data, expected, ranks = x.data, f"data of shape (sum of lengths, {spec.input_size})", (2,)
        check_tensor("x.data", data)
    else:
        check_tensor("x", x, "a Tensor or PackedSequence")
        order = "B, T" if batch_first else "T, B"
        data = x
        expected = f"shape ({order}, {spec.input_size}) or (T, {spec.input_size})"
    if data.dim() not in ranks or data.shape[-1] != spec.input_size:
        transposed = data is x and data.dim() in ranks and spec.input_size in data.shape[:-1]
        hint = "; it looks transposed" if transposed else ""
        raise ValueError(f"x: expected {expected}, got {tuple(data.shape)}{hint}")
    check_dtype("x", data.dtype)
    for name, weight, shape in zip(spec.names, weights, spec.shapes, strict=True):
        check_tensor(name, weight)
        check_shape(name, weight, shape)
    # Where x and the weights differ, it is usually x that the caller can mend.
    for name, tensor in zip(("x", *spec.names[1:]), (data, *weights[1:]), strict=True):
        check_alike(name, tensor, spec.names[0], weights[0], autocast=True)

    if isinstance(x, PackedSequence):
        B = check_packed(x)
    else:
        batched = x.dim() == 3
        T, B = (x.shape[1], x.shape[0]) if batched and batch_first else (x.shape[0], x.shape[1])
        if T == 0:
            # Not ValueError: code written for torch.nn.LSTM catches the RuntimeError that it raises here.
            raise RuntimeError(f"x: expected at least one time step, got T = 0 in shape {tuple(x.shape)}")
    if hx is not None:
        unbatched = isinstance(x, Tensor) and x.dim() == 2
        check_state(hx, data, *spec.state_shapes(None if unbatched else B))


def check_packed(x: PackedSequence) -> int:
    """Its number of rows; an error where its parts contradict each other, for anybody can put one together.

    Indices on another device than the CPU are not read: the host would wait.
    """
    data, batch_sizes, *indices = x
    check_tensor("x.batch_sizes", batch_sizes)
    if batch_sizes.dtype != torch.int64:
        raise TypeError(f"x.batch_sizes: expected dtype torch.int64, got {batch_sizes.dtype}")
    check_shape("x.batch_sizes", batch_sizes, (None,))
    if not batch_sizes.is_cpu or batch_sizes.numel() == 0:
        got = f"shape {tuple(batch_sizes.shape)} on {batch_sizes.device}"
        raise ValueError(f"x.batch_sizes: expected at least one step on the CPU, got {got}")
    if torch.compiler.is_compiling() or tracing():
        return int(batch_sizes[0])
    counts = batch_sizes.tolist()
    B = counts[0]
    if B < 1 or counts[-1] < 0 or sorted(counts, reverse=True) != counts:
        raise ValueError(
            f"x.batch_sizes: expected at least 1 row, and in no step more than before, got {short(counts)}"
        )
    if sum(counts) != len(data):
        raise ValueError(f"x.data: expected sum of batch_sizes = {sum(counts)} rows, got {len(data)}")
    rows: list[Any] = []
    for name, index in zip(("x.sorted_indices", "x.unsorted_indices"), indices, strict=True):
        if index is not None:
            check_tensor(name, index)
            check_dtype(name, index.dtype, (torch.int32, torch.int64))
            check_shape(name, index, (B,))
            if index.device != data.device:
                raise ValueError(f"{name}: expected device {data.device} as x.data, got {index.device}")
        rows.append(list(range(B)) if index is None else index.tolist() if index.is_cpu else None)
    order, back = rows
    if order is not None and sorted(order) != list(range(B)):
        raise ValueError(f"x.sorted_indices: expected each of 0 to {B - 1} once, got {short(order)}")
    if None not in rows and [back[row] for row in order] != list(range(B)):
        raise ValueError(f"x.unsorted_indices: expected the inverse of x.sorted_indices, got {short(back)}")
    return B


def check_cell(x: Tensor, weights: Sequence[Tensor | None], hx: State | None) -> None:
    """`check_call` for one step."""
    check_tensor("x", x)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: len(weights)]
    check_matrix("weight_ih", weights[0], empty=True)
    check_matrix("weight_hh", weights[1], empty=True)
    for name, bias in zip(names[2:], weights[2:], strict=True):
        check_tensor(name, bias)
    tensors = [weight for weight in weights if weight is not None]
    I, H = sizes(x, tensors[0], tensors[1])
    shapes = ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))
    for name, weight, shape in zip(names, tensors, shapes, strict=False):
        check_shape(name, weight, shape)
    if x.dim() not in (1, 2) or x.shape[-1] != I:
        hint = "; it looks transposed" if x.dim() == 2 and x.shape[0] == I else ""
        raise ValueError(f"x: expected shape (B, {I}) or ({I},), got {tuple(x.shape)}{hint}")
    check_dtype("x", x.dtype)
    for name, tensor in zip(("x", *names[1:]), (x, *tensors[1:]), strict=True):
        check_alike(name, tensor, "weight_ih", tensors[0], autocast=True)
    if hx is not None:
        check_state(hx, x, (*x.shape[:-1], H), (*x.shape[:-1], H))


def check_state(hx: Any, x: Tensor, h_shape: tuple[int, ...], c_shape: tuple[int, ...]) -> None:
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
        hint = "; lengths are passed by name" if isinstance(hx, Tensor) and hx.dim() == 1 else ""
        raise TypeError(f"hx: expected a pair of tensors (h_0, c_0), got {got}{hint}")
    for name, state, shape in (("hx[0]", hx[0], h_shape), ("hx[1]", hx[1], c_shape)):
        check_tensor(name, state)
        check_shape(name, state, shape)
        check_alike(name, state, "x", x, autocast=True)


def check_dropout(dropout: Any) -> None:
    if not isinstance(dropout, Real) or isinstance(dropout, bool) or not 0 <= float(dropout) <= 1:
        got = repr(dropout) if isinstance(dropout, (Real, str)) else type(dropout).__name__
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being "
            f"zeroed, got {got}"
        )
