"""`gatematch-bench check`: every op and module on this device against float64, each error with its bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from typing import Any

import numpy as np
import torch
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

from .progress import track

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


def run_check(device: torch.device) -> list[dict[str, Any]]:
    """One row for each op or module, dtype and setting: forward error, gradient error, and their bounds."""
    if device.type == "cuda":
        from .ahead import compile_ahead  # which needs Triton

        print(compile_ahead(range(_SHARES), partial(some_rows, of=_SHARES, device=device), device))
    torch.manual_seed(0)
    return [check.row() for check in track(_checks(device), "check")]


def some_rows(first: int, of: int, device: torch.device) -> None:
    """One row of so many, for what it compiles."""
    for check in islice(_checks(device), first, None, of):
        check.row()


def failed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows past a bound; a NaN is past every bound."""
    return [
        row
        for row in rows
        if not (row["error"] <= row["bound"] and row["gradient_error"] <= row["gradient_bound"])
    ]


@dataclass(frozen=True)
class Check:
    """A function, and the same in float64: what they give, and its gradients, of inputs and parameters."""

    case: str
    setting: str
    ours: Callable[..., Any]
    exact: Callable[..., Any]
    inputs: Sequence[Tensor]
    bounds: tuple[float, float]  # of the outputs' errors and of the gradients'
    absolute: bool = False
    parameters: Sequence[Tensor] = ()
    exact_parameters: Sequence[Tensor] = ()

    def row(self) -> dict[str, Any]:
        inputs = [tensor.detach().requires_grad_() for tensor in self.inputs]
        doubled = [tensor.detach().double().requires_grad_() for tensor in self.inputs]
        row = {
            "case": self.case,
            "setting": self.setting,
            "dtype": str(inputs[0].dtype).removeprefix("torch."),
            "bound": self.bounds[0],
            "gradient_bound": self.bounds[1],
        }
        try:
            got, want = _all(self.ours(*inputs)), _all(self.exact(*doubled))
            upstream = [torch.randn_like(y) for y in got]
            grads = torch.autograd.grad(got, [*inputs, *self.parameters], upstream)
            exact_upstream = [g.double() for g in upstream]
            true_grads = torch.autograd.grad(want, [*doubled, *self.exact_parameters], exact_upstream)
            return row | {
                "error": largest(_error(x, y, self.absolute) for x, y in zip(got, want, strict=True)),
                "gradient_error": largest(
                    _error(x, y, False) for x, y in zip(grads, true_grads, strict=True)
                ),
            }
        except Exception as failure:
            if not inputs[0].is_cuda:
                raise
            # A kernel that cannot be compiled or launched is no reason to lose the other rows.
            nan = float("nan")
            return row | {
                "error": nan,
                "gradient_error": nan,
                "reason": f"{type(failure).__name__}: {failure}",
            }


def _all(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def largest(errors: Iterable[float]) -> float:
    """The largest; NaN if any is (Python's max loses a NaN that does not come first)."""
    return float(np.max(list(errors)))


def _error(got: Tensor, want: Tensor, absolute: bool) -> float:
    error = float((got.detach().double() - want.detach()).abs().max())
    return error if absolute else error / max(float(want.detach().abs().max()), 1e-30)


def _checks(device: torch.device) -> Iterator[Check]:
    """Each to be asked for its row before the next one is made."""
    for dtype in DTYPES:
        yield from _pairwise(dtype, device)
    for dtype in DTYPES:
        yield from _lstm(dtype, device)


def _rows_at_distances(
    D: int, offset: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    a = torch.randn(2, 5, D, dtype=torch.float64)
    direction = nn.functional.normalize(torch.randn(2, 5, len(DISTANCES), D, dtype=torch.float64), dim=-1)
    q = a[:, :, None] + direction * torch.tensor(DISTANCES, dtype=torch.float64)[:, None]
    return (q.flatten(1, 2) + offset).to(device, dtype), (a + offset).to(device, dtype)


def _pairwise(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    scores, relative = (SCORE[dtype], RELATIVE[dtype]), (RELATIVE[dtype], RELATIVE[dtype])
    functions: tuple[Callable[..., Any], Callable[..., Any]]
    for D, offset in product((1, 7, 50, 300, 768, 4096), (0.0, 10.0)):
        setting = f"D {D}, distances 0 to 100" + (f", offset {offset:g}" if offset else "")
        inputs = _rows_at_distances(D, offset, dtype, device)
        functions = pairwise_attention, pairwise_attention_reference
        yield Check("pairwise/attention", setting, *functions, inputs, scores, absolute=True)
    q, a = _rows_at_distances(50, 0.0, dtype, device)
    v = torch.randn(*a.shape[:2], 65, device=device, dtype=dtype)
    no_lengths: dict[str, Any] = {}
    lengths: dict[str, Any] = {
        "q_lengths": torch.tensor([q.shape[1], 3], device=device),
        "a_lengths": torch.tensor([0, 4], device=device),
    }
    functions = partial(PairwiseAttention(), **lengths), partial(pairwise_attention_reference, **lengths)
    yield Check("pairwise/PairwiseAttention", "lengths", *functions, (q, a), scores, absolute=True)
    for normalize, given in product((None, "rows"), (no_lengths, lengths)):
        setting = f"normalize {normalize}{', lengths' if given else ''}"
        functions = (
            partial(pairwise_attend, normalize=normalize, **given),
            partial(pairwise_attend_reference, normalize=normalize, **given),
        )
        yield Check("pairwise/attend", setting, *functions, (q, a, v), relative)
    for given in (no_lengths, lengths):
        functions = partial(pairwise_sums, **given), partial(pairwise_sums_reference, **given)
        yield Check("pairwise/sums", "lengths" if given else "", *functions, (q, a), relative)
    features = AttentionFeatures(33, length=64, device=device, dtype=dtype)
    exact = AttentionFeatures(33, length=64, device=device, dtype=torch.float64)
    exact.load_state_dict(features.state_dict())
    doubled = 2 * RELATIVE[dtype], 2 * RELATIVE[dtype]  # S is rounded, and its product again
    for given in (no_lengths, lengths):
        functions = partial(features, **given), partial(exact, **given)
        yield Check("pairwise/AttentionFeatures", "lengths" if given else "", *functions, (q, a), doubled)


def _lstm(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    settings: dict[str, dict[str, Any]] = {
        "1 layer": {},
        "2 layers, bidirectional": {"num_layers": 2, "bidirectional": True},
        "2 layers, projection": {"num_layers": 2, "proj_size": 17},
        "batch first": {"batch_first": True},
        "no bias": {"bias": False},
        "lengths": {"lengths": True},
        "lengths, bidirectional, all cells": {"lengths": True, "bidirectional": True, "return_cells": True},
    }
    bounds = RECURRENT[dtype], RECURRENT[dtype]
    T, B, I, H = 31, 5, 33, 65
    for setting, options in settings.items():
        of_module = {
            name: value for name, value in options.items() if name not in ("lengths", "return_cells")
        }
        model, exact = (LSTM(I, H, device=device, dtype=of, **of_module) for of in (dtype, torch.float64))
        exact.load_state_dict(model.state_dict())
        x = torch.randn(*((B, T) if model.batch_first else (T, B)), I, device=device, dtype=dtype)
        cells = model.num_layers * (2 if model.bidirectional else 1)
        h, c = (torch.randn(cells, B, n, device=device, dtype=dtype) for n in (model.proj_size or H, H))
        yield Check(
            "lstm/LSTM",
            setting,
            partial(_layer, model, options, False),
            partial(_layer, exact, options, True),
            (x, h, c),
            bounds,
            parameters=list(model.parameters()),
            exact_parameters=list(exact.parameters()),
        )
    cell = LSTMCell(33, 65, device=device, dtype=dtype)
    x, h, c = (torch.randn(5, size, device=device, dtype=dtype) for size in (33, 65, 65))
    weights = [weight.detach().double().requires_grad_() for weight in cell.parameters()]
    yield Check(
        "lstm/LSTMCell",
        "",
        lambda x, h, c: cell(x, (h, c)),
        lambda x, h, c: lstm_cell_reference(x, (h, c), *weights),
        (x, h, c),
        bounds,
        parameters=list(cell.parameters()),
        exact_parameters=weights,
    )


def _layer(
    module: LSTM, options: dict[str, Any], exact: bool, x: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, ...]:
    lengths = torch.tensor([31, 1, 0, 17, 30], device=x.device) if "lengths" in options else None
    wanted = "return_cells" in options
    # What is asked for its cells, too, goes through the reference.
    y, states, *cells = module(x, (h, c), lengths=lengths, return_cells=wanted or exact)
    return (y, *states, *(cells if wanted else ()))
