"""The `answers` job from data to pictures."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gatematch.bench.plots import draw
from gatematch.bench.results import describe_machine, write_results

from .batches import Encoder
from .data import Dataset, chatterbot
from .model import Settings, ours, peer
from .report import print_report, result_rows
from .text import Vocabulary
from .train import Trainer, load_checkpoint, save_checkpoint
from .tsv import tsv


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    data: Path | None = None
    dev: Path | None = None
    test: Path | None = None
    epochs: int = 8
    device: str = "cpu"
    threads: int = 1
    out: Path = Path("out/answers")
    json: Path | None = None
    resume: bool = False


class Interrupted(Exception):
    """Training was stopped by Ctrl-C; the message says what is kept and how to go on."""


def run(options: Options, settings: Settings, console: Console) -> list[dict[str, Any]]:
    """Train, evaluate, print, and write the results file and the pictures; returns the rows."""
    torch.set_num_threads(options.threads)
    device = _device(options.device)
    dataset = _dataset(options)
    vocabulary = Vocabulary(dataset.train_texts)
    lists = (*dataset.train, *dataset.dev, *dataset.test)
    encoder = Encoder(vocabulary, [text for item in lists for text in (item.question, *item.candidates)])
    trainers = {
        name: Trainer(build, vocabulary.pieces, settings, encoder, dataset, device)
        for name, build in (("ours", ours), ("peer", peer))
    }
    _train(options, settings, dataset, trainers, console)

    results = options.json or options.out / "results.json"
    rows = result_rows(dataset, vocabulary, encoder, trainers)
    write_results(results, describe_machine(device), rows)
    print_report(rows, console)
    pictures = draw(results, options.out)
    console.print(f"results: {results}", highlight=False, soft_wrap=True)
    console.print(f"pictures: {', '.join(map(str, pictures))}", highlight=False, soft_wrap=True)
    return rows


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _dataset(options: Options) -> Dataset:
    if options.data is not None:
        return tsv(options.data, options.dev, options.test)
    if options.dev is not None or options.test is not None:
        raise ValueError("--dev and --test go with --data; got no --data")
    return chatterbot()


def _train(
    options: Options,
    settings: Settings,
    dataset: Dataset,
    trainers: dict[str, Trainer],
    console: Console,
) -> None:
    """Train both models, an epoch of each in turn, with a checkpoint after every pair of epochs."""
    checkpoint = options.out / "checkpoint.pt"
    belongs_to = settings.as_dict() | {"data": _fingerprint(dataset)}
    if options.resume:
        load_checkpoint(checkpoint, belongs_to, trainers)
    else:
        # An older run's checkpoint must not be what an interruption of this one leaves to resume from.
        checkpoint.unlink(missing_ok=True)
    done = trainers["ours"].epochs
    if done > options.epochs:
        raise ValueError(f"checkpoint {checkpoint} already has {done} epochs; got --epochs {options.epochs}")
    columns = (
        TextColumn("epoch {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[seen]}"),
    )
    try:
        with Progress(*columns, console=console) as progress:
            for epoch in range(done, options.epochs):
                label = f"{epoch + 1}/{options.epochs}"
                task = progress.add_task(label, total=2 * trainers["ours"].steps, seen="")
                # Whoever goes second finds warmer caches, so they take turns.
                for name in ("ours", "peer") if epoch % 2 == 0 else ("peer", "ours"):
                    trainers[name].epoch(lambda task=task: progress.advance(task))  # type: ignore[misc]
                seen = "  ".join(
                    f"{name}: loss {trainers[name].losses[-1]:.4f} dev MAP {trainers[name].dev_map[-1]:.3f}"
                    for name in ("ours", "peer")
                )
                progress.update(task, seen=seen)
                save_checkpoint(checkpoint, belongs_to, trainers)
                done = epoch + 1
    except KeyboardInterrupt:
        command = describe_machine(torch.device("cpu"))["command"].removesuffix(" --resume")
        advice = f"{checkpoint} keeps {done}; go on with: {command} --resume" if done else "none is kept"
        raise Interrupted(f"interrupted in epoch {done + 1} of {options.epochs}: {advice}") from None


def _fingerprint(dataset: Dataset) -> str:
    """The data set's name and a hash of its lists."""
    lists = [
        [item.question, item.candidates, item.labels]
        for item in (*dataset.train, *dataset.dev, *dataset.test)
    ]
    digest = hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:16]
    return f"{dataset.name} {digest}"
