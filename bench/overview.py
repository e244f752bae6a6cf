"""One picture of what the library is for, from results files of `answers`, `speed` and `hessian` alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .answers.plots import name_words
from .hessian_plots import heat, whole
from .results import read_results

_OURS, _WRONG, _GREY, _INK = "#1f6fb4", "#e0862a", "#8a8f98", "#33415c"
_WRONG_TEXT = "#a8560c"  # dark enough for letters
_OTHERS = {"cdist, fast mode": "cdist, fast", "cdist, exact mode": "cdist, exact", "broadcast": "broadcast"}
_TITLE, _TEXT = 12.5, 11
# Sentences of Zipf's words with 300 features, as word vectors have.
_CASE = {"case": "pairwise/sentences-300", "data": "text", "mode": "forward+backward"}


def overview(folder: Path) -> dict[str, Figure]:
    """The picture of a folder that holds answers.json, speed.json and hessian.json.

    Raises:
        ValueError: a file is missing, damaged, or lacks what the picture shows.
    """
    answers, speed, hessian = (folder / f"{name}.json" for name in ("answers", "speed", "hessian"))
    attention = _row(answers, {"case": "answers/attention"})
    times = _row(speed, _CASE)
    matrix = _row(hessian, {"case": "hessian/lstm"})
    # Small, so that its letters are large on a telephone.
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=(6.2, 6.9), layout=layout)
    try:
        axes = figure.subplots(2, 2, height_ratios=(1.45, 1))
        _attention(axes[0, 0], attention)
        _hessian(axes[0, 1], matrix)
        _errors(axes[1, 0], times)
        _times(axes[1, 1], times)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"results files in {folder} lack what the picture needs: {error}") from None
    return {"overview": figure}


def _row(path: Path, wanted: Mapping[str, str]) -> dict[str, Any]:
    for row in read_results(path)["rows"]:
        if all(row.get(key) == value for key, value in wanted.items()):
            return row
    raise ValueError(f"results file {path} must hold the case {' '.join(wanted.values())}; it does not")


def _attention(ax: Axes, row: Mapping[str, Any]) -> None:
    question, answer, S = row["question"], row["answer"], row["S"]
    ax.imshow(S, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for i, scores in enumerate(S):
        for j, score in enumerate(scores):
            if score == 1:
                ax.text(j, i, "1", ha="center", va="center", fontsize=_TEXT, color="white", weight="bold")
    name_words(ax, question, answer, rotation=90)
    ax.tick_params(labelsize=_TEXT)
    _title(ax, "Attention: equal words\nscore exactly 1")


def _hessian(ax: Axes, row: Mapping[str, Any]) -> None:
    """The whole matrix; its parameters named, and of the weights the gates i, f, g, o."""
    heat(ax, whole(row), aspect="auto")
    parameters: dict[str, list[int]] = {}
    for name, (start, stop) in row["blocks"].items():
        stem = name[:3]  # W_ii_l0: W_i, gate i
        parameters.setdefault(stem, [start, stop])[1] = stop
        if stem.startswith("W"):
            ax.text(-1.5, (start + stop - 1) / 2, name[3], ha="right", va="center", fontsize=_TEXT)
        for line in (ax.axhline, ax.axvline):
            line(start - 0.5, color="#555", linewidth=0.3)
    for start, _ in list(parameters.values())[1:]:
        for line in (ax.axhline, ax.axvline):
            line(start - 0.5, color="#333", linewidth=1.3)
    centres = [(start + stop - 1) / 2 for start, stop in parameters.values()]
    ax.set_xticks(centres, list(parameters))
    ax.set_yticks(centres, list(parameters))
    ax.tick_params(length=0, labelsize=_TEXT)
    ax.tick_params(axis="y", pad=14)
    _title(ax, "The whole Hessian of\nan LSTM, gate by gate")


def _errors(ax: Axes, row: Mapping[str, Any]) -> None:
    """The largest error of S on text: a dot for each way, on a logarithmic scale."""
    errors = {"gatematch": row["ours"]["error"]} | {
        label: row["peers"][name]["error"] for name, label in _OTHERS.items()
    }
    colors = [_color(name, row) for name in ("ours", *_OTHERS)]
    places = range(len(errors))
    ax.hlines(places, 1e-10, list(errors.values()), color=colors, linewidth=3)
    ax.scatter(list(errors.values()), places, s=70, color=colors, zorder=3)
    ax.set_xscale("log")
    for place, error in enumerate(errors.values()):
        label = f"{error:.0e}".replace("e-0", "e-") if error < 1e-3 else f"{error:.2f}"
        ax.text(3 * error, place, label, va="center", fontsize=_TEXT, color=_INK)
    ax.set_xlim(1e-10, 2)
    ax.set_yticks(places, list(errors))
    _clean(ax, "error of S (log scale)")
    _title(ax, f"Exact on text, where\ncdist is off by {errors['cdist, fast']:.2f}")


def _times(ax: Axes, row: Mapping[str, Any]) -> None:
    """Time over ours: a bar for each way that is right."""
    peers = [row["peers"][name] for name in _OTHERS]
    ratios = [1.0, *(peer.get("ratio", 0.0) for peer in peers)]
    right = [ratio for ratio in ratios[1:] if ratio]
    if not right:
        raise ValueError(f"the picture needs a peer that is as exact as ours; in {row['case']} none is")
    colors = [_color(name, row) for name in ("ours", *_OTHERS)]
    ax.barh(range(len(ratios)), ratios, color=colors, height=0.6)
    for place, ratio in enumerate(ratios):
        label = f"{ratio:.3g}x" if ratio else "wrong, not timed"
        color = _INK if ratio else _WRONG_TEXT
        ax.text(ratio + max(ratios) / 40, place, label, va="center", fontsize=_TEXT, color=color)
    ax.set_xlim(0, 1.25 * max(ratios))
    ax.set_yticks([])
    shape = row["shape"]
    _clean(ax, f"CPU time with gradients,\n{shape['B']} pairs of {shape['Q']} words")
    times = " and ".join(f"{ratio:.0f}" for ratio in sorted(right))
    _title(ax, f"What is as exact takes\n{times} times as long")


def _color(name: str, row: Mapping[str, Any]) -> str:
    if name == "ours":
        return _OURS
    return _WRONG if row["peers"][name]["status"] == "wrong" else _GREY


def _clean(ax: Axes, label: str) -> None:
    """No ticks: every value is written beside its mark."""
    ax.set_ylim(3.6, -0.6)
    ax.set_xticks([])
    ax.xaxis.minorticks_off()
    ax.tick_params(axis="y", length=0, labelsize=_TEXT)
    ax.set_xlabel(label, fontsize=_TEXT, loc="left")
    ax.spines[["top", "right", "bottom"]].set_visible(False)


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, fontsize=_TITLE, weight="bold", loc="left", color=_INK)
