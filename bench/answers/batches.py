"""Texts as tensors: each text is encoded once, a batch is padded to its longest text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .text import MAX_LENGTH, PAD, Vocabulary, is_word, tokenize


@dataclass(frozen=True)
class Texts:
    """Texts of one side: token numbers (N, T) into a batch's spellings, lengths (N,), weights (N, T)."""

    tokens: Tensor
    lengths: Tensor
    weights: Tensor  # idf; 0 past the length


@dataclass(frozen=True)
class Batch:
    """Questions and their candidate answers. Every distinct token of the batch is spelled once."""

    spellings: Tensor  # (U, P) embedding rows of each token, padded with PAD
    questions: Texts
    answers: Texts
    question_of: Tensor  # (answers,) which question each answer is a candidate for


class Encoder:
    """Encodes the texts of a data set with the spellings of a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, texts: Iterable[str]) -> None:
        numbers: dict[str, int] = {}
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}
        for text in texts:
            tokens = tokenize(text)[:MAX_LENGTH]
            # Marks weigh a little, not nothing: a text may consist of them.
            weights = [vocabulary.idf(token) if is_word(token) else 0.1 for token in tokens]
            ids = [numbers.setdefault(token, len(numbers)) for token in tokens]
            self._texts[text] = torch.tensor(ids), torch.tensor(weights)
        spellings = [torch.tensor(vocabulary.spell(token)) for token in numbers]
        self._spellings = pad_sequence(spellings, batch_first=True, padding_value=PAD)

    def batch(
        self, questions: Sequence[str], candidates: Sequence[Sequence[str]], device: torch.device
    ) -> Batch:
        """The batch of questions with their candidates, in order."""
        answers = [text for row in candidates for text in row]
        texts = [self._texts[text] for text in (*questions, *answers)]
        distinct, tokens = torch.cat([ids for ids, _ in texts]).unique(return_inverse=True)
        sizes = [len(ids) for ids, _ in texts]
        rows = list(tokens.split(sizes))

        def side(which: slice) -> Texts:
            return Texts(
                pad_sequence(rows[which], batch_first=True).to(device),
                torch.tensor(sizes[which], device=device),
                pad_sequence([weights for _, weights in texts[which]], batch_first=True).to(device),
            )

        spellings = self._spellings[distinct]
        longest = int((spellings != PAD).sum(1).max())
        counts = torch.tensor([len(row) for row in candidates])
        return Batch(
            spellings[:, :longest].to(device),
            side(slice(0, len(questions))),
            side(slice(len(questions), None)),
            torch.arange(len(questions)).repeat_interleave(counts).to(device),
        )
