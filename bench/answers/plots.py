"""The figures of a run, from the rows of its results file alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .report import RANKERS

_OURS, _PEER, _GREY = "#1f6fb4", "#e0862a", "#8a8f98"


def figures(results: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Curves, MAP and attention, from the rows of a results file."""
    cases = {row["case"]: row for row in rows}
    needed = {f"answers/{name}" for name in ("curves", "attention", "data", *RANKERS)}
    missing = sorted(needed - cases.keys())
    if missing:
        raise ValueError(
            f"results file {results} must hold the case {missing[0]} of an answers run; it does not"
        )
    return {"curves": _curves(cases), "map": _map(cases), "attention": _attention(cases)}


def _curves(cases: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    curves = cases["answers/curves"]
    for ax, key, title in zip(
        axes, ("loss", "dev_map"), ("training loss (nats)", "MAP on the dev questions"), strict=True
    ):
        epochs = range(1, len(curves["ours"][key]) + 1)
        # The wide line under the thin dashed one shows both where they agree.
        ax.plot(epochs, curves["ours"][key], color=_OURS, linewidth=5, alpha=0.55, label="gatematch")
        if "peer" in curves:
            peer = {"color": _PEER, "linewidth": 1.6, "linestyle": "--", "marker": "o", "markersize": 3.5}
            ax.plot(epochs, curves["peer"][key], label="torch.nn.LSTM + cdist", **peer)
        ax.set_xlabel("epoch")
        ax.set_title(title, fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=True)
        _clean(ax)
    axes[0].legend(frameon=False)
    return figure


def _map(cases: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(7, 2.9), layout="constrained")
    ax = figure.subplots()
    rows = [cases[f"answers/{name}"] for name in RANKERS]
    values, errors = [row["map"] for row in rows], [row["map_error"] for row in rows]
    colors = [_GREY, _GREY, _OURS, _OURS]
    ax.barh(
        list(RANKERS.values()), values, xerr=errors, color=colors, height=0.62, error_kw={"ecolor": "#444"}
    )
    for place, (value, error) in enumerate(zip(values, errors, strict=True)):
        ax.text(value + error + 0.008, place, f"{value:.3f}", va="center")
    ax.invert_yaxis()
    ax.set_xlim(0, max(value + error for value, error in zip(values, errors, strict=True)) * 1.15)
    questions = cases["answers/data"]["test"]
    ax.set_xlabel(f"MAP on {questions} test questions (bars: ± one standard error)")
    _clean(ax)
    ax.tick_params(axis="y", length=0)
    return figure


def _attention(cases: Mapping[str, Any]) -> Figure:
    row = cases["answers/attention"]
    question, answer = row["question"], row["answer"]
    size = (2.6 + 0.42 * len(answer), 1.9 + 0.36 * len(question))
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(row["S"], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if len(question) * len(answer) <= 200:
        for i, scores in enumerate(row["S"]):
            for j, score in enumerate(scores):
                color = "white" if score > 0.5 else "#33415c"
                ax.text(j, i, f"{score:.2f}", ha="center", va="center", fontsize=7, color=color)
    name_words(ax, question, answer, rotation=45, ha="right")
    ax.set_xlabel("the right answer")
    ax.set_ylabel("question")
    figure.colorbar(image, ax=ax, label="S = 1 / (1 + distance)")
    return figure


def name_words(ax: Any, question: Sequence[str], answer: Sequence[str], **turned: Any) -> None:
    """The words of both sides at the rows and columns of an attention map."""
    # "$" would start a formula.
    ax.set_xticks(range(len(answer)), [word.replace("$", r"\$") for word in answer], **turned)
    ax.set_yticks(range(len(question)), [word.replace("$", r"\$") for word in question])
    ax.tick_params(length=0)


def _clean(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x" if ax.containers else "y", color="#e4e6ea", linewidth=0.8)
    ax.set_axisbelow(True)
