"""The result of a run as rows for the results file, and as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .baselines import BM25, random_scores
from .batches import Encoder
from .data import CandidateList, Dataset
from .metrics import evaluate
from .models import TITLES
from .overlap import Blend
from .text import MAX_LENGTH, Vocabulary, tokenize
from .train import Trainer

RANKERS = {
    "random": "random order",
    "bm25": "BM25",
    "model": "model alone",
    "model+overlap": "model + overlap features",
}
_BASELINES = ("random", "bm25")
_BUILT_FROM = {"ours": "gatematch", "peer": "torch.nn.LSTM + cdist"}
_SHOWN_WORDS = (6, 14)  # a heat map with fewer words shows nothing, with more cannot be read


def result_rows(
    dataset: Dataset, vocabulary: Vocabulary, encoder: Encoder, trainers: Mapping[str, Trainer]
) -> list[dict[str, Any]]:
    """Everything that the tables and the pictures show. The models are left with their best weights."""
    ours = trainers["ours"]
    for trainer in trainers.values():
        trainer.use_best()
    scores = ours.scores(dataset.test)
    blend = Blend(vocabulary).fit(dataset.dev, ours.scores(dataset.dev))
    rankings = {
        "random": random_scores(dataset.test),
        "bm25": BM25(dataset.answers).scores(dataset.test),
        "model": scores,
        "model+overlap": blend.scores(dataset.test, scores),
    }
    labels = [item.labels for item in dataset.test]
    extra: dict[str, dict[str, Any]] = {
        "model": {
            "model": ours.settings.model,
            "dev_map": ours.dev_map[ours.best_epoch],
            "epoch": ours.best_epoch + 1,
        },
        "model+overlap": {"weights": blend.weights},
    }
    rows: list[dict[str, Any]] = [
        {
            "case": "answers/data",
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            **dataset.counts,
            "train": len(dataset.train),
            "dev": len(dataset.dev),
            "test": len(dataset.test),
            "words": len(vocabulary),
        }
    ]
    rows += [
        {"case": f"answers/{name}", **asdict(evaluate(ranking, labels)), **extra.get(name, {})}
        for name, ranking in rankings.items()
    ]
    rows.append(_time_row(trainers))
    rows.append(
        {
            "case": "answers/curves",
            **{
                name: {"loss": trainer.losses, "dev_map": trainer.dev_map}
                for name, trainer in trainers.items()
            },
        }
    )
    rows.append(_attention_row(ours, encoder, dataset.test, rankings["model+overlap"]))
    return rows


def _time_row(trainers: Mapping[str, Trainer]) -> dict[str, Any]:
    """Seconds an epoch of ours, and of the peer where the model has one."""
    row: dict[str, Any] = {"case": "answers/time", "unit": "seconds an epoch"}
    for name, trainer in trainers.items():
        seconds = trainer.seconds
        row[name] = {"median": median(seconds), "min": min(seconds), "max": max(seconds)}
    if "peer" in row:
        row["ratio"] = row["peer"]["median"] / row["ours"]["median"]
    row["settings"] = trainers["ours"].settings.as_dict()
    return row


@torch.no_grad()
def _attention_row(
    trainer: Trainer, encoder: Encoder, lists: Sequence[CandidateList], scores: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """S of a test question and its right answer: the one ranked with the widest lead among readable ones."""

    def readable(text: str) -> bool:
        return _SHOWN_WORDS[0] <= len(tokenize(text)) <= _SHOWN_WORDS[1]

    def lead(item: CandidateList, row: Sequence[float]) -> float:
        right = [score for score, label in zip(row, item.labels, strict=True) if label]
        wrong = [score for score, label in zip(row, item.labels, strict=True) if not label]
        return max(right) - max(wrong)

    pairs = list(zip(lists, scores, strict=True))
    shown = [(item, row) for item, row in pairs if readable(item.question) and readable(item.right[0])]
    item, _ = max(shown or pairs, key=lambda pair: lead(*pair))
    trainer.model.eval()
    batch = encoder.batch([item.question], [[item.right[0]]], trainer.device)
    return {
        "case": "answers/attention",
        "question": tokenize(item.question)[:MAX_LENGTH],
        "answer": tokenize(item.right[0])[:MAX_LENGTH],
        "S": trainer.model.word_attention(batch)[0].tolist(),
    }


def print_report(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The tables of a results file's rows."""
    cases = {row["case"]: row for row in rows}
    data = cases["answers/data"]
    texts = ("case", "name", "fingerprint")
    counts = ", ".join(f"{value} {key}" for key, value in data.items() if key not in texts)
    console.print(f"{data['name']}: {counts}", highlight=False)

    table = Table(title=f"Ranking the answers of {data['test']} test questions")
    table.add_column("ranker")
    for title in ("MAP", "MRR", "accuracy at 1"):
        table.add_column(title, justify="right")
    for name, title in RANKERS.items():
        row = cases[f"answers/{name}"]
        table.add_row(title, _mean_precision(row), f"{row['mrr']:.3f}", f"{row['accuracy']:.3f}")
    console.print(table)
    console.print("± is the standard error over the questions; all rankers see the same lists.", style="dim")

    time = cases["answers/time"]
    table = Table(title=f"Training {TITLES[cases['answers/model']['model']]}")
    table.add_column("built from")
    for title in ("s / epoch (median)", "range", "last loss"):
        table.add_column(title, justify="right")
    for name, title in _BUILT_FROM.items():
        if name in time:
            row, loss = time[name], cases["answers/curves"][name]["loss"][-1]
            seconds = f"{row['min']:.2f} to {row['max']:.2f}"
            table.add_row(title, f"{row['median']:.2f}", seconds, f"{loss:.4f}")
    console.print(table)
    if "ratio" in time:
        console.print(f"torch's time over ours: {time['ratio']:.2f}", highlight=False)


@dataclass(frozen=True)
class Run:
    """What the table of models takes from one results file of `answers`."""

    data: str
    test: int
    fingerprint: str | None  # of the data; files of before it was written have none
    scores: tuple[tuple[float, float], ...]  # MAP and MRR of the baselines
    baselines: tuple[str, ...]
    line: str

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Run:
        """Of the rows of a file, which raise KeyError when they are not those of a whole run."""
        cases = {row["case"]: row for row in rows}
        data, row, settings = cases["answers/data"], cases["answers/model"], cases["answers/time"]["settings"]
        title = TITLES[row.get("model", "lstm")]  # files of before there was a choice
        if settings["seed"]:
            title += f", seed {settings['seed']}"
        baselines = {name: cases[f"answers/{name}"] for name in _BASELINES}
        return cls(
            data["name"],
            data["test"],
            data.get("fingerprint"),
            tuple((row["map"], row["mrr"]) for row in baselines.values()),
            tuple(f"| {RANKERS[name]} | {_measures(row)} | |" for name, row in baselines.items()),
            f"| {title} | {_measures(row)} | {_mean_precision(cases['answers/model+overlap'])} |",
        )

    def same_questions(self, other: Run) -> bool:
        """By the fingerprints, or else by all that tells: the sizes, and what the baselines score."""
        if self.fingerprint and other.fingerprint:
            return self.fingerprint == other.fingerprint
        return (self.data, self.test, self.scores) == (other.data, other.test, other.scores)

    def __str__(self) -> str:
        scores = ", ".join(
            f"{RANKERS[name]} {score:.4f}" for name, (score, _) in zip(_BASELINES, self.scores, strict=True)
        )
        return f"{self.test} test questions of {self.fingerprint or self.data} (MAP of {scores})"


def models_table(runs: Mapping[Path, Run]) -> str:
    """A Markdown table of several results files of `answers`: a line each, the baselines once.

    Raises:
        ValueError: two files do not hold the same test questions, so their lines could not be compared.
    """
    for (path, run), (other_path, other) in combinations(runs.items(), 2):
        if not run.same_questions(other):
            raise ValueError(
                f"results files must be of the same test questions; {path} has {run}, {other_path} {other}"
            )
    lines = [
        "| model | MAP | MRR | accuracy at 1 | MAP with overlap features |",
        "|---|---|---|---|---|",
    ]
    lines += next(iter(runs.values())).baselines
    return "\n".join([*lines, *(run.line for run in runs.values())])


def _measures(row: Mapping[str, Any]) -> str:
    return f"{_mean_precision(row)} | {row['mrr']:.3f} | {row['accuracy']:.3f}"


def _mean_precision(row: Mapping[str, Any]) -> str:
    return f"{row['map']:.3f} ± {row['map_error']:.3f}"
