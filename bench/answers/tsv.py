"""Question/answer sets in WikiQA's form, read from tab-separated files that the user names.

A header line names the columns ``question_id  question  answer  label`` (in any order, others are passed
over); every further line is one candidate answer, label 1 for a right one, 0 for a wrong one.
"""

from __future__ import annotations

import random
from pathlib import Path

from gatematch.bench.results import read_text

from .data import SHARES, SPLIT_SEED, CandidateList, Dataset
from .text import identity

COLUMNS = ("question_id", "question", "answer", "label")


def read_tsv(path: Path) -> list[CandidateList]:
    """The lists of a file in its order, the same answer once a list; ValueError says what is wrong where."""
    lines = read_text("data file", path, "utf-8-sig").split("\n")
    header = lines[0].rstrip("\r").split("\t")
    for column in COLUMNS:
        if column not in header:
            raise ValueError(
                f"{path}, line 1: expected the column {column}; got {', '.join(header) or 'nothing'}"
            )
    places = [header.index(column) for column in COLUMNS]
    grouped: dict[str, tuple[int, str, dict[str, tuple[str, bool]]]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t")
        if len(fields) != len(header):
            raise ValueError(f"{path}, line {number}: expected {len(header)} columns; got {len(fields)}")
        key, question, answer, label = (fields[place].strip() for place in places)
        if label not in ("0", "1"):
            raise ValueError(f"{path}, line {number}: expected the label 0 or 1; got {label!r}")
        for name, value in (("question", question), ("answer", answer)):
            if not value:
                raise ValueError(f"{path}, line {number}: expected a text in the column {name}; got nothing")
        first, text_of, candidates = grouped.setdefault(key, (number, question, {}))
        if identity(question) != identity(text_of):
            raise ValueError(
                f"{path}, line {number}: expected the question of line {first}, which has the same "
                f"question_id {key!r}; got {question!r}"
            )
        # A text that is right once is never a wrong candidate beside it.
        seen = candidates.get(identity(answer))
        candidates[identity(answer)] = (seen[0], seen[1] or label == "1") if seen else (answer, label == "1")
    if not grouped:
        raise ValueError(f"{path} must hold a candidate answer in every line after the header; got none")
    return [
        CandidateList(
            question, tuple(a for a, _ in found.values()), tuple(right for _, right in found.values())
        )
        for _, question, found in grouped.values()
    ]


def tsv(
    data: Path, dev: Path | None = None, test: Path | None = None, split_seed: int = SPLIT_SEED
) -> Dataset:
    """A data set from files; a split without a file is taken from `data`, by question.

    Lists without a right or without a wrong answer are left out, as is usual for WikiQA. A question of the
    test file is taken out of dev and train, one of dev out of train, and lists of one question stay together.
    """
    every = {"train": read_tsv(data)}
    files = {name: path for name, path in (("dev", dev), ("test", test)) if path is not None}
    every |= {name: read_tsv(path) for name, path in files.items()}
    counts = {"lists": sum(map(len, every.values()))}
    splits = {name: [item for item in lists if item.rankable] for name, lists in every.items()}
    counts["without a right or a wrong answer"] = counts["lists"] - sum(map(len, splits.values()))

    questions = sorted({identity(item.question) for item in splits["train"]})
    random.Random(split_seed).shuffle(questions)
    for name, share in (("test", SHARES[2]), ("dev", SHARES[1])):
        if name not in splits:
            size = round(share * len({identity(item.question) for item in splits["train"]}))
            held, questions = set(questions[:size]), questions[size:]
            splits[name] = [item for item in splits["train"] if identity(item.question) in held]
            splits["train"] = [item for item in splits["train"] if identity(item.question) not in held]

    kept = sum(map(len, splits.values()))
    seen: set[str] = set()
    for name in ("test", "dev", "train"):
        splits[name] = [item for item in splits[name] if identity(item.question) not in seen]
        seen |= {identity(item.question) for item in splits[name]}
        if not splits[name]:
            source = files.get(name, data)
            raise ValueError(
                f"{source} must hold questions with a right and a wrong answer for {name}; got none"
            )
    counts["already in dev or test"] = kept - sum(map(len, splits.values()))
    name = " ".join(path.name for path in (data, *files.values()))
    return Dataset(name, splits["train"], splits["dev"], splits["test"], counts)
