"""The `answers` job from data to pictures."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gatematch.bench.plots import draw
from gatematch.bench.results import describe_machine, writable, write_results

from .batches import Encoder
from .data import Dataset, chatterbot
from .model import Settings
from .models import builders
from .report import print_report, result_rows
from .text import Vocabulary
from .train import Trainer, load_checkpoint, save_checkpoint
from .tsv import tsv

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    data: Path | None = None
    dev: Path | None = None
    test: Path | None = None
    epochs: int = 8
    device: torch.device = _CPU
    threads: int = 1
    out: Path = Path("out/answers")
    json: Path | None = None
    resume: bool = False


class Interrupted(Exception):
    """Training was stopped by Ctrl-C; the message says what is kept and how to go on."""


def run(options: Options, settings: Settings, console: Console) -> list[dict[str, Any]]:
    """Train, evaluate, print, and write the results file and the pictures; returns the rows."""
    torch.set_num_threads(options.threads)
    dataset = _dataset(options)
    vocabulary = Vocabulary(dataset.train_texts)
    lists = (*dataset.train, *dataset.dev, *dataset.test)
    encoder = Encoder(vocabulary, [text for item in lists for text in (item.question, *item.candidates)])
    trainers = {
        name: Trainer(build, vocabulary.pieces, settings, encoder, dataset, options.device)
        for name, build in builders(settings).items()
    }
    checkpoint, results = options.out / "checkpoint.pt", options.json or options.out / "results.json"
    belongs_to = settings.as_dict() | {"data": dataset.fingerprint}
    if options.resume:
        load_checkpoint(checkpoint, belongs_to, trainers)
    writable("checkpoint in --out", checkpoint)
    writable("--json" if options.json else "results in --out", results)
    _train(options, checkpoint, belongs_to, trainers, console)

    rows = result_rows(dataset, vocabulary, encoder, trainers)
    write_results(results, describe_machine(options.device), rows)
    print_report(rows, console)
    pictures = draw(results, options.out)
    console.print(f"results: {results}", highlight=False, soft_wrap=True)
    console.print(f"pictures: {', '.join(map(str, pictures))}", highlight=False, soft_wrap=True)
    return rows


def _dataset(options: Options) -> Dataset:
    if options.data is not None:
        return tsv(options.data, options.dev, options.test)
    if options.dev is not None or options.test is not None:
        raise ValueError("--dev and --test go with --data; got no --data")
    return chatterbot()


def _train(
    options: Options,
    checkpoint: Path,
    belongs_to: dict[str, Any],
    trainers: dict[str, Trainer],
    console: Console,
) -> None:
    """Train what there is side by side, an epoch of each in turn, with a checkpoint after each round."""
    done = trainers["ours"].epochs
    if done > options.epochs:
        raise ValueError(f"checkpoint {checkpoint} already has {done} epochs; got --epochs {options.epochs}")
    if not options.resume and checkpoint.exists():
        # An older run's checkpoint must not be what an interruption of this one leaves to resume from.
        old = checkpoint.replace(checkpoint.with_name("checkpoint.old.pt"))
        console.print(f"the checkpoint of an older run is now {old}", highlight=False, soft_wrap=True)
    columns = TextColumn("epoch {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        # A terminal has a bar during an epoch; after it a file gets the same line, and at once.
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            for epoch in range(done, options.epochs):
                label = f"{epoch + 1}/{options.epochs}"
                task = progress.add_task(label, total=len(trainers) * trainers["ours"].steps)
                # Whoever goes second finds warmer caches, so they take turns.
                for name in list(trainers)[:: 1 if epoch % 2 == 0 else -1]:
                    trainers[name].epoch(lambda task=task: progress.advance(task))  # type: ignore[misc]
                seen = "  ".join(
                    f"{name}: loss {trainer.losses[-1]:.4f} dev MAP {trainer.dev_map[-1]:.3f}"
                    for name, trainer in trainers.items()
                )
                progress.remove_task(task)
                save_checkpoint(checkpoint, belongs_to, trainers)
                console.print(f"epoch {label}  {seen}", highlight=False, soft_wrap=True)
                done = epoch + 1
    except KeyboardInterrupt:
        advice = f"{checkpoint} keeps {done}; go on with: {_resuming()}" if done else "none is kept"
        raise Interrupted(f"interrupted in epoch {done + 1} of {options.epochs}: {advice}") from None


def _resuming() -> str:
    """This command with --resume. The installed script may not be on PATH (after `make bench`, say)."""
    given = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return shlex.join([sys.executable, "-m", "gatematch.bench", *given, "--resume"])
