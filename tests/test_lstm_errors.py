"""Every wrong call gets one sentence that names the argument, what was expected and what came."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from gatematch.lstm import LSTM, LSTMCell, convert, lstm, lstm_cell

torch.set_num_threads(1)

I, H, T, B = 5, 7, 4, 3
x = torch.zeros(T, B, I)
h = torch.zeros(1, B, H)
module, cell = LSTM(I, H), LSTMCell(I, H)
params = dict(module.state_dict())
weights = list(params.values())
packed = pack_padded_sequence(x, torch.tensor([4, 2, 1]))  # batch sizes 3, 2, 1, 1
data, indices = packed.data, torch.tensor([1, 2, 0])
rows = torch.tensor([1, 2, 3])
FLOATING = "x: expected dtype torch.float64, torch.float32, torch.float16 or torch.bfloat16, got"


def call_packed(rows: Any, sizes: Any, *indices: Any) -> Any:
    """The module of a packed sequence put together by hand, with its state: both read indices."""
    return module(PackedSequence(rows, torch.tensor(sizes), *indices), (h, h))


def in_forward_mode(function: Callable[..., Any], *args: Any) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return function(*args)


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name not in names}


VALUE: dict[str, tuple[Callable[[], Any], str]] = {
    "x-1d": (lambda: module(torch.zeros(I)), "x: expected shape (T, B, 5) or (T, 5), got (5,)"),
    "x-4d": (lambda: module(x[None]), "x: expected shape (T, B, 5) or (T, 5), got (1, 4, 3, 5)"),
    "x-width": (lambda: module(x[..., :4]), "x: expected shape (T, B, 5) or (T, 5), got (4, 3, 4)"),
    "x-transposed": (
        lambda: LSTM(I, H, batch_first=True)(x.transpose(1, 2)),
        "x: expected shape (B, T, 5) or (T, 5), got (4, 5, 3); it looks transposed",
    ),
    "x-0d": (lambda: module(torch.tensor(1.0)), "x: expected shape (T, B, 5) or (T, 5), got ()"),
    "x-device": (lambda: module(x.to("meta")), "x: expected device cpu as weight_ih_l0, got meta"),
    "x-packed-width": (
        lambda: LSTM(4, H)(packed),
        "x: expected data of shape (sum of lengths, 4), got (7, 5)",
    ),
    "x-packed-width-is-not-transposed": (
        lambda: LSTM(7, H)(packed),
        "x: expected data of shape (sum of lengths, 7), got (7, 5)",
    ),
    "h-shape": (lambda: module(x, (h[:, :2], h)), "hx[0]: expected shape (1, 3, 7), got (1, 2, 7)"),
    "c-shape": (lambda: module(x, (h, h[..., :6])), "hx[1]: expected shape (1, 3, 7), got (1, 3, 6)"),
    "h-unbatched": (lambda: module(x[:, 0], (h, h)), "hx[0]: expected shape (1, 7), got (1, 3, 7)"),
    "h-batched": (lambda: module(x, (h[:, 0], h[:, 0])), "hx[0]: expected shape (1, 3, 7), got (1, 7)"),
    "h-transposed": (
        lambda: module(x, (h.transpose(0, 1), h)),
        "hx[0]: expected shape (1, 3, 7), got (3, 1, 7); it looks transposed",
    ),
    "h-packed": (
        lambda: module(packed, (h[:, :2], h[:, :2])),
        "hx[0]: expected shape (1, 3, 7), got (1, 2, 7)",
    ),
    "packed-no-steps": (
        lambda: call_packed(data, np.zeros(0, np.int64)),
        "x.batch_sizes: expected at least one step on the CPU, got shape (0,) on cpu",
    ),
    "packed-sizes-2d": (
        lambda: call_packed(data, [[3, 2, 1, 1]]),
        "x.batch_sizes: expected shape (any,), got (1, 4)",
    ),
    "packed-little-data": (
        lambda: call_packed(data[:6], [3, 2, 1, 1]),
        "x.data: expected sum of batch_sizes = 7 rows, got 6",
    ),
    "packed-much-data": (
        lambda: call_packed(data, [3, 2, 1]),
        "x.data: expected sum of batch_sizes = 6 rows, got 7",
    ),
    "packed-sizes-grow": (
        lambda: call_packed(data, [3, 1, 2, 1]),
        "x.batch_sizes: expected at least 1 row, and in no step more than before, got [3, 1, 2, 1]",
    ),
    "packed-sizes-negative": (
        lambda: call_packed(data, [3, 3, 2, -1]),
        "x.batch_sizes: expected at least 1 row, and in no step more than before, got [3, 3, 2, -1]",
    ),
    "packed-no-rows": (
        lambda: call_packed(data[:0], [0]),
        "x.batch_sizes: expected at least 1 row, and in no step more than before, got [0]",
    ),
    "packed-indices-shape": (
        lambda: call_packed(data, [3, 2, 1, 1], indices[:2], indices),
        "x.sorted_indices: expected shape (3,), got (2,)",
    ),
    "packed-indices-range": (
        lambda: call_packed(data, [3, 2, 1, 1], indices + 1, indices),
        "x.sorted_indices: expected each of 0 to 2 once, got [2, 3, 1]",
    ),
    "packed-indices-twice": (
        lambda: call_packed(data, [3, 2, 1, 1], indices // 2, indices),
        "x.sorted_indices: expected each of 0 to 2 once, got [0, 1, 0]",
    ),
    "packed-indices-no-inverse": (
        lambda: call_packed(data, [3, 2, 1, 1], indices, indices),
        "x.unsorted_indices: expected the inverse of x.sorted_indices, got [1, 2, 0]",
    ),
    "packed-indices-of-one-kind": (
        lambda: call_packed(data, [3, 2, 1, 1], None, indices),
        "x.unsorted_indices: expected the inverse of x.sorted_indices, got [1, 2, 0]",
    ),
    "packed-indices-device": (
        lambda: call_packed(data, [3, 2, 1, 1], indices, indices.to("meta")),
        "x.unsorted_indices: expected device cpu as x.data, got meta",
    ),
    "h-projected": (
        lambda: LSTM(I, H, proj_size=2)(x, (h, h)),
        "hx[0]: expected shape (1, 3, 2), got (1, 3, 7)",
    ),
    "c-device": (lambda: module(x, (h, h.to("meta"))), "hx[1]: expected device cpu as x, got meta"),
    "lengths-shape": (lambda: module(x, None, rows[:2]), "lengths: expected shape (3,), got (2,)"),
    "lengths-2d": (lambda: module(x, None, rows[None]), "lengths: expected shape (3,), got (1, 3)"),
    "lengths-device": (
        lambda: module(x, None, rows.to("meta")),
        "lengths: expected device cpu, got meta",
    ),
    "lengths-long": (
        lambda: module(x, None, torch.tensor([1, 5, 2])),
        "lengths: expected values from 0 to T = 4, got 5",
    ),
    "lengths-negative": (
        lambda: module(x, None, torch.tensor([1, -1, 5]), True),
        "lengths: expected values from 0 to T = 4, got -1",
    ),
    "lengths-packed": (
        lambda: module(packed, None, rows),
        "lengths: expected None with a PackedSequence, which has its own, got Tensor",
    ),
    "lengths-unbatched": (
        lambda: module(x[:, 0], None, rows[:1]),
        "lengths: expected None for an unbatched x, got Tensor",
    ),
    "impl-triton": (
        lambda: LSTM(I, H, impl="triton")(x),
        "impl: expected 'auto' or 'torch', got 'triton'; it cannot serve this call: "
        "the kernels run on CUDA; got cpu",
    ),
    "impl-unknown": (
        lambda: lstm(x, params, impl="fast"),
        "impl: expected one of 'auto', 'torch', 'triton', 'resident', 'persistent', 'step', got 'fast'",
    ),
    "impl-constructor": (
        lambda: LSTM(I, H, impl="fast"),
        "impl: expected one of 'auto', 'torch', 'triton', 'resident', 'persistent', 'step', got 'fast'",
    ),
    "impl-cell": (
        lambda: lstm_cell(x[0], None, *weights, impl="triton"),
        "impl: expected 'auto' or 'torch', got 'triton'; it cannot serve this call: "
        "the kernels run on CUDA; got cpu",
    ),
    "dropout": (
        lambda: lstm(x, params, dropout=1.5),
        "dropout should be a number in range [0, 1] representing the probability of an element being "
        "zeroed, got 1.5",
    ),
    "dropout-array": (
        lambda: lstm(x, params, dropout=torch.ones(2, 2)),
        "dropout should be a number in range [0, 1] representing the probability of an element being "
        "zeroed, got Tensor",
    ),
    "params-missing": (
        lambda: lstm(x, without("bias_hh_l0")),
        "params: expected the names of a torch.nn.LSTM with num_layers=1, bias=True, bidirectional=False, "
        "projection=False, got missing ['bias_hh_l0'] and unexpected []",
    ),
    "params-unexpected": (
        lambda: lstm(x, {**params, "weight_hr_l1": h[0], "bias": h}),
        "params: expected the names of a torch.nn.LSTM with num_layers=1, bias=True, bidirectional=False, "
        "projection=False, got missing [] and unexpected ['weight_hr_l1', 'bias']",
    ),
    "params-empty": (
        lambda: lstm(x, {}),
        "params: expected 'weight_ih_l0' among the names, got []",
    ),
    "weight-vector": (
        lambda: lstm(x, {**params, "weight_hh_l0": h[0, 0]}),
        "weight_hh_l0: expected a matrix, got shape (7,)",
    ),
    "weight-ih-transposed": (
        lambda: lstm(x, {**params, "weight_ih_l0": weights[0].T}),
        "weight_ih_l0: expected shape (28, 5), got (5, 28); it looks transposed",
    ),
    "weight-hh-transposed": (
        lambda: lstm(x, {**params, "weight_hh_l0": weights[1].T}),
        "weight_hh_l0: expected shape (28, 7), got (7, 28); it looks transposed",
    ),
    "weight-shape": (
        lambda: lstm(x, {**params, "weight_hh_l0": torch.zeros(28, 6)}),
        "weight_hh_l0: expected shape (28, 7), got (28, 6)",
    ),
    "weight-ih-rows": (
        lambda: lstm(x, {**params, "weight_ih_l0": torch.zeros(29, 5)}),
        "weight_ih_l0: expected shape (28, 5), got (29, 5)",
    ),
    "weight-ih-transposed-rows": (
        lambda: lstm(x, {**params, "weight_ih_l0": torch.zeros(5, 29)}),
        "weight_ih_l0: expected shape (28, 5), got (5, 29)",
    ),
    "weight-hh-rows": (
        lambda: lstm(x, {**params, "weight_hh_l0": torch.zeros(27, 7)}),
        "weight_hh_l0: expected shape (28, 7), got (27, 7)",
    ),
    "weight-hh-projected": (
        lambda: lstm(x, {**params, "weight_hh_l0": torch.zeros(27, 2), "weight_hr_l0": torch.zeros(2, 7)}),
        "weight_hh_l0: expected shape (28, 2), got (27, 2)",
    ),
    "bias-shape": (
        lambda: lstm(x, {**params, "bias_hh_l0": torch.zeros(1)}),
        "bias_hh_l0: expected shape (28,), got (1,)",
    ),
    "weight-device": (
        lambda: lstm(x, {**params, "weight_hh_l0": weights[1].to("meta")}),
        "weight_hh_l0: expected device cpu as weight_ih_l0, got meta",
    ),
    "cell-x-width": (lambda: cell(x[0, :, :4]), "x: expected shape (B, 5) or (5,), got (3, 4)"),
    "cell-x-transposed": (
        lambda: cell(x[0].T),
        "x: expected shape (B, 5) or (5,), got (5, 3); it looks transposed",
    ),
    "cell-x-3d": (lambda: cell(x), "x: expected shape (B, 5) or (5,), got (4, 3, 5)"),
    "cell-h-shape": (
        lambda: cell(x[0], (h[0, :2], h[0])),
        "hx[0]: expected shape (3, 7), got (2, 7)",
    ),
    "cell-c-unbatched": (
        lambda: cell(x[0, 0], (h[0, 0], h[0])),
        "hx[1]: expected shape (7,), got (3, 7)",
    ),
    "cell-sizes": (lambda: LSTMCell(-1, 2), "input_size: expected at least 0, got -1"),
    "cell-weight-transposed": (
        lambda: lstm_cell(x[0], None, weights[0].T, *weights[1:]),
        "weight_ih: expected shape (28, 5), got (5, 28); it looks transposed",
    ),
    "cell-weight-hh-transposed": (
        lambda: lstm_cell(x[0], None, weights[0], weights[1].T),
        "weight_hh: expected shape (28, 7), got (7, 28); it looks transposed",
    ),
    "cell-weight-hh-rows": (
        lambda: lstm_cell(x[0], None, weights[0], torch.zeros(27, 7)),
        "weight_hh: expected shape (28, 7), got (27, 7)",
    ),
    "cell-weight-hh-more-rows": (
        lambda: lstm_cell(x[0], None, weights[0], torch.zeros(32, 7)),
        "weight_hh: expected shape (28, 7), got (32, 7)",
    ),
    "cell-weight-vector": (
        lambda: lstm_cell(x[0], None, weights[2], weights[1]),
        "weight_ih: expected a matrix, got shape (28,)",
    ),
    "cell-bias-shape": (
        lambda: lstm_cell(x[0], None, *weights[:3], torch.zeros(1)),
        "bias_hh: expected shape (28,), got (1,)",
    ),
    "cell-weight-device": (
        lambda: lstm_cell(x[0], None, weights[0], weights[1].to("meta")),
        "weight_hh: expected device cpu as weight_ih, got meta",
    ),
}

TYPE: dict[str, tuple[Callable[[], Any], str]] = {
    "x": (lambda: module([1.0]), "x: expected a Tensor or PackedSequence, got list"),
    "lengths-for-state": (
        lambda: module(x, rows),
        "hx: expected a pair of tensors (h_0, c_0), got Tensor; lengths are passed by name",
    ),
    "hx": (lambda: module(x, 3), "hx: expected a pair of tensors (h_0, c_0), got int"),
    "hx-tensor": (
        lambda: module(x, torch.stack([h, h])),
        "hx: expected a pair of tensors (h_0, c_0), got Tensor",
    ),
    "hx-three": (lambda: module(x, (h, h, h)), "hx: expected a pair of tensors (h_0, c_0), got 3 of them"),
    "hx-none": (lambda: module(x, (h, None)), "hx[1]: expected a Tensor, got NoneType"),
    "packed-data": (lambda: call_packed([1.0, 2.0], [1, 1]), "x.data: expected a Tensor, got list"),
    "packed-sizes": (
        lambda: module(packed._replace(batch_sizes=[3, 2, 1, 1])),
        "x.batch_sizes: expected a Tensor, got list",
    ),
    "packed-sizes-dtype": (
        lambda: call_packed(data, [3.0, 2.0, 1.0, 1.0]),
        "x.batch_sizes: expected dtype torch.int64, got torch.float32",
    ),
    "packed-indices": (
        lambda: call_packed(data, [3, 2, 1, 1], [1, 2, 0], indices),
        "x.sorted_indices: expected a Tensor, got list",
    ),
    "packed-indices-dtype": (
        lambda: call_packed(data, [3, 2, 1, 1], indices, indices.float()),
        "x.unsorted_indices: expected dtype torch.int32 or torch.int64, got torch.float32",
    ),
    "lengths": (
        lambda: module(x, None, [1, 2.5, 3]),
        "lengths: expected integers, got a list that holds others",
    ),
    "params": (
        lambda: lstm(x, weights),
        "params: expected a mapping from names to tensors, got list",
    ),
    "params-none": (
        lambda: lstm(x, {**params, "bias_hh_l0": None}),
        "bias_hh_l0: expected a Tensor, got NoneType",
    ),
    "batch-first": (
        lambda: lstm(x, params, batch_first="no"),
        "batch_first: expected a bool, got str",
    ),
    "training": (lambda: lstm(x, params, training="no"), "training: expected a bool, got str"),
    "return-cells": (
        lambda: module(x, return_cells="no"),
        "return_cells: expected a bool, got str",
    ),
    "bidirectional": (
        lambda: LSTM(I, H, bidirectional="no"),
        "bidirectional should be of type bool, got: str",
    ),
    "proj-size": (lambda: LSTM(I, H, proj_size=2.5), "proj_size should be of type int, got: float"),
    "proj-size-none": (lambda: LSTM(I, H, proj_size=None), "proj_size should be of type int, got: NoneType"),
    "proj-size-string": (lambda: LSTM(I, H, proj_size="2"), "proj_size should be of type int, got: str"),
    "cell-bias": (lambda: LSTMCell(I, H, bias="x"), "bias should be of type bool, got: str"),
    "cell-x": (lambda: cell(None), "x: expected a Tensor, got NoneType"),
    "cell-hx": (lambda: cell(x[0], h[0]), "hx: expected a pair of tensors (h_0, c_0), got Tensor"),
    "cell-h-array": (
        lambda: LSTMCell(5, 2)(x[0, 0], (np.zeros(2, np.float32), torch.zeros(2))),
        "hx[0]: expected a Tensor, got ndarray",
    ),
    "cell-c-array": (
        lambda: cell(x[0], (h[0], np.zeros((3, 7), np.float32))),
        "hx[1]: expected a Tensor, got ndarray",
    ),
    "cell-hx-forward-mode": (
        lambda: in_forward_mode(cell, x[0], 3),
        "hx: expected a pair of tensors (h_0, c_0), got int",
    ),
    "proj-size-bool": (lambda: LSTM(I, H, proj_size=True), "proj_size should be of type int, got: bool"),
    "cell-one-bias": (
        lambda: lstm_cell(x[0], None, *weights[:3]),
        "bias_hh: expected a Tensor, got NoneType",
    ),
    "cell-other-bias": (
        lambda: lstm_cell(x[0], None, *weights[:2], bias_hh=weights[3]),
        "bias_ih: expected a Tensor, got NoneType",
    ),
    "x-dtype": (
        lambda: module(x.double()),
        "x: expected dtype torch.float32 as weight_ih_l0, got torch.float64",
    ),
    "x-integer": (
        lambda: module(x.long()),
        f"{FLOATING} torch.int64",
    ),
    "h-dtype": (
        lambda: module(x, (h.double(), h)),
        "hx[0]: expected dtype torch.float32 as x, got torch.float64",
    ),
    "c-dtype": (
        lambda: module(x, (h, h.half())),
        "hx[1]: expected dtype torch.float32 as x, got torch.float16",
    ),
    "lengths-dtype": (
        lambda: module(x, None, rows.float()),
        "lengths: expected an integer dtype, got torch.float32",
    ),
    "lengths-bool": (
        lambda: module(x, None, rows.bool()),
        "lengths: expected an integer dtype, got torch.bool",
    ),
    "lengths-mask": (
        lambda: module(x, None, torch.ones(3, 4, dtype=torch.bool)),
        "lengths: expected an integer dtype, got torch.bool; of a mask, its sums over time",
    ),
    "weight-dtype": (
        lambda: lstm(x, {**params, "bias_hh_l0": weights[3].double()}),
        "bias_hh_l0: expected dtype torch.float32 as weight_ih_l0, got torch.float64",
    ),
    "cell-x-dtype": (
        lambda: cell(x[0].double()),
        "x: expected dtype torch.float32 as weight_ih, got torch.float64",
    ),
    "cell-x-integer": (
        lambda: cell(x[0].long()),
        f"{FLOATING} torch.int64",
    ),
    "cell-c-dtype": (
        lambda: cell(x[0], (h[0], h[0].double())),
        "hx[1]: expected dtype torch.float32 as x, got torch.float64",
    ),
    "cell-x-complex": (
        lambda: LSTMCell(I, H, dtype=torch.complex64)(x[0].to(torch.complex64)),
        f"{FLOATING} torch.complex64",
    ),
    "cell-vmap-dtype": (
        lambda: torch.func.vmap(lambda x: cell(x)[0])(x.double()),
        "x: expected dtype torch.float32 as weight_ih, got torch.float64",
    ),
    "cell-vmap-integer": (
        lambda: torch.func.vmap(lambda x: cell(x)[0])(x.long()),
        f"{FLOATING} torch.int64",
    ),
    "convert": (lambda: convert({}), "module: expected a torch.nn.Module, got dict"),
}


@pytest.mark.parametrize("name", VALUE)
def test_value_errors(name: str) -> None:
    call, message = VALUE[name]
    with pytest.raises(ValueError) as info:
        call()
    assert str(info.value) == message


@pytest.mark.parametrize("name", TYPE)
def test_type_errors(name: str) -> None:
    call, message = TYPE[name]
    with pytest.raises(TypeError) as info:
        call()
    assert str(info.value) == message


CONSTRUCTOR: list[dict[str, Any]] = [
    {"dropout": 1.5},
    {"dropout": -0.1},
    {"dropout": True},
    {"bias": 1},
    {"batch_first": "yes"},
    {"input_size": 0},
    {"input_size": 2.0},
    {"hidden_size": -1},
    {"hidden_size": 2.0},
    {"num_layers": 0},
    {"proj_size": -1},
    {"proj_size": 7},
]


@pytest.mark.parametrize("wrong", CONSTRUCTOR, ids=str)
def test_constructor_errors_are_torchs(wrong: dict[str, Any]) -> None:
    """The same exception in the same words; ours goes on to say what came."""
    args = {"input_size": I, "hidden_size": H} | wrong
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, TypeError)) as theirs:
            nn.LSTM(**args)
        with pytest.raises(type(theirs.value)) as ours:
            LSTM(**args)
    assert str(ours.value).startswith(str(theirs.value))
    (value,) = wrong.values()
    assert str(value) in str(ours.value) or type(value).__name__ in str(ours.value)
