"""Questions with their right and wrong answers: the corpus that ships with chatterbot-corpus.

A question is split off with all of its right answers, so no question text is in two splits; the wrong
answers of a list are right answers of other questions **of the same split**, so no list of the dev or test
split holds an answer that the model was trained on (it could tell wrong answers by their familiarity).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from .text import identity, normalize

SPLIT_SEED = 0
SHARES = (0.60, 0.15, 0.25)  # train, dev, test
WRONG = 19


@dataclass(frozen=True)
class CandidateList:
    """A question and its candidate answers in a meaningless order; ``labels`` says which are right."""

    question: str
    candidates: tuple[str, ...]
    labels: tuple[bool, ...]

    @property
    def right(self) -> list[str]:
        return [text for text, label in zip(self.candidates, self.labels, strict=True) if label]

    @property
    def wrong(self) -> list[str]:
        return [text for text, label in zip(self.candidates, self.labels, strict=True) if not label]

    @property
    def rankable(self) -> bool:
        """Whether there is something to rank: a right and a wrong answer (others are not evaluated)."""
        return any(self.labels) and not all(self.labels)


@dataclass(frozen=True)
class Dataset:
    """The three splits. Training lists may hold several right answers and any number of wrong ones."""

    name: str
    train: list[CandidateList]
    dev: list[CandidateList]
    test: list[CandidateList]
    counts: dict[str, int]

    @property
    def train_texts(self) -> list[str]:
        """Every distinct question and answer of the training split: all that a vocabulary may see."""
        return distinct(text for item in self.train for text in (item.question, *item.candidates))

    @property
    def answers(self) -> list[str]:
        """Every distinct candidate of every split: the collection that a search engine would index."""
        lists = (*self.train, *self.dev, *self.test)
        return distinct(text for item in lists for text in item.candidates)

    @property
    def fingerprint(self) -> str:
        """The name and a hash of the lists."""
        lists = [
            [item.question, item.candidates, item.labels] for item in (*self.train, *self.dev, *self.test)
        ]
        return f"{self.name} {hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:16]}"


@dataclass
class _Question:
    text: str
    category: str
    right: dict[str, str]  # identity -> as written


def distinct(texts: Iterable[str]) -> list[str]:
    """Texts without repetition (see `identity`), in their first spelling and order."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(identity(text), text)
    return list(first.values())


def read_corpus() -> tuple[list[tuple[str, str, str]], int]:
    """(category, question, answer) of every thread of the English corpus, and how many are malformed."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the default data needs the package chatterbot-corpus (pip install gatematch[bench])"
        )
    threads, malformed = [], 0
    for path in sorted(Path(spec.submodule_search_locations[0], "data", "english").glob("*.yml")):
        for thread in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            lines = thread[:2] if isinstance(thread, list) else []
            if len(lines) == 2 and all(isinstance(line, str) and normalize(line) for line in lines):
                threads.append((path.stem, lines[0].strip(), lines[1].strip()))
            else:
                malformed += 1
    return threads, malformed


def chatterbot(split_seed: int = SPLIT_SEED) -> Dataset:
    """The default data: every question with 1 right and 19 wrong answers (training: all there are)."""
    threads, malformed = read_corpus()
    questions: dict[str, _Question] = {}
    for category, question, answer in threads:
        entry = questions.setdefault(identity(question), _Question(question, category, {}))
        entry.right.setdefault(identity(answer), answer)
    rng = random.Random(split_seed)
    shuffled = rng.sample(list(questions.values()), len(questions))
    dev, test = (round(sum(SHARES[:n]) * len(shuffled)) for n in (1, 2))
    train_q, dev_q, test_q = shuffled[:dev], shuffled[dev:test], shuffled[test:]
    return Dataset(
        name="chatterbot-corpus",
        train=[_training_list(question, train_q, rng) for question in train_q],
        dev=[_ranking_list(question, dev_q, rng) for question in dev_q],
        test=[_ranking_list(question, test_q, rng) for question in test_q],
        counts={
            "threads": len(threads) + malformed,
            "malformed": malformed,
            "pairs": sum(len(question.right) for question in questions.values()),
            "questions": len(questions),
        },
    )


def _wrong_answers(question: _Question, split: Sequence[_Question], rng: random.Random) -> list[str]:
    """Answers of the question's category that are not right for it, at least 19: other categories top up."""
    own: dict[str, str] = {}
    others: dict[str, str] = {}
    for other in split:
        (own if other.category == question.category else others).update(other.right)
    own = {key: text for key, text in own.items() if key not in question.right}
    others = {key: text for key, text in others.items() if key not in question.right and key not in own}
    missing = max(0, WRONG - len(own))
    return list(own.values()) + rng.sample(list(others.values()), missing)


def _training_list(question: _Question, split: Sequence[_Question], rng: random.Random) -> CandidateList:
    right = list(question.right.values())
    wrong = _wrong_answers(question, split, rng)
    return CandidateList(question.text, (*right, *wrong), (True,) * len(right) + (False,) * len(wrong))


def _ranking_list(question: _Question, split: Sequence[_Question], rng: random.Random) -> CandidateList:
    right = rng.choice(list(question.right.values()))
    candidates = [right, *rng.sample(_wrong_answers(question, split, rng), WRONG)]
    rng.shuffle(candidates)
    return CandidateList(question.text, tuple(candidates), tuple(text is right for text in candidates))
