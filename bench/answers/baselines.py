"""Rankers that learn nothing: a random order, and the search engine's BM25."""

from __future__ import annotations

from collections.abc import Sequence

import bm25s

from .data import CandidateList
from .text import identity, words


def random_scores(lists: Sequence[CandidateList]) -> list[list[float]]:
    """No preference at all: the metrics are expectations over ties, so this is a random order exactly."""
    return [[0.0] * len(item.candidates) for item in lists]


class BM25:
    """BM25 (k1 = 1.5, b = 0.75, Lucene's idf) of a question against answers.

    All words count: leaving stop words out costs it a little on these data.

    The idf and the mean length come from the whole collection of candidate answers, as a search engine's
    would: this knows more of the test answers than the trained model, which sees the training texts only.
    """

    def __init__(self, answers: Sequence[str]) -> None:
        self._index = {identity(answer): row for row, answer in enumerate(answers)}
        self._engine = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
        self._engine.index([words(answer) for answer in answers], show_progress=False)

    def scores(self, lists: Sequence[CandidateList]) -> list[list[float]]:
        """One score for every candidate of every list."""
        result = []
        for item in lists:
            terms = [term for term in words(item.question) if term in self._engine.vocab_dict]
            every = self._engine.get_scores(terms) if terms else None
            rows = [self._index[identity(text)] for text in item.candidates]
            result.append([float(every[row]) if every is not None else 0.0 for row in rows])
        return result
