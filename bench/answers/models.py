"""The models to choose from: their names, their settings, and what each is trained beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .abcnn import ABCNNMatcher, ABCNNSettings
from .model import MatcherSettings, Settings, Siamese, ours, peer

TITLES = {
    "lstm": "LSTM + attention",
    "bcnn": "BCNN",
    "abcnn1": "ABCNN-1",
    "abcnn2": "ABCNN-2",
    "abcnn3": "ABCNN-3",
}

Build = Callable[[int, Any], Siamese]
"""Makes a model of so many embedding rows from its own kind of settings."""


def settings_of(model: str, seed: int) -> Settings:
    """The settings of a model by its name."""
    if model not in TITLES:
        raise ValueError(f"--model must be one of {', '.join(TITLES)}; got {model!r}")
    return MatcherSettings(seed=seed) if model == "lstm" else ABCNNSettings(model, seed)


def builders(settings: Settings) -> dict[str, Build]:
    """What is trained side by side: ours, and for the LSTM the same model built from torch's pieces."""
    if isinstance(settings, MatcherSettings):
        return {"ours": ours, "peer": peer}
    return {"ours": ABCNNMatcher}
