"""`gatematch-bench hessian`: curvature of the answer matcher, of a small LSTM gate by gate, and its cost."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from gatematch.curvature import HessianOperator, hessian, hvp, parameter_index, spectral_density, trace
from gatematch.lstm import LSTM, named_gates
from gatematch.lstm.reference import lstm_reference

from .answers.batches import Encoder
from .answers.data import chatterbot
from .answers.model import MatcherSettings, Siamese, ours
from .answers.text import Vocabulary
from .answers.train import Trainer, load_checkpoint
from .timing import measure

_CPU = torch.device("cpu")
EIGENVALUES, TOLERANCE = 5, 1e-3  # how many at each end, and their relative accuracy
TRACE_SAMPLES = 32
DENSITY_SAMPLES, DENSITY_STEPS = 2, 32
SMALL = {"I": 2, "H": 3}  # its 84 rows can be told apart in a picture
SMALL_STEPS = 300
# 1,972 and 1,005,360 parameters.
MATRIX = {"T": 16, "B": 8, "I": 10, "H": 17}
PRODUCT = {"T": 16, "B": 8, "I": 354, "H": 354}
PRODUCT_SECONDS = 20.0


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    checkpoint: Path | None = None
    epochs: int = 8
    questions: int = 8
    seed: int = 0


def run_hessian(options: Options, say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """All rows of the results file; `say` hears what is being done.

    Raises:
        ValueError: the checkpoint is missing, damaged or of another run, or there are fewer questions.
    """
    return [*_matcher_rows(options, say), _lstm_row(options.seed, say), *_cost_rows(say)]


def _matcher_rows(options: Options, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The matcher at its initial weights, and at those of its best epoch."""
    if options.checkpoint is not None and not options.checkpoint.is_file():
        raise ValueError(
            f"--checkpoint must be the checkpoint.pt of an answers run; got {options.checkpoint}, "
            "which is no file"
        )
    dataset = chatterbot()
    if options.questions > len(dataset.train):
        raise ValueError(
            f"--questions must be at most {len(dataset.train)}, all of training; got {options.questions}"
        )
    vocabulary = Vocabulary(dataset.train_texts)
    lists = (*dataset.train, *dataset.dev)
    encoder = Encoder(vocabulary, [text for item in lists for text in (item.question, *item.candidates)])
    settings = MatcherSettings(seed=options.seed)
    trainer = Trainer(ours, vocabulary.pieces, settings, encoder, dataset, _CPU)
    initial = copy.deepcopy(trainer.model)
    if options.checkpoint is not None:
        belongs_to = settings.as_dict() | {"data": dataset.fingerprint}
        load_checkpoint(options.checkpoint, belongs_to, {"ours": trainer})
    while options.checkpoint is None and trainer.epochs < options.epochs:
        say(f"training the matcher, epoch {trainer.epochs + 1} of {options.epochs}")
        trainer.epoch()
    trainer.use_best()

    rng = random.Random(options.seed)
    chosen = rng.sample(dataset.train, options.questions)
    candidates = [[rng.choice(item.right), *rng.sample(item.wrong, settings.wrong)] for item in chosen]
    batch = encoder.batch([item.question for item in chosen], candidates, _CPU)

    def row(case: str, model: Siamese, epoch: int) -> dict[str, Any]:
        # Lanczos loses the orthogonality of its vectors to rounding: the more digits, the later.
        model = model.eval().double()

        def loss() -> Tensor:
            logits = model(batch).view(options.questions, -1)
            return F.cross_entropy(logits, logits.new_zeros(options.questions, dtype=torch.long))

        about = {
            "case": case,
            "loss_fn": f"cross-entropy of 1 right and {settings.wrong} wrong answers, no dropout",
            "data": dataset.fingerprint,
            "questions": options.questions,
            "epoch": epoch,
            "seed": options.seed,
        }
        return about | _spectrum(loss, model, options.seed, lambda what: say(f"{case}: {what}"))

    return [
        row("hessian/matcher/initial", initial, 0),
        row("hessian/matcher/trained", trainer.model, trainer.best_epoch + 1),
    ]


class _Counted(LinearOperator):
    """An operator that counts its products: ARPACK does not tell."""

    def __init__(self, op: LinearOperator) -> None:
        super().__init__(op.dtype, op.shape)
        self.op, self.products = op, 0

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        self.products += 1
        return self.op.matvec(x)


def _spectrum(
    loss_fn: Callable[[], Tensor], model: nn.Module, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Outer eigenvalues, trace and density of a loss's Hessian, with the products and seconds each took."""
    op = _Counted(HessianOperator(loss_fn, model))
    row = {"parameters": op.shape[0], "dtype": str(op.dtype), "loss": loss_fn().item()}

    def timed(name: str, compute: Callable[[], dict[str, Any]]) -> None:
        say(name)
        op.products, start = 0, time.perf_counter()
        result = compute()
        row[name] = result | {"products": op.products, "seconds": round(time.perf_counter() - start, 1)}

    def eigenvalues() -> dict[str, Any]:
        start = np.random.default_rng(seed).standard_normal(op.shape[0])
        values = eigsh(op, 2 * EIGENVALUES, which="BE", tol=TOLERANCE, v0=start, return_eigenvectors=False)
        smallest, largest = np.split(np.sort(values), 2)
        ends = {"largest": _rounded(largest[::-1]), "smallest": _rounded(smallest)}
        return ends | {"tolerance": TOLERANCE}

    def traced() -> dict[str, Any]:
        value, error = trace(op, samples=TRACE_SAMPLES, seed=seed)
        return {"value": value, "standard_error": error, "samples": TRACE_SAMPLES}

    def density() -> dict[str, Any]:
        nodes, weights = spectral_density(op, samples=DENSITY_SAMPLES, steps=DENSITY_STEPS, seed=seed)
        size = {"samples": DENSITY_SAMPLES, "steps": DENSITY_STEPS}
        return {"nodes": _rounded(nodes), "weights": _rounded(weights)} | size

    timed("eigenvalues", eigenvalues)
    timed("trace", traced)
    timed("density", density)
    return row


def gate_blocks(lstm: nn.Module) -> dict[str, slice]:
    """The rows of the Hessian of an LSTM that belong to each of its gates' matrices and biases, by name."""
    numbered = copy.deepcopy(lstm).double()
    with torch.no_grad():
        for name, rows in parameter_index(numbered).items():
            parameter = numbered.get_parameter(name)
            parameter.copy_(torch.arange(rows.start, rows.stop).view_as(parameter))
    # Each gate now holds the numbers of its rows, which are consecutive: gates lie one below the other.
    gates = named_gates(numbered).items()
    return {name: slice(int(gate.min()), int(gate.max()) + 1) for name, gate in gates}


def echo_task(seed: int) -> tuple[LSTM, Callable[[], Tensor]]:
    """A small float64 LSTM, and the loss of a task: to say in every step what came in the step before."""
    torch.manual_seed(seed)
    lstm = LSTM(SMALL["I"], SMALL["H"], dtype=torch.float64)
    x = torch.rand(12, 16, SMALL["I"], dtype=torch.float64) - 0.5

    def loss() -> Tensor:
        return F.mse_loss(lstm(x)[0][1:, :, : SMALL["I"]], x[:-1])

    return lstm, loss


def _lstm_row(seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole Hessian of a small LSTM after some training, and which rows are which gate's."""
    say("hessian/lstm")
    lstm, loss_fn = echo_task(seed)
    before = loss_fn().item()
    optimizer = torch.optim.Adam(lstm.parameters(), lr=1e-2)
    for _ in range(SMALL_STEPS):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    H = hessian(loss_fn, lstm).numpy()
    return {
        "case": "hessian/lstm",
        "loss_fn": "mean square error of a task: to give in every step the input of the step before",
        "shape": SMALL,
        "parameters": len(H),
        "dtype": str(H.dtype),
        "seed": seed,
        "optimizer_steps": SMALL_STEPS,
        "loss_before": before,
        "loss": loss_fn().item(),
        "blocks": {name: [rows.start, rows.stop] for name, rows in gate_blocks(lstm).items()},
        # The lower triangle says it all.
        "rows": [_rounded(row[: k + 1], 4) for k, row in enumerate(H)],
    }


def _cost_rows(say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.float32, torch.float64):
        say(f"hessian/cost/matrix in {dtype}".replace("torch.", ""))
        lstm, ours_fn, _ = _problem(MATRIX, dtype)
        start = time.perf_counter()
        H = hessian(ours_fn, lstm)
        seconds = time.perf_counter() - start
        rows.append(_about("hessian/cost/matrix", MATRIX, H) | {"unit": "s", "seconds": round(seconds, 2)})
    say("hessian/cost/product")
    return [*rows, _product_row()]


def _product_row() -> dict[str, Any]:
    """A product with the Hessian, as a function and of an operator, beside two gradients, turn by turn."""
    lstm, ours_fn, reference_fn = _problem(PRODUCT, torch.float32)
    parameters = list(lstm.parameters())
    op = HessianOperator(ours_fn, lstm)
    vector = torch.randn(op.shape[0])

    def two_gradients() -> None:
        for _ in range(2):
            torch.autograd.grad(reference_fn(), parameters)

    product, want = hvp(ours_fn, lstm, vector), hvp(reference_fn, lstm, vector)
    functions = {
        "hvp": lambda: hvp(ours_fn, lstm, vector),
        "operator": lambda: op.matvec(vector.numpy()),
        "two_gradients": two_gradients,
    }
    samples = measure(functions, PRODUCT_SECONDS, _CPU)
    row = _about("hessian/cost/product", PRODUCT, vector) | {
        "unit": "ms",
        "samples": len(samples["hvp"]),
        "error": float((product - want).abs().max() / want.abs().max()),
    }
    for name, seconds in samples.items():
        # Rounds are paired, so a slow moment of the machine cancels in the ratio.
        ratio = float(np.median(seconds / samples["two_gradients"]))
        row[name] = {"median": float(np.median(seconds) * 1e3), "ratio": ratio}
    return row


def _problem(
    shape: dict[str, int], dtype: torch.dtype
) -> tuple[LSTM, Callable[[], Tensor], Callable[[], Tensor]]:
    """An LSTM, and the same loss of it through our op and through the plain reference."""
    torch.manual_seed(0)
    lstm = LSTM(shape["I"], shape["H"], dtype=dtype)
    x = torch.randn(shape["T"], shape["B"], shape["I"], dtype=dtype)
    parameters = dict(lstm.named_parameters())
    return (
        lstm,
        lambda: lstm(x)[0].square().mean(),
        lambda: lstm_reference(x, parameters)[0].square().mean(),
    )


def _about(case: str, shape: dict[str, int], made: Tensor) -> dict[str, Any]:
    dtype = str(made.dtype).removeprefix("torch.")
    return {"case": case, "shape": shape, "parameters": len(made), "dtype": dtype}


def _rounded(values: Sequence[float] | np.ndarray, digits: int = 6) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]
