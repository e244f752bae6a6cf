"""Word-overlap features beside a model's score, blended as the ABCNN paper does: a small linear model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .data import CandidateList
from .text import STOP_WORDS, Vocabulary, words

FEATURES = ("shared words", "their idf", "question length", "answer length")


def overlap_features(vocabulary: Vocabulary, question: str, answer: str) -> list[float]:
    """Question words also in the answer (stop words aside), the idf of all of them, and log lengths.

    The idf is that of the training texts. The question's length is the same for every candidate, so alone it
    ranks nothing; the paper has both lengths.
    """
    asked, answered = words(question), words(answer)
    shared = set(asked) & set(answered)
    return [
        float(len(shared - STOP_WORDS)),
        math.fsum(vocabulary.idf(word) for word in shared),
        math.log1p(len(asked)),
        math.log1p(len(answered)),
    ]


class Blend:
    """Weights of the model's score and the overlap features, fitted to rank the dev lists.

    A listwise logistic regression: the softmax over a list's candidates should fall on the right ones. It is
    fitted on dev because on the training lists the model's own score is far too sure. Dev is small, so the
    weights are held near the model's score alone (1, 0, 0, ...), in units of standard deviations.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.weights: dict[str, float] = {}

    def fit(
        self, lists: Sequence[CandidateList], scores: Sequence[Sequence[float]], decay: float = 0.3
    ) -> Blend:
        """Fit on the model's scores of lists; features are standardised over all of their candidates."""
        tables = self._tables(lists, scores)
        every = torch.cat(tables)
        self._mean, self._scale = every.mean(0), every.std(0, correction=0).clamp(min=1e-6)
        targets = [torch.tensor(item.labels, dtype=torch.float64) for item in lists]
        start = torch.eye(1, every.shape[1], dtype=torch.float64)[0]
        weights = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = decay * (weights - start).square().sum()
            for table, target in zip(tables, targets, strict=True):
                logits = self._standard(table) @ weights
                loss = loss - (logits.log_softmax(0) * target).sum() / target.sum() / len(tables)
            loss.backward()
            return loss

        optimizer.step(closure)
        self._weights = weights.detach()
        self.weights = dict(zip(("model score", *FEATURES), self._weights.tolist(), strict=True))
        return self

    def scores(self, lists: Sequence[CandidateList], scores: Sequence[Sequence[float]]) -> list[list[float]]:
        """Blended scores of lists from the model's."""
        return [(self._standard(table) @ self._weights).tolist() for table in self._tables(lists, scores)]

    def _standard(self, table: Tensor) -> Tensor:
        return (table - self._mean) / self._scale

    def _tables(self, lists: Sequence[CandidateList], scores: Sequence[Sequence[float]]) -> list[Tensor]:
        """One (candidates, features) table a list."""
        return [
            torch.tensor(
                [
                    [score, *overlap_features(self._vocabulary, item.question, text)]
                    for score, text in zip(row, item.candidates, strict=True)
                ],
                dtype=torch.float64,
            )
            for item, row in zip(lists, scores, strict=True)
        ]
