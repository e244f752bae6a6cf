"""`gatematch-bench hessian`: its rows, its pictures and table, the labels of an LSTM's blocks, its errors."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("bm25s")
pytest.importorskip("chatterbot_corpus")

from typer.testing import CliRunner

from gatematch.bench import hessian as command
from gatematch.bench.__main__ import app
from gatematch.bench.answers.batches import Encoder
from gatematch.bench.answers.data import Dataset, chatterbot
from gatematch.bench.answers.model import MatcherSettings, ours
from gatematch.bench.answers.text import Vocabulary
from gatematch.bench.answers.train import Trainer, save_checkpoint
from gatematch.bench.hessian_plots import hessian_figures, whole
from gatematch.bench.results import read_results
from gatematch.curvature import hessian
from gatematch.lstm import LSTM, named_gates

COMMITTED = Path(__file__).parent.parent / "bench" / "results" / "cpu" / "hessian.json"
CASES = [
    "hessian/matcher/initial",
    "hessian/matcher/trained",
    "hessian/lstm",
    "hessian/cost/matrix",
    "hessian/cost/matrix",
    "hessian/cost/product",
]


@functools.cache
def few() -> Dataset:
    """Some of the questions, so that an epoch takes a second."""
    dataset = chatterbot()
    return dataclasses.replace(dataset, train=dataset.train[:40], dev=dataset.dev[:8])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rough estimates of a matcher of few questions, and small sizes elsewhere."""
    tiny = {"T": 2, "B": 1, "I": 2, "H": 2}
    values = {
        "EIGENVALUES": 2,
        "TOLERANCE": 0.3,
        "TRACE_SAMPLES": 2,
        "DENSITY_SAMPLES": 1,
        "DENSITY_STEPS": 3,
    }
    sizes = {"SMALL_STEPS": 3, "MATRIX": tiny, "PRODUCT": tiny, "PRODUCT_SECONDS": 0.0}
    for name, value in (values | sizes).items():
        monkeypatch.setattr(command, name, value)
    monkeypatch.setattr(command, "chatterbot", few)


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command_from_training_to_pictures(quick: None, tmp_path: Path) -> None:
    code, output = run("hessian", "--epochs", "1", "--questions", "1", "--out", tmp_path / "out")
    assert code == 0, output
    results = tmp_path / "out" / "results.json"
    rows = read_results(results)["rows"]
    assert [row["case"] for row in rows] == CASES
    initial, trained, lstm, *matrices, product = rows
    assert initial["epoch"] == 0 and trained["epoch"] == 1
    assert trained["loss"] != initial["loss"]
    for row in (initial, trained):
        assert row["parameters"] > 250_000 and row["dtype"] == "float64" and row["questions"] == 1
        largest, smallest = row["eigenvalues"]["largest"], row["eigenvalues"]["smallest"]
        assert largest == sorted(largest, reverse=True) and smallest == sorted(smallest)
        assert len(largest) == len(smallest) == 2 and largest[-1] >= smallest[-1]
        assert sum(row["density"]["weights"]) == pytest.approx(1, abs=1e-4)
        assert row["trace"]["products"] == 2 and row["density"]["products"] == 3
    assert lstm["loss"] < lstm["loss_before"]
    assert [row["dtype"] for row in matrices] == ["float32", "float64"]
    assert product["error"] < 1e-4 and product["two_gradients"]["ratio"] == 1
    assert product["hvp"]["ratio"] > 0 and product["operator"]["median"] > 0

    names = ["hessian-lstm.svg", "hessian-lstm.png", "hessian-matcher.svg", "hessian-matcher.png"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "results.json"}
    code, output = run("plot", results, "--out", tmp_path / "again")
    assert code == 0 and [Path(line).name for line in output.split()] == names
    for name in names[::2]:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_weights_of_a_checkpoint_are_those_of_its_best_epoch(quick: None, tmp_path: Path) -> None:
    dataset = few()
    vocabulary = Vocabulary(dataset.train_texts)
    settings = MatcherSettings()
    encoder = Encoder(vocabulary, dataset.train_texts)
    trainer = Trainer(ours, vocabulary.pieces, settings, encoder, dataset, torch.device("cpu"))
    trainer.losses, trainer.dev_map, trainer.seconds = [2.0, 1.0], [0.5, 0.4], [1.0, 1.0]
    # Where the score weighs all similarities by 0, all answers score the same, and the loss is log 8.
    weights = trainer.model.state_dict()
    trainer.best = weights | {"score.weight": torch.zeros_like(weights["score.weight"])}
    path, results = tmp_path / "checkpoint.pt", tmp_path / "hessian.json"
    belongs_to = settings.as_dict() | {"data": dataset.fingerprint}
    save_checkpoint(path, belongs_to, {"ours": trainer})
    options = ("--checkpoint", path, "--questions", "1", "--out", tmp_path / "out", "--json", results)
    code, output = run("hessian", *options)
    assert code == 0 and "training the matcher" not in output, output
    trained = read_results(results)["rows"][1]
    assert trained["epoch"] == 1 and trained["loss"] == pytest.approx(np.log(8))

    code, output = run("hessian", *options, "--seed", "3")
    assert code == 2 and "belongs to another run: expected seed 3; got 0" in output.replace("\n", " ")


def test_errors_are_one_sentence_before_any_work(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Trainer, "epoch")
    damaged = tmp_path / "checkpoint.pt"
    damaged.write_bytes(b"no checkpoint")
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (("--checkpoint", tmp_path / "none.pt"), "--checkpoint must be the checkpoint.pt of an answers run"),
        (("--checkpoint", tmp_path), "--checkpoint must be the checkpoint.pt of an answers run"),
        (("--checkpoint", damaged), "is not a whole checkpoint"),
        (("--questions", 10**6), "--questions must be at most 40, all of training; got 1000000"),
        (("--questions", 0), "--questions"),
        (("--json", tmp_path), "--json must be a file; got the folder"),
        (("--json", tmp_path / "file" / "x.json"), "--json must be a file that can be written"),
        (("--out", tmp_path / "file"), "pictures in --out must be a file that can be written"),
    ):
        # The command's own folder first: what is given later counts.
        code, output = run("hessian", "--out", tmp_path / "out", *arguments)
        assert code == 2 and words in output.replace("\n", " "), output
        assert "Traceback" not in output


def test_spectrum_of_a_known_matrix() -> None:
    model = nn.Linear(30, 2, bias=False).double()
    values = torch.linspace(-1, 3, 60, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (values * model.weight.flatten().square()).sum() / 2

    row = command._spectrum(loss, model, seed=0, say=lambda what: None)
    assert row["parameters"] == 60 and row["dtype"] == "float64" and row["loss"] == loss().item()
    step = 4 / 59
    assert row["eigenvalues"]["largest"] == pytest.approx([3 - step * k for k in range(5)], rel=2e-3)
    assert row["eigenvalues"]["smallest"] == pytest.approx([-1 + step * k for k in range(5)], rel=2e-3)
    assert row["eigenvalues"]["products"] >= 10
    # Exact for a diagonal matrix.
    assert row["trace"]["value"] == pytest.approx(60) and row["trace"]["standard_error"] < 1e-9
    assert np.dot(row["density"]["nodes"], row["density"]["weights"]) == pytest.approx(1, abs=1e-4)


def test_a_gates_block_is_the_hessian_by_that_gate_alone() -> None:
    lstm = LSTM(2, 3, bidirectional=True, proj_size=2, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(lstm, parameters, (x,))[0].square().sum()

    H = hessian(lambda: loss(dict(lstm.named_parameters())), lstm)
    blocks = command.gate_blocks(lstm)
    assert blocks.keys() == named_gates(lstm).keys()
    assert sorted(row for rows in blocks.values() for row in range(rows.start, rows.stop)) == list(
        range(len(H))
    )
    packed = {name: p.detach().clone() for name, p in lstm.named_parameters()}
    for name, gate in named_gates(lstm).items():
        suffix = name[name.index("_l") :]
        kinds = {"W_i": "weight_ih", "W_h": "weight_hh", "b_i": "bias_ih", "b_h": "bias_hh"}
        kind = "weight_hr" if name.startswith("W_hr") else kinds[name[:3]]
        k = 0 if kind == "weight_hr" else "ifgo".index(name[3])

        def by_gate(value: torch.Tensor, owner: str = kind + suffix, k: int = k) -> torch.Tensor:
            whole = packed[owner]
            return loss(
                packed | {owner: torch.cat([whole[: k * len(value)], value, whole[(k + 1) * len(value) :]])}
            )

        want = torch.autograd.functional.hessian(by_gate, gate.detach()).view(gate.numel(), -1)
        torch.testing.assert_close(H[blocks[name], blocks[name]], want, rtol=1e-9, atol=1e-12)


def test_the_picture_of_the_lstm_shows_its_matrix_with_every_gate_named(quick: None) -> None:
    lstm, loss_fn = command.echo_task(seed=5)
    optimizer = torch.optim.Adam(lstm.parameters(), lr=1e-2)
    for _ in range(command.SMALL_STEPS):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    row = command._lstm_row(5, lambda line: None)
    shown = whole(row)
    np.testing.assert_allclose(shown, hessian(loss_fn, lstm).numpy(), rtol=1e-3, atol=1e-12)
    matcher = {"parameters": 9, "epoch": 0, "density": {"nodes": [0.0, 1.0], "weights": [0.5, 0.5]}} | {
        "trace": {"value": 4.5, "standard_error": 0.0},
        "eigenvalues": {"largest": [1.0], "smallest": [0.0]},
    }
    rows = [row, matcher | {"case": CASES[0]}, matcher | {"case": CASES[1]}]
    figures = hessian_figures(rows)
    ax = figures["hessian-lstm"].axes[0]
    np.testing.assert_array_equal(ax.images[0].get_array(), shown)
    gates = [name.removesuffix("_l0") for name in named_gates(lstm)]
    assert [label.get_text() for label in ax.get_xticklabels()] == gates
    assert [label.get_text() for label in ax.get_yticklabels()] == gates
    for place, rows_of in zip(ax.get_yticks(), command.gate_blocks(lstm).values(), strict=True):
        assert rows_of.start <= place < rows_of.stop
