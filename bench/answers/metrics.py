"""How well lists are ranked: mean average precision, mean reciprocal rank, accuracy at 1.

Candidates with the same score are in no order, so every measure is its **expected** value when ties are
broken at random (exactly, not by sampling; McSherry and Najork, 2008). A tie favours nobody: a ranker that
gives everybody the same score gets what a random order gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean, stdev


@dataclass(frozen=True)
class Metrics:
    """Means over the lists, and the standard error of the first."""

    map: float
    map_error: float
    mrr: float
    accuracy: float


def evaluate(scores: Sequence[Sequence[float]], labels: Sequence[Sequence[bool]]) -> Metrics:
    """Metrics of lists that hold a right and a wrong candidate each, ranked by falling score."""
    if not labels:
        raise ValueError("there is no list to evaluate")
    ranked = [_ties(one, which) for one, which in zip(scores, labels, strict=True)]
    precisions = [average_precision(ties) for ties in ranked]
    return Metrics(
        map=fmean(precisions),
        map_error=stdev(precisions) / len(precisions) ** 0.5 if len(precisions) > 1 else 0.0,
        mrr=fmean(reciprocal_rank(ties) for ties in ranked),
        accuracy=fmean(ties[0][1] / ties[0][0] for ties in ranked),
    )


def _ties(scores: Sequence[float], labels: Sequence[bool]) -> list[tuple[int, int]]:
    """(candidates, right ones) of every group of equal scores, best first."""
    groups: dict[float, tuple[int, int]] = {}
    for score, label in zip(scores, labels, strict=True):
        size, right = groups.get(score, (0, 0))
        groups[score] = (size + 1, right + bool(label))
    return [groups[score] for score in sorted(groups, reverse=True)]


def average_precision(ties: Sequence[tuple[int, int]]) -> float:
    """Expected mean, over the right candidates, of the share of right ones down to each."""
    total, above, found = 0.0, 0, 0
    for size, right in ties:
        for place in range(1, size + 1):
            # A right one sits at this place with probability right / size; the other right ones of the
            # group are spread evenly over its other places.
            before = (place - 1) * (right - 1) / (size - 1) if size > 1 else 0.0
            total += right / size * (found + before + 1) / (above + place)
        above, found = above + size, found + right
    return total / found


def reciprocal_rank(ties: Sequence[tuple[int, int]]) -> float:
    """Expected 1 / rank of the best right candidate."""
    above = 0
    for size, right in ties:
        if right:
            first = (comb(size - place, right - 1) / comb(size, right) for place in range(1, size + 1))
            return sum(chance / (above + place) for place, chance in enumerate(first, start=1))
        above += size
    raise ValueError("a list without a right candidate has no rank")
