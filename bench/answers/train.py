"""Training, and checkpoints that an interrupted run goes on from.

All randomness of an epoch (order, wrong answers, dropout) is drawn from the seed and the epoch's number
alone. So a checkpoint needs no generator state, a resumed run repeats an uninterrupted one, and two models
trained side by side see the same batches in the same order.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .batches import Encoder
from .data import CandidateList, Dataset
from .metrics import evaluate
from .model import Settings
from .models import Build

_SCORED = 16  # lists a batch when nothing is learned
# What reading a damaged file, or a file of something else, may raise.
_DAMAGED = (
    RuntimeError,
    OSError,
    EOFError,
    pickle.UnpicklingError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
)


class Trainer:
    """One model's training run: its optimizer, its curves, and its best epoch by dev MAP."""

    def __init__(
        self,
        build: Build,
        rows: int,
        settings: Settings,
        encoder: Encoder,
        dataset: Dataset,
        device: torch.device,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.model = build(rows, settings).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate)
        self.settings, self.encoder, self.dataset, self.device = settings, encoder, dataset, device
        self.losses: list[float] = []  # one an epoch
        self.dev_map: list[float] = []
        self.seconds: list[float] = []  # training only
        self.best: dict[str, torch.Tensor] = {}

    @property
    def epochs(self) -> int:
        return len(self.dev_map)

    @property
    def best_epoch(self) -> int:
        """The first epoch, from 0, with the highest dev MAP."""
        return max(range(self.epochs), key=lambda epoch: self.dev_map[epoch])

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        return -(-sum(len(item.right) for item in self.dataset.train) // self.settings.batch)

    def epoch(self, advance: Callable[[], None] = lambda: None) -> None:
        """Train one epoch and score dev; `advance` is called after every batch."""
        seed = self.settings.seed * 1_000_003 + self.epochs
        torch.manual_seed(seed)
        rng = random.Random(seed)
        examples = [(item, right) for item in self.dataset.train for right in item.right]
        rng.shuffle(examples)
        self.model.train()
        total, start = 0.0, time.perf_counter()
        for first in range(0, len(examples), self.settings.batch):
            chosen = examples[first : first + self.settings.batch]
            total += self.step(chosen, rng) * len(chosen)
            advance()
        seconds = time.perf_counter() - start
        dev_map = evaluate(self.scores(self.dataset.dev), [item.labels for item in self.dataset.dev]).map
        if not self.dev_map or dev_map > max(self.dev_map):
            self.best = copy.deepcopy(self.model.state_dict())
        self.losses.append(total / len(examples))
        self.seconds.append(seconds)
        self.dev_map.append(dev_map)

    def step(self, examples: Sequence[tuple[CandidateList, str]], rng: random.Random) -> float:
        """One update: the softmax over a right answer and sampled wrong ones should fall on the right one."""
        candidates = [[right, *self._wrong(item, rng)] for item, right in examples]
        batch = self.encoder.batch([item.question for item, _ in examples], candidates, self.device)
        logits = self.model(batch).view(len(examples), -1)
        loss = F.cross_entropy(logits, logits.new_zeros(len(examples), dtype=torch.long))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def _wrong(self, item: CandidateList, rng: random.Random) -> list[str]:
        wrong, wanted = item.wrong, self.settings.wrong
        return rng.sample(wrong, wanted) if len(wrong) >= wanted else rng.choices(wrong, k=wanted)

    @torch.no_grad()
    def scores(self, lists: Sequence[CandidateList]) -> list[list[float]]:
        """The model's score of every candidate."""
        self.model.eval()
        result: list[list[float]] = []
        for first in range(0, len(lists), _SCORED):
            chosen = lists[first : first + _SCORED]
            rows = [item.candidates for item in chosen]
            batch = self.encoder.batch([item.question for item in chosen], rows, self.device)
            scores = self.model(batch).split([len(row) for row in rows])
            result += [row.tolist() for row in scores]
        return result

    def use_best(self) -> None:
        """Give the model the weights of its best epoch."""
        self.model.load_state_dict(self.best)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "dev_map": self.dev_map,
            "seconds": self.seconds,
            "best": self.best,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.losses, self.dev_map, self.seconds = (
            [float(value) for value in state[name]] for name in ("losses", "dev_map", "seconds")
        )
        self.best = dict(state["best"])
        if self.epochs:
            self.use_best()  # a damaged one is found out now, not after training
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def save_checkpoint(path: Path, settings: Mapping[str, Any], trainers: Mapping[str, Trainer]) -> None:
    """Write the state of a run in one step: the file is the old checkpoint or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "settings": dict(settings),
        "trainers": {name: trainer.state() for name, trainer in trainers.items()},
    }
    # Into memory first: Ctrl-C while a file is written comes out of torch.save as a RuntimeError.
    content = io.BytesIO()
    torch.save(state, content)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.getbuffer())
        os.replace(temporary, path)
    except BaseException:
        # Ctrl-C may also come right after the file has got its name.
        Path(temporary).unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path, settings: Mapping[str, Any], trainers: Mapping[str, Trainer]) -> None:
    """Set the trainers to a checkpoint's state; ValueError if it is missing, damaged, or of another run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = dict(state["settings"])
        # Another model has other settings too: its name says most.
        names = sorted({*settings, *found}, key=lambda name: (name != "model", name))
        foreign = [name for name in names if settings.get(name) != found.get(name)]
        if not foreign:
            for name, trainer in trainers.items():
                trainer.load(state["trainers"][name])
            if len({trainer.epochs for trainer in trainers.values()}) != 1:
                raise ValueError("the models have different numbers of epochs")
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path} to resume from; run without --resume") from None
    except _DAMAGED as error:
        raise ValueError(
            f"{path} is not a whole checkpoint of this command: {type(error).__name__}"
        ) from None
    if foreign:
        name = foreign[0]
        raise ValueError(
            f"checkpoint {path} belongs to another run: expected {name} {settings.get(name)}; "
            f"got {found.get(name)}"
        )
