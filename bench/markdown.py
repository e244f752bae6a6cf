"""Results files as Markdown tables, for the README and the documents: drawn from the files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .answers.report import RANKERS
from .results import read_results

# The peer that each half is held against: what its users call today.
_RIVALS = ("torch.nn.LSTM", "torch.nn.LSTMCell", "cdist, fast mode")


def markdown(path: Path) -> str:
    """The table of a results file of `answers` or `speed`, and a line that says where it was measured."""
    results = read_results(path)
    rows, meta = results["rows"], results["meta"]
    try:
        if any(row["case"].startswith("answers/") for row in rows):
            table = _answers({row["case"]: row for row in rows})
        elif all("peers" in row for row in rows):
            table = _speed(rows)
        else:
            raise ValueError(f"results file {path} must come from answers or speed; there is no table for it")
        where = (
            f"{meta['cpu'] if meta['device'] == 'cpu' else meta['device']}, {meta['threads']} threads, "
            f"Python {meta['python']}, torch {meta['torch']}, commit {meta['commit']}, {meta['date'][:10]}: "
            f"`{meta['command']}`"
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"results file {path} lacks what a table needs: {error}") from None
    return f"{table}\n\n{where}"


def _answers(cases: dict[str, Any]) -> str:
    lines = ["| ranker | MAP | MRR | accuracy at 1 |", "|---|---|---|---|"]
    for name, title in RANKERS.items():
        row = cases[f"answers/{name}"]
        mean = f"{row['map']:.3f} ± {row['map_error']:.3f}"
        lines.append(f"| {title} | {mean} | {row['mrr']:.3f} | {row['accuracy']:.3f} |")
    return "\n".join(lines)


def _speed(rows: list[dict[str, Any]]) -> str:
    """A line a case: the rival's time over ours in both modes, both errors, and what other data cost us."""
    lines = [
        "| case | shape | beside | forward | forward+backward | our error | its error |",
        "|---|---|---|---|---|---|---|",
    ]
    for forward, both in zip(rows[::2], rows[1::2], strict=True):
        rival = next((name for name in _RIVALS if name in forward["peers"]), None)
        if rival is None:
            raise KeyError(f"a peer of {forward['case']}")
        cells = []
        for row in (forward, both):
            peer = row["peers"][rival]
            cell = f"{peer['ratio']:.2f}x" if "ratio" in peer else peer["status"]
            if "time_to_random" in row:
                cell += f" ({row['time_to_random']:.2f} of random rows' time)"
            cells.append(cell)
        name = forward["case"] + ("" if forward["data"] == "random" else f", {forward['data']}")
        shape = " ".join(f"{letter}{size}" for letter, size in forward["shape"].items())
        error = forward["peers"][rival]["error"]
        lines.append(
            f"| {name} | {shape} | {rival} | {cells[0]} | {cells[1]} "
            f"| {forward['ours']['error']:.0e} | {error:.0e} |"
        )
    return "\n".join(lines)
