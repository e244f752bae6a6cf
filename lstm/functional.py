"""The LSTM as functions: check the call, choose who computes it.

On every device, `impl="torch"` is PyTorch's own fused op (oneDNN, cuDNN or its native loop) where that can
give what was asked. It cannot give the cell states of every step, nor run under `torch.func` and
forward-mode derivatives; `reference.py` does those. `impl="auto"` is the same in this version.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .checks import (
    Spec,
    State,
    cell_fits,
    check_call,
    check_cell,
    check_dropout,
    check_impl,
    check_lengths,
    fits,
    transformed,
)
from .reference import lstm_cell_reference, lstm_reference


def lstm(
    x: Tensor | PackedSequence,
    params: Mapping[str, Tensor],
    hx: State | None = None,
    *,
    lengths: Tensor | None = None,
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
        lengths: (B,) integers, on x's device or on the CPU: the valid steps of each row, 0 to T. Steps past
            them are never looked at and give 0; the state stays that of the row's last valid step.
        dropout: probability of dropping an output between layers, if `training`. A seed draws what
            torch.nn.LSTM draws: for the padded x, or with `lengths` for the packed x.
        return_cells: also return the cell states of the last layer at every step.
        impl: "auto", "torch" or "triton", for which this version has no kernels.

    Returns:
        y, (h_n, c_n), and c with `return_cells`. y is (T, B, D * P), batch_first and unbatched as x, or a
        PackedSequence if x is one; h_n and c_n are shaped as hx; c, before projection, is (T, B, D * H)
        arranged as y.

    Raises:
        TypeError: an argument of the wrong type. ValueError: a wrong name, shape, dtype, device, length or
        option.
    """
    check_dropout(dropout)
    spec = Spec.of_params(params)
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
        weight_ih, weight_hh, bias_ih, bias_hh: (4H, I), (4H, H), (4H,) and (4H,); both biases or none.
        impl: "auto", "torch" or "triton", for which this version has no kernels.

    Returns:
        The next h and c, shaped as hx.

    Raises:
        TypeError: an argument of the wrong type. ValueError: a wrong shape, dtype, device or option.
    """
    check_impl(impl)
    if bias_ih is None and bias_hh is None:
        weights: tuple[Any, ...] = (weight_ih, weight_hh)
    else:
        weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    if not cell_fits(x, weights, hx):
        check_cell(x, weights, hx)
    if unbatched := x.dim() == 1:
        x = x.unsqueeze(0)
        hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
    if hx is None:
        zeros = x.new_zeros(x.shape[0], weight_hh.shape[1])
        hx = (zeros, zeros)
    if transformed():
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
    lengths: Tensor | None,
    batch_first: bool,
    dropout: float,
    training: bool,
    return_cells: bool,
    impl: str,
) -> tuple[Any, ...]:
    """`lstm` with the parameters as a list in the order of `spec.names`; the module's way in."""
    check_impl(impl)
    if not fits(x, weights, spec, hx, batch_first):
        check_call(x, weights, spec, hx, batch_first)
    if lengths is not None:
        check_lengths(lengths, x, batch_first)
        lengths = lengths.to(torch.int64)
    if isinstance(x, PackedSequence):
        return _run_packed(x, weights, spec, hx, dropout, training, return_cells)
    if unbatched := x.dim() == 2:
        batch_first = False
        x = x.unsqueeze(1)
        hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
    if hx is None:
        hx = _zero_state(x, spec, x.shape[0 if batch_first else 1])

    cells: tuple[Tensor, ...] = ()
    if return_cells or not _fused_follows(lengths):
        x = x.transpose(0, 1) if batch_first else x
        y, h_n, c_n, c = _reference(x, weights, spec, hx, lengths, dropout, training)
        if batch_first:
            y, c = y.transpose(0, 1), c.transpose(0, 1)
        cells = (c,) if return_cells else ()
    elif lengths is not None:
        y, h_n, c_n = _fused_lengths(x, weights, spec, hx, lengths, batch_first, dropout, training)
    else:
        options = _options(x, spec, dropout, training)
        y, h_n, c_n = torch.lstm(x, hx, weights, *options, batch_first)
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
) -> tuple[Any, ...]:
    data, batch_sizes, sorted_indices, unsorted_indices = x
    B = int(batch_sizes[0])
    if hx is None:
        hx = _zero_state(data, spec, B)
    elif sorted_indices is not None:
        hx = (hx[0].index_select(1, sorted_indices), hx[1].index_select(1, sorted_indices))

    if return_cells or transformed():
        valid = torch.arange(B) < batch_sizes[:, None]  # (T, B)
        index = valid.flatten().nonzero().squeeze(1).to(data.device)
        padded = _scatter(data, index, valid.shape)
        y, h_n, c_n, c = _reference(padded, weights, spec, hx, valid.sum(0), dropout, training)
        outputs = [tensor.flatten(0, 1).index_select(0, index) for tensor in (y, c)][: 1 + return_cells]
    else:
        options = _options(data, spec, dropout, training)
        y, h_n, c_n = torch.lstm(data, batch_sizes, hx, weights, *options)
        outputs = [y]
    if unsorted_indices is not None:
        h_n, c_n = h_n.index_select(1, unsorted_indices), c_n.index_select(1, unsorted_indices)
    packed = [PackedSequence(out, batch_sizes, sorted_indices, unsorted_indices) for out in outputs]
    return packed[0], (h_n, c_n), *packed[1:]


def _fused_follows(lengths: Tensor | None) -> bool:
    """Whether the fused op can be used for this call, apart from the cell states."""
    if torch.compiler.is_compiling():
        # Lengths cannot be read, and AOTAutograd (torch 2.13) fails on what oneDNN's op saves for backward.
        return lengths is None and (torch.compiler.is_exporting() or not torch.is_grad_enabled())
    return not transformed() and (lengths is None or bool((lengths > 0).any()))


def _fused_lengths(
    x: Tensor,
    weights: list[Tensor],
    spec: Spec,
    hx: State,
    lengths: Tensor,
    batch_first: bool,
    dropout: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows sorted by length and packed, without those of length 0, and the results put back."""
    T, B = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    descending, order = torch.sort(lengths.cpu().clamp(0, T), descending=True)
    order = order[descending > 0]
    steps = torch.arange(int(descending[0]))[:, None]
    valid = steps < descending[: len(order)]  # (longest, rows that have a step)
    index = (order * T + steps if batch_first else steps * B + order)[valid].to(x.device)
    order = order.to(x.device)

    h_0, c_0 = hx
    hx = (h_0.index_select(1, order), c_0.index_select(1, order))
    data = x.flatten(0, 1).index_select(0, index)
    options = _options(x, spec, dropout, training)
    y, h_n, c_n = torch.lstm(data, valid.sum(1), hx, weights, *options)
    y = _scatter(y, index, x.shape[:2])
    return y, h_0.to(h_n.dtype).index_copy(1, order, h_n), c_0.to(c_n.dtype).index_copy(1, order, c_n)


def _reference(
    x: Tensor,
    weights: list[Tensor],
    spec: Spec,
    hx: State,
    lengths: Tensor | None,
    dropout: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`lstm_reference` as y, h_n, c_n, c. Under autocast it sees what autocast would give the fused op."""
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    x, h_0, c_0, *cast = (tensor.to(dtype) for tensor in (x, *hx, *weights))
    params = dict(zip(spec.names, cast, strict=True))
    lengths = None if lengths is None else lengths.to(x.device)
    with torch.autocast(device, enabled=False):
        y, (h_n, c_n), c = lstm_reference(
            x, params, (h_0, c_0), lengths=lengths, dropout=dropout, training=training
        )
    return y, h_n, c_n, c


def _scatter(rows: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """Rows (N, width) at their places in zeros (*shape, width)."""
    zeros = rows.new_zeros(shape.numel(), rows.shape[1])
    return zeros.index_copy(0, index, rows).unflatten(0, shape)


def _zero_state(x: Tensor, spec: Spec, batch: int) -> State:
    h_shape, c_shape = spec.state_shapes(batch)
    c = x.new_zeros(c_shape)
    return (c if h_shape == c_shape else x.new_zeros(h_shape)), c


def _options(x: Tensor, spec: Spec, dropout: float, training: bool) -> tuple[bool, int, float, bool, bool]:
    """The fused op's has_biases, num_layers, dropout, train, bidirectional."""
    if training:
        return spec.bias, spec.num_layers, dropout, True, spec.bidirectional
    # cuDNN has a backward only in training mode, which without dropout computes the same.
    return spec.bias, spec.num_layers, 0.0, x.is_cuda and torch.is_grad_enabled(), spec.bidirectional
