"""`gatematch-bench check`: every op and module on this device against float64, each error with its bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from gatematch.attention import (
    AttentionFeatures,
    PairwiseAttention,
    pairwise_attend,
    pairwise_attention,
    pairwise_sums,
)
from gatematch.attention.reference import (
    pairwise_attend_reference,
    pairwise_attention_reference,
    pairwise_sums_reference,
)
from gatematch.lstm import LSTM, LSTMCell
from gatematch.lstm.reference import lstm_cell_reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DISTANCES = (0.0, 1e-6, 1e-4, 1e-2, 0.1, 1.0, 10.0, 100.0)
# Largest error of S, absolute: float32's contract, and one rounding (half a unit) for the 16-bit dtypes.
SCORE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2.5e-4 + 1e-6, torch.bfloat16: 2e-3 + 1e-6}
# Largest error of sums, products and gradients, as a share of the largest value.
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# An LSTM rounds at every step, and torch's 16-bit ops round the gates too.
RECURRENT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Processes that compile on a GPU: beside them there may be other stages.
_SHARES = 8
Outputs = tuple[Tensor, ...]
Row = Callable[[], dict[str, Any]]


def run_check(device: torch.device) -> list[dict[str, Any]]:
    """One row for each op or module, dtype and setting: forward error, gradient error, and their bounds."""
    if device.type == "cuda":
        from .ahead import compile_ahead  # which needs Triton

        print(compile_ahead(range(_SHARES), partial(some_rows, of=_SHARES, device=device), device))
    torch.manual_seed(0)
    return [row() for row in track(_rows(device), description="check", transient=True)]


def some_rows(first: int, of: int, device: torch.device) -> None:
    """One row of so many, for what it compiles."""
    for row in islice(_rows(device), first, None, of):
        row()


def _rows(device: torch.device) -> Iterator[Row]:
    """Each to be called before the next one is asked for."""
    yield from _pairwise_rows(device)
    yield from _lstm_rows(device)


def failed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows past a bound; a NaN is past every bound."""
    return [
        row
        for row in rows
        if not (row["error"] <= row["bound"] and row["gradient_error"] <= row["gradient_bound"])
    ]


def _row(
    case: str,
    setting: str,
    dtype: torch.dtype,
    ours: Callable[..., Outputs],
    exact: Callable[..., Outputs],
    inputs: list[Tensor],
    bounds: tuple[float, float],
    absolute: bool = False,
    exact_inputs: list[Tensor] | None = None,
) -> dict[str, Any]:
    """Compare outputs and the gradients w.r.t. `inputs`; `exact` gets them in float64."""
    mine = [tensor.detach().requires_grad_() for tensor in inputs]
    true = [tensor.detach().double().requires_grad_() for tensor in exact_inputs or inputs]
    row = {
        "case": case,
        "setting": setting,
        "dtype": str(dtype).removeprefix("torch."),
        "bound": bounds[0],
        "gradient_bound": bounds[1],
    }
    try:
        got, want = ours(*mine), exact(*true)
        upstream = [torch.randn_like(y) for y in got]
        grads = torch.autograd.grad(got, mine, upstream)
        true_grads = torch.autograd.grad(want, true, [g.double() for g in upstream])
        return row | {
            "error": largest(_error(x, y, absolute) for x, y in zip(got, want, strict=True)),
            "gradient_error": largest(_error(x, y, False) for x, y in zip(grads, true_grads, strict=True)),
        }
    except Exception as failure:
        if not inputs[0].is_cuda:
            raise
        # A kernel that cannot be compiled or launched is no reason to lose the other rows.
        nan = float("nan")
        return row | {"error": nan, "gradient_error": nan, "reason": f"{type(failure).__name__}: {failure}"}


def largest(errors: Iterable[float]) -> float:
    """The largest; NaN if any is (Python's max loses a NaN that does not come first)."""
    return float(np.max(list(errors)))


def _error(got: Tensor, want: Tensor, absolute: bool) -> float:
    error = float((got.detach().double() - want.detach()).abs().max())
    return error if absolute else error / max(float(want.detach().abs().max()), 1e-30)


def _rows_at_distances(
    D: int, offset: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    a = torch.randn(2, 5, D, dtype=torch.float64)
    direction = nn.functional.normalize(torch.randn(2, 5, len(DISTANCES), D, dtype=torch.float64), dim=-1)
    q = a[:, :, None] + direction * torch.tensor(DISTANCES, dtype=torch.float64)[:, None]
    return (q.flatten(1, 2) + offset).to(device, dtype), (a + offset).to(device, dtype)


def _pairwise_rows(device: torch.device) -> Iterator[Row]:
    for dtype in DTYPES:
        scores, relative = (SCORE[dtype], RELATIVE[dtype]), (RELATIVE[dtype], RELATIVE[dtype])
        for D in (1, 7, 50, 300, 768, 4096):
            for offset in (0.0, 10.0):
                yield partial(
                    _row,
                    "pairwise/attention",
                    f"D {D}, distances 0 to 100" + (f", offset {offset:g}" if offset else ""),
                    dtype,
                    lambda q, a: (pairwise_attention(q, a),),
                    lambda q, a: (pairwise_attention_reference(q, a),),
                    list(_rows_at_distances(D, offset, dtype, device)),
                    scores,
                    absolute=True,
                )
        q, a = _rows_at_distances(50, 0.0, dtype, device)
        v = torch.randn(*a.shape[:2], 65, device=device, dtype=dtype)
        lengths = torch.tensor([q.shape[1], 3], device=device), torch.tensor([0, 4], device=device)
        yield partial(
            _row,
            "pairwise/PairwiseAttention",
            "lengths",
            dtype,
            lambda q, a: (PairwiseAttention()(q, a, *lengths),),  # noqa: B023 (called at once)
            lambda q, a: (pairwise_attention_reference(q, a, *lengths),),  # noqa: B023
            [q, a],
            scores,
            absolute=True,
        )
        no_lengths: dict[str, Any] = {}
        both: dict[str, Any] = {"q_lengths": lengths[0], "a_lengths": lengths[1]}
        for normalize in (None, "rows"):
            for given in (no_lengths, both):
                yield partial(
                    _row,
                    "pairwise/attend",
                    f"normalize {normalize}{', lengths' if given else ''}",
                    dtype,
                    lambda q, a, v: (pairwise_attend(q, a, v, normalize, **given),),  # noqa: B023
                    lambda q, a, v: (pairwise_attend_reference(q, a, v, normalize=normalize, **given),),  # noqa: B023
                    [q, a, v],
                    relative,
                )
        for given in (no_lengths, both):
            yield partial(
                _row,
                "pairwise/sums",
                "lengths" if given else "",
                dtype,
                lambda q, a: pairwise_sums(q, a, **given),  # noqa: B023
                lambda q, a: pairwise_sums_reference(q, a, **given),  # noqa: B023
                [q, a],
                relative,
            )
        features = AttentionFeatures(64, 33, device=device, dtype=dtype)
        exact = AttentionFeatures(64, 33, device=device, dtype=torch.float64)
        exact.load_state_dict(features.state_dict())
        doubled = 2 * RELATIVE[dtype], 2 * RELATIVE[dtype]  # S is rounded, and its product again
        for given in (no_lengths, both):
            yield partial(
                _row,
                "pairwise/AttentionFeatures",
                "lengths" if given else "",
                dtype,
                lambda q, a: features(q, a, **given),  # noqa: B023
                lambda q, a: exact(q, a, **given),  # noqa: B023
                [q, a],
                doubled,
            )


def _lstm_rows(device: torch.device) -> Iterator[Row]:
    settings: dict[str, dict[str, Any]] = {
        "1 layer": {},
        "2 layers, bidirectional": {"num_layers": 2, "bidirectional": True},
        "2 layers, projection": {"num_layers": 2, "proj_size": 17},
        "batch first": {"batch_first": True},
        "no bias": {"bias": False},
        "lengths": {"lengths": True},
        "lengths, bidirectional, all cells": {"lengths": True, "bidirectional": True, "return_cells": True},
    }
    for dtype in DTYPES:
        for setting, options in settings.items():
            yield partial(_lstm_row, setting, options, dtype, device)
        yield partial(_cell_row, dtype, device)


def _lstm_row(
    setting: str, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    T, B, I, H = 31, 5, 33, 65
    options = dict(options)
    return_cells = options.pop("return_cells", False)
    lengths = torch.tensor([31, 1, 0, 17, 30], device=device) if options.pop("lengths", False) else None
    model = LSTM(I, H, device=device, dtype=dtype, **options)
    exact = LSTM(I, H, device=device, dtype=torch.float64, **options)
    exact.load_state_dict(model.state_dict())
    parameters, exact_parameters = dict(model.named_parameters()), dict(exact.named_parameters())

    def call(module: LSTM, through_reference: bool) -> Callable[..., Outputs]:
        def function(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Outputs:
            named = dict(zip(parameters, weights, strict=True))
            options = {"lengths": lengths, "return_cells": return_cells or through_reference}
            y, states, *cells = torch.func.functional_call(module, named, (x, (h, c)), options)
            return (y, *states, *(cells if return_cells else ()))

        return function

    x = torch.randn(*((B, T) if model.batch_first else (T, B)), I, device=device, dtype=dtype)
    cells = model.num_layers * (2 if model.bidirectional else 1)
    state = [torch.randn(cells, B, n, device=device, dtype=dtype) for n in (model.proj_size or H, H)]
    return _row(
        "lstm/LSTM",
        setting,
        dtype,
        call(model, False),
        call(exact, True),
        [x, *state, *parameters.values()],
        (RECURRENT[dtype], RECURRENT[dtype]),
        exact_inputs=[x, *state, *exact_parameters.values()],
    )


def _cell_row(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    cell = LSTMCell(33, 65, device=device, dtype=dtype)
    x, h, c = (torch.randn(5, size, device=device, dtype=dtype) for size in (33, 65, 65))
    names, weights = zip(*cell.named_parameters(), strict=True)

    def ours(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Outputs:
        result: Outputs = torch.func.functional_call(
            cell, dict(zip(names, weights, strict=True)), (x, (h, c))
        )
        return result

    def exact(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Outputs:
        return lstm_cell_reference(x, (h, c), *weights)

    return _row(
        "lstm/LSTMCell", "", dtype, ours, exact, [x, h, c, *weights], (RECURRENT[dtype], RECURRENT[dtype])
    )
