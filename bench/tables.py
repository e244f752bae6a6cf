"""Formats results as Markdown tables; speed_report.py does `speed`, markdown.py `answers`.

What a command prints is the table that `gatematch-bench table` makes of its results file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

NONE = "–"
Rows = list[dict[str, Any]]


def table(heads: Sequence[str], lines: Iterable[Sequence[str]], words: int) -> str:
    """With `words` columns at the left; the others are numbers."""
    marks = "|" + "---|" * words + "---:|" * (len(heads) - words)
    return "\n".join([f"| {' | '.join(heads)} |", marks, *(f"| {' | '.join(line)} |" for line in lines)])


def grouped(rows: Rows, *keys: str | Callable[[dict[str, Any]], str]) -> dict[tuple[str, ...], Rows]:
    """Rows with the same words under `keys`, in the order in which they came."""
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        words = tuple(str(row[key]) if isinstance(key, str) else key(row) for key in keys)
        groups.setdefault(words, []).append(row)
    return groups


def number(value: float | None, form: str) -> str:
    """What JSON has null for, and NaN, are no numbers."""
    return NONE if value is None or math.isnan(value) else f"{value:{form}}"


def check(rows: Rows) -> str:
    keys = ("error", "bound", "gradient_error", "gradient_bound")
    lines = [
        [row["case"], row["setting"], row["dtype"], *(number(row[key], ".1e") for key in keys)]
        for row in rows
    ]
    return table(["case", "setting", "dtype", "error", "bound", "gradient error", "bound"], lines, 3)


def kernels(rows: Rows) -> str:
    """A line for each kernel, dtype and configuration: the worst of its variants on every architecture."""

    def configuration(row: dict[str, Any]) -> str:
        tile = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in row["config"].items())
        return tile.replace("num_warps", "warps ").replace("num_stages", "stages ")

    lines = []
    for words, variants in grouped(rows, "kernel", "dtype", "arch", configuration).items():
        registers, spills, shared = (
            max(row[name] for row in variants) for name in ("registers", "spills", "shared_bytes")
        )
        products = [row["tensor_core_instructions"] for row in variants if row["tensor_core_products"]]
        instructions = f"{min(products)} to {max(products)}" if products else "none"
        lines.append([*words, str(registers), str(spills), f"{shared / 1024:.0f}", instructions])
    heads = ["kernel", "dtype", "architecture", "configuration", "registers", "spills", "shared KB"]
    return table([*heads, "tensor cores"], lines, 8)


def barrier(rows: Rows) -> str:
    """A line for each kind and number of warps: nanoseconds a step by the number of programs."""
    programs = list(dict.fromkeys(row["programs"] for row in rows))
    rows = sorted(rows, key=lambda row: (row["variant"], row["warps"]))
    lines = [
        [*words, *(f"{row['ns']:.0f}" for row in of_kind)]
        for words, of_kind in grouped(rows, "variant", "warps").items()
    ]
    return table(["ns a step", "warps", *(f"{number} programs" for number in programs)], lines, 1)


def expansion(rows: Rows) -> str:
    """A line for each way of multiplying rows: c by the number of features, and the worst of all of them."""
    features = list(dict.fromkeys(row["D"] for row in rows))
    lines = []
    for (path,), of_path in grouped(rows, "path").items():

        def worst(key: str, form: str, of_path: Rows = of_path) -> str:
            values = [row[key] for row in of_path]
            return NONE if None in values else number(float(np.max(values)), form)  # NaN if any is

        cells = [number(row["c"], ".1f") for row in of_path]
        lines.append([path, *cells, worst("tau_needed", ".3f"), worst("error", ".1e"), worst("bound", ".1e")])
    heads = ["rows", *(f"c, D {D}" for D in features), "TAU for 1e-6", "error of S", "bound"]
    return table(heads, lines, 1)


def stages(rows: Rows) -> str:
    lines = []
    for row in rows:
        if row["case"].startswith("gpu/"):
            what = ": ".join(filter(None, (row.get("what"), row.get("reason"))))
            lines.append([f"`{row['stage']}`", row["status"], what, f"{row['seconds']:.0f}"])
    return table(["stage", "status", "what it found", "seconds"], lines, 3)


def hessian(rows: Rows) -> str:
    lines = []
    for row in rows:
        name, result = _curvature(row)
        lines.append([f"{name}, {row['dtype']}", f"{row['parameters']:,}", result])
    return table(["Hessian of", "P", "result"], lines, 3)


def _curvature(row: dict[str, Any]) -> tuple[str, str]:
    """What a row's Hessian is of, and the result."""
    case = row["case"]
    if case.startswith("hessian/matcher/"):
        when = f"after epoch {row['epoch']}" if row["epoch"] else "initial weights"
        largest = ", ".join(f"{value:.2f}" for value in row["eigenvalues"]["largest"])
        lowest, trace = row["eigenvalues"]["smallest"][0], row["trace"]
        return f"answer matcher, {when}", (
            f"loss {row['loss']:.2f}; largest eigenvalues {largest}, smallest {lowest:.2f}; "
            f"trace {trace['value']:.1f} ± {trace['standard_error']:.1f}"
        )
    if case == "hessian/lstm":
        sizes = f"{row['shape']['I']} inputs, {row['shape']['H']} hidden"
        return f"LSTM of {sizes}", f"loss {row['loss_before']:.2g}, then {row['loss']:.2g}"
    if case == "hessian/cost/matrix":
        return "whole matrix, LSTM", f"{row['seconds']:.1f} s"
    product, operator = row["hvp"], row["operator"]
    return "one product, LSTM", (
        f"{product['median']:.0f} ms, {product['ratio']:.2f} of the time of two gradients through "
        f"the reference; of an operator {operator['median']:.0f} ms, {operator['ratio']:.2f}"
    )


def example(rows: Rows) -> str:
    """The rows as they are, of a program in examples/: it knows best how many digits mean something."""
    names = [row["case"].removeprefix("example/") for row in rows]
    headings = list(rows[0])[1:]
    columns = [_column([row[heading] for row in rows]) for heading in headings]
    return table(["", *headings], zip(names, *columns, strict=True), 1)


def _column(values: list[Any]) -> list[str]:
    """Small numbers of whole thousandths get back the zeros at their end, which JSON drops; others stay."""
    shown = [str(value) for value in values]
    if all(isinstance(value, float) and abs(value) < 10 and value == round(value, 3) for value in values):
        decimals = max(len(text.partition(".")[2]) for text in shown)
        shown = [f"{value:.{decimals}f}" for value in values]
    return shown
