"""The figures of `gatematch-bench hessian`, from the rows of its results file alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine

from gatematch.curvature import SpectralDensity

_BEFORE, _AFTER = "#e0862a", "#1f6fb4"


def hessian_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """The LSTM's whole Hessian, and the matcher's eigenvalues before and after training."""
    cases = {row["case"]: row for row in rows}
    return {"hessian-lstm": _matrix(cases["hessian/lstm"]), "hessian-matcher": _spectrum(cases)}


def whole(row: Mapping[str, Any]) -> np.ndarray:
    """The matrix (P, P) of a row that holds its lower triangle."""
    H = np.zeros((row["parameters"], row["parameters"]))
    for k, values in enumerate(row["rows"]):
        H[k, : k + 1] = H[: k + 1, k] = values
    return H


def heat(ax: Axes, H: np.ndarray, aspect: Literal["equal", "auto"] = "equal") -> AxesImage:
    """H as colors, logarithmic on both sides of 0 and linear near it, since entries span many magnitudes."""
    largest = np.abs(H).max()
    norm = SymLogNorm(largest / 1e4, linscale=0.5, vmin=-largest, vmax=largest)
    return ax.imshow(H, cmap="RdBu_r", norm=norm, aspect=aspect, interpolation="nearest")


def _matrix(row: Mapping[str, Any]) -> Figure:
    H = whole(row)
    figure = Figure(figsize=(8.6, 7.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    ax = figure.subplots()
    image = heat(ax, H)
    # A parameter holds the gates i, f, g, o: a thin line between gates, a stronger one between parameters.
    names = [name.removesuffix("_l0") for name in row["blocks"]]
    blocks = list(zip(names, row["blocks"].values(), strict=True))
    for (name, _), (following, (start, _)) in pairwise(blocks):
        style: dict[str, Any] = {"color": "#555", "linewidth": 0.4 if following[:3] == name[:3] else 1.4}
        ax.axhline(start - 0.5, **style)
        ax.axvline(start - 0.5, **style)
    centres = [(start + stop - 1) / 2 for _, (start, stop) in blocks]
    ax.set_xticks(centres, names, rotation=90, fontsize=8)
    ax.set_yticks(centres, names, fontsize=8)
    ax.tick_params(length=0)
    inputs, hidden = row["shape"]["I"], row["shape"]["H"]
    ax.set_title(
        f"The {len(H)} × {len(H)} Hessian of an LSTM ({inputs} inputs, {hidden} hidden units) "
        f"after {row['optimizer_steps']} training steps",
        fontsize=10,
    )
    bar = figure.colorbar(
        image, ax=ax, shrink=0.75, label="second derivative of the loss (logarithmic scale)"
    )
    bar.ax.tick_params(labelsize=8)
    return figure


def _spectrum(cases: Mapping[str, Any]) -> Figure:
    """Density above, and below it a mark for every eigenvalue that was computed at either end."""
    before, after = cases["hessian/matcher/initial"], cases["hessian/matcher/trained"]
    ends = [before["density"]["nodes"][k] for k in (0, -1)] + [after["density"]["nodes"][k] for k in (0, -1)]
    width = (max(ends) - min(ends)) / 60
    grid = np.linspace(min(ends) - 4 * width, max(ends) + 4 * width, 400)
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    ax, marks = figure.subplots(2, 1, sharex=True, height_ratios=(7, 1))
    for place, (row, color, label) in enumerate(
        ((before, _BEFORE, "initial weights"), (after, _AFTER, f"after epoch {after['epoch']}"))
    ):
        density = SpectralDensity(np.array(row["density"]["nodes"]), np.array(row["density"]["weights"]))
        count = row["parameters"] * density.smooth(grid, width)
        trace = f"{row['trace']['value']:.0f} ± {row['trace']['standard_error']:.0f}"
        label += f" (trace {trace.replace('-', '−')})"
        ax.plot(grid, count, color=color, linewidth=1.8, label=label)
        ax.fill_between(grid, count, color=color, alpha=0.15, linewidth=0)
        outer = row["eigenvalues"]["largest"] + row["eigenvalues"]["smallest"]
        marks.plot(outer, [place] * len(outer), "|", color=color, markersize=11, markeredgewidth=1.4)
    ax.set_yscale("log")
    ax.set_ylim(0.1, 30 * ax.dataLim.ymax)  # room for the legend
    ax.set_ylabel("eigenvalues per unit")
    ax.set_title(
        f"The {before['parameters']:,} eigenvalues of the answer matcher's Hessian\n"
        f"(estimated, each spread to a bell of standard deviation {width:.2f})",
        fontsize=10,
    )
    ax.legend(frameon=False, loc="upper left", fontsize=8)
    ax.grid(color="#e4e6ea", linewidth=0.8)
    ax.set_axisbelow(True)
    marks.set_yticks([0, 1], ["initial", "trained"], fontsize=8)
    marks.set_ylim(1.7, -0.7)
    marks.tick_params(axis="y", length=0)
    ends_shown = len(before["eigenvalues"]["largest"])
    marks.set_xlabel(f"eigenvalue (marks: the {ends_shown} largest and the {ends_shown} smallest)")
    for axes in (ax, marks):
        axes.axvline(0, color="#444", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
