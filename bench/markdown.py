"""Results files as Markdown tables, for the README and the documents: drawn from the files alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import gpu_tables
from .answers.report import RANKERS, Run, models_table
from .hessian import COLUMNS, cells
from .results import read_results

# The peer that each half is held against: what its users call today.
_RIVALS = ("torch.nn.LSTM", "torch.nn.LSTMCell", "cdist, fast mode")


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
    if _are_answers(rows):
        return _answers({row["case"]: row for row in rows})
    if all("peers" in row for row in rows):
        return gpu_tables.speed_tables(rows) if any("timing" in row for row in rows) else _speed(rows)
    if any(row["case"].startswith("gpu/") for row in rows):
        return gpu_tables.stages(rows)
    if all(row["case"].startswith("barrier/") for row in rows):
        return gpu_tables.barrier(rows)
    if all(row["case"].startswith("expansion/") for row in rows):
        return gpu_tables.expansion(rows)
    if all(row["case"].startswith("kernels/") for row in rows):
        return _kernels(rows)
    if all(row["case"].startswith("hessian/") for row in rows):
        return _hessian(rows)
    if all(row["case"].startswith("example/") for row in rows):
        return _example(rows)
    raise ValueError(
        f"results file {path} must come from answers, speed, kernels or hessian, from gpu, barrier or "
        "expansion, or from an example; there is no table for it"
    )


def redrawn(page: str, root: Path) -> str:
    """A Markdown page with its tables drawn again: each stands between a line ``<!-- table FILE ... -->``, of
    results files below `root`, and ``<!-- end -->``.
    """

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}\n{markdown(*(root / name for name in found[2].split()))}\n{found[3]}"

    return re.sub(r"(<!-- table (.+?) -->)\n.*?(<!-- end -->)", table, page, flags=re.DOTALL)


def _run(path: Path, rows: list[dict[str, Any]]) -> Run:
    if not _are_answers(rows):
        raise ValueError(f"results file {path} must come from answers, as only these share a table")
    return Run.of(rows)


def _are_answers(rows: list[dict[str, Any]]) -> bool:
    return any(row["case"].startswith("answers/") for row in rows)


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


def _kernels(rows: list[dict[str, Any]]) -> str:
    """A line for each kernel, dtype and configuration: the worst of its variants on every architecture."""
    lines = [
        "| kernel | dtype | architecture | configuration | registers | spills | shared KB | tensor cores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        tile = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in row["config"].items())
        tile = tile.replace("num_warps", "warps ").replace("num_stages", "stages ")
        groups.setdefault((row["kernel"], row["dtype"], row["arch"], tile), []).append(row)
    for key, variants in groups.items():
        registers, spills, shared = (
            max(row[name] for row in variants) for name in ("registers", "spills", "shared_bytes")
        )
        products = [row["tensor_core_instructions"] for row in variants if row["tensor_core_products"]]
        instructions = f"{min(products)} to {max(products)}" if products else "none"
        lines.append(f"| {' | '.join(key)} | {registers} | {spills} | {shared / 1024:.0f} | {instructions} |")
    return "\n".join(lines)


def _hessian(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---:|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells(rows))])


def _example(rows: list[dict[str, Any]]) -> str:
    """The rows as they are, of a program in examples/: it knows best how many digits mean something."""
    headings = list(rows[0])[1:]
    names = [row["case"].removeprefix("example/") for row in rows]
    columns = [_column([row[heading] for row in rows]) for heading in headings]
    lines = [f"| | {' | '.join(headings)} |", "|---|" + "---:|" * len(headings)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in zip(names, *columns, strict=True))])


def _column(values: list[Any]) -> list[str]:
    """Small numbers of whole thousandths get back the zeros at their end, which JSON drops; others stay."""
    shown = [str(value) for value in values]
    if all(isinstance(value, float) and abs(value) < 10 and value == round(value, 3) for value in values):
        decimals = max(len(text.partition(".")[2]) for text in shown)
        shown = [f"{value:.{decimals}f}" for value in values]
    return shown
