"""Pictures of results files, drawn from the files alone, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .results import kind_of, read_results

# One for every peer there is, told apart by shape as well as by color.
_COLORS = ["#1f6fb4", "#e0862a", "#3a9a5b", "#8a5fb0", "#8a8f98", "#7a4a24", "#c8447c"]
_MARKERS = "osDo^vX"


def draw(results: Path, folder: Path) -> list[Path]:
    """Draw what a results file of `answers`, `speed` or `hessian` holds into a folder; returns the files."""
    from .answers.plots import figures
    from .hessian_plots import hessian_figures

    rows = read_results(results)["rows"]
    kinds: dict[str, Callable[[list[dict[str, Any]]], dict[str, Figure]]] = {
        "answers": partial(figures, results),
        "speed": _speed,
        "hessian": hessian_figures,
    }
    if (kind := kind_of(rows)) not in kinds:
        raise ValueError(f"results file {results} must come from {', '.join(kinds)}; it comes from {kind}")
    try:
        drawn = kinds[kind](rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"results file {results} lacks what a picture needs: {error}") from None
    return save(drawn, folder)


def save(figures: dict[str, Figure], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        for suffix in ("svg", "png"):
            path = folder / f"{name}.{suffix}"
            # Text stays text in the SVG, and the file is the same from run to run.
            with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gatematch"}):
                figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            written.append(path)
    return written


def _speed(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """A line a row, a dot a peer: its time over ours, on a logarithmic scale."""
    rows = [row for row in rows if row["ours"]["status"] == "timed"]
    names = list(
        dict.fromkeys(name for row in rows for name, peer in row["peers"].items() if "ratio" in peer)
    )
    if len(names) > len(_COLORS):
        raise ValueError(f"the picture has room for {len(_COLORS)} peers; got {', '.join(names)}")
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for color, marker, name in zip(_COLORS, _MARKERS, names, strict=False):
        timed = [
            (k, row["peers"][name]["ratio"])
            for k, row in enumerate(rows)
            if "ratio" in row["peers"].get(name, {})
        ]
        places, ratios = zip(*timed, strict=True)
        ax.scatter(ratios, places, s=22, color=color, marker=marker, label=name, zorder=3)
    labels = [
        f"{row['case']}{'' if row['data'] == 'random' else ', ' + row['data']}, "
        + ("fwd" if row["mode"] == "forward" else "fwd+bwd")
        for row in rows
    ]
    ax.set_yticks(range(len(rows)), labels, fontsize=8)
    ax.invert_yaxis()
    ax.axvline(1, color="#444", linewidth=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}x")
    ax.set_xlabel("time over gatematch's (right of 1x, gatematch is faster)")
    ax.grid(color="#e4e6ea", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return {"speed": figure}
