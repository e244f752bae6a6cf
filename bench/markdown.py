"""Results files as Markdown tables, for the README and the documents: drawn from the files alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import figures, tables
from .answers.report import RANKERS, Run, models_table
from .results import kind_of, read_results
from .speed_report import speed_tables


def markdown(*paths: Path) -> str:
    """The table of a results file, or of several of `answers`, and a line for each that says where from."""
    runs: dict[Path, Run] = {}
    commands: dict[str, list[str]] = {}
    for path in paths:
        results = read_results(path)
        try:
            if len(paths) == 1:
                table = _of_one(path, results["rows"])
            else:
                runs[path] = _run(path, results["rows"])
            where, command = _source(results["meta"])
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"results file {path} lacks what a table needs: {error}") from None
        commands.setdefault(where, []).append(f"`{command}`")
    if runs:
        table = models_table(runs)
    return "\n\n".join([table, *(f"{where}: {', '.join(run)}" for where, run in commands.items())])


def _of_one(path: Path, rows: list[dict[str, Any]]) -> str:
    if (kind := kind_of(rows)) not in _TABLES:
        raise ValueError(f"results file {path} must come from {', '.join(_TABLES)}; it comes from {kind}")
    return _TABLES[kind](rows)


def _run(path: Path, rows: list[dict[str, Any]]) -> Run:
    if kind_of(rows) != "answers":
        raise ValueError(f"results file {path} must come from answers, as only these share a table")
    return Run.of(rows)


def redrawn(page: str, root: Path) -> str:
    """A Markdown page with what comes from results files below `root` written again: tables between a line
    ``<!-- table FILE ... -->`` and ``<!-- end -->``, generated text in a block behind a line
    ``<!-- sample FILE -->``, and the figures of figures.py.
    """

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}\n{markdown(*(root / name for name in found[2].split()))}\n<!-- end -->"

    def sample(found: re.Match[str]) -> str:
        return f"{found[1]}\n```text\n{figures.sample(root / found[2])}```"

    for draw, behind in ((table, ".*?<!-- end -->"), (sample, "```text\n.*?```")):
        mark = f"<!-- {draw.__name__} "
        page, number = re.subn(rf"({mark}(.+?) -->)\n{behind}", draw, page, flags=re.DOTALL)
        if number != page.count(mark):
            raise ValueError(f"every {mark}FILE --> must be followed by what it names, and its end")
    return figures.redrawn(page, root)


def _source(meta: dict[str, Any]) -> tuple[str, str]:
    """Machine, versions, commit and day; and the command that was run there."""
    machine, triton = meta["cpu"], ""
    if meta["device"] != "cpu":
        machine, triton = f"{meta['device']}, driver {meta['driver']}", f"Triton {meta['triton']}, "
    where = (
        f"{machine}, {meta['threads']} threads, Python {meta['python']}, torch {meta['torch']}, {triton}"
        f"commit {meta['commit']}, {meta['date'][:10]}"
    )
    return where, meta["command"]


def _answers(rows: list[dict[str, Any]]) -> str:
    cases = {row["case"]: row for row in rows}
    lines = []
    for name, title in RANKERS.items():
        row = cases[f"answers/{name}"]
        mean = f"{row['map']:.3f} ± {row['map_error']:.3f}"
        lines.append([title, mean, f"{row['mrr']:.3f}", f"{row['accuracy']:.3f}"])
    return tables.table(["ranker", "MAP", "MRR", "accuracy at 1"], lines, 4)


_TABLES = {
    "answers": _answers,
    "speed": speed_tables,
    "check": tables.check,
    "kernels": tables.kernels,
    "hessian": tables.hessian,
    "gpu": tables.stages,
    "barrier": tables.barrier,
    "expansion": tables.expansion,
    "example": tables.example,
}
