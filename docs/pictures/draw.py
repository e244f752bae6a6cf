"""The pictures of the pages on products. `python docs/pictures/draw.py` writes them beside itself."""

from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

FORWARD, BACKWARD, GREY, INK = "#1f6fb4", "#d9701a", "#c3c8d0", "#22262c"


def transpose() -> Figure:
    """A layer's weights, summed along a row going forward and along a column going backward."""
    W = torch.tensor([[1.0, 2.0, -1.0], [3.0, -2.0, 1.0]])
    h = torch.tensor([2.0, 1.0, 3.0], requires_grad=True)
    dy = torch.tensor([3.0, 1.0])
    y = W @ h
    y.backward(dy)
    assert h.grad is not None and torch.equal(h.grad, W.T @ dy)
    figure = Figure(figsize=(4.5, 6.4))
    above, below = figure.subplots(2)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01, hspace=0.06)
    _layer(above, W, h.tolist(), y.tolist(), row=0)
    _layer(below, W, h.grad.tolist(), dy.tolist(), column=1)
    return figure


def _layer(
    ax: Axes,
    W: torch.Tensor,
    lower: list[float],
    upper: list[float],
    row: int | None = None,
    column: int | None = None,
) -> None:
    """The nodes and their numbers, the weights between them, the matrix; one row or one column stands out."""
    rows, columns = W.shape
    forward = row is not None
    color = FORWARD if forward else BACKWARD
    ax.set(xlim=(-0.55, 4.1), ylim=(-0.95, 3.05))
    ax.axis("off")
    left = [(0.0, 2.0 - i) for i in range(columns)]
    right = [(1.75, 1.5 - o) for o in range(rows)]
    marked = [(o, i) for o in range(rows) for i in range(columns) if o == row or i == column]
    for o, end in enumerate(right):
        for i, start in enumerate(left):
            on = (o, i) in marked
            a, b = (start, end) if forward else (end, start)
            style = {
                "arrowstyle": "-|>" if on else "-",
                "color": color if on else GREY,
                "linewidth": 2.2 if on else 1.2,
                "shrinkA": 15,
                "shrinkB": 15,
                "mutation_scale": 14,
            }
            ax.annotate("", b, a, arrowprops=style, zorder=2 if on else 1)
    names = ("h", "y") if forward else ("dh", "dy")
    for x, y, name, value, on in [
        *((*at, f"{names[0]}{_sub(i)}", lower[i], forward or i == column) for i, at in enumerate(left)),
        *((*at, f"{names[1]}{_sub(o)}", upper[o], not forward or o == row) for o, at in enumerate(right)),
    ]:
        edge = color if on else GREY
        ax.scatter([x], [y], s=720, color="white", edgecolors=edge, linewidths=1.8, zorder=3)
        ax.text(x, y, _signed(value), ha="center", va="center", fontsize=12, color=INK, zorder=4)
        aside = -0.37 if x == 0 else 0.37
        ax.text(x + aside, y, name, ha="center", va="center", fontsize=11, color=INK)
    x0, size = 2.68, 0.46
    for o in range(rows):
        for i in range(columns):
            at = (x0 + i * size, 1.0 - o * size)
            on = (o, i) in marked
            face = color if on else "white"
            ax.add_patch(Rectangle(at, size, size, facecolor=face, edgecolor=GREY, alpha=1.0))
            ax.text(
                at[0] + size / 2,
                at[1] + size / 2,
                _signed(W[o, i].item()),
                ha="center",
                va="center",
                fontsize=12,
                color="white" if on else INK,
            )
    ax.text(x0 + 1.5 * size, 1.62, "W", ha="center", fontsize=12, color=INK)
    title = "Forward: y₁ sums over row 1" if forward else "Backward: dh₂ sums over column 2"
    ax.text(-0.5, 2.72, title, fontsize=11.5, color=color, weight="bold")
    factors = lower if forward else upper
    terms = " + ".join(
        f"{_signed(W[o, i].item())}·{_signed(factors[i if forward else o])}" for o, i in marked
    )
    terms = terms.replace("+ −", "− ")
    result = f"y₁ = {terms} = {_signed(upper[0])}" if forward else f"dh₂ = {terms} = {_signed(lower[1])}"
    ax.text(-0.5, -0.72, result, fontsize=12, color=INK)


def outer() -> Figure:
    """What `prediction - y` is for shapes (4, 1) and (4,); the four wanted differences are its diagonal."""
    y = torch.tensor([1.0, 3.0, 2.0, 5.0])
    prediction = torch.tensor([[2.0], [3.0], [1.0], [4.0]])
    difference = prediction - y
    assert difference.shape == (4, 4)
    assert torch.equal(difference.diagonal(), prediction[:, 0] - y)
    figure = Figure(figsize=(4.5, 3.9))
    ax = figure.subplots()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01)
    ax.set(xlim=(-1.75, 4.2), ylim=(-0.75, 5.2))
    ax.set_aspect("equal")
    ax.axis("off")
    for k in range(4):
        ax.text(k + 0.5, 4.35, _signed(y[k].item()), ha="center", va="center", fontsize=13, color=FORWARD)
        ax.text(
            -0.4, 3.5 - k, _signed(prediction[k].item()), ha="center", va="center", fontsize=13, color=FORWARD
        )
        for j in range(4):
            wanted = j == k
            face = BACKWARD if wanted else "white"
            ax.add_patch(Rectangle((j, 3 - k), 1, 1, facecolor=face, edgecolor=GREY))
            ax.text(
                j + 0.5,
                3.5 - k,
                _signed(difference[k, j].item()),
                ha="center",
                va="center",
                fontsize=13,
                color="white" if wanted else INK,
            )
    ax.text(2, 4.85, "y, (4,)", ha="center", va="center", fontsize=12, color=FORWARD)
    ax.text(-1.05, 2, "prediction, (4, 1)", ha="center", va="center", fontsize=12, color=FORWARD, rotation=90)
    ax.text(2, -0.42, "prediction − y, (4, 4)", ha="center", va="center", fontsize=12, color=INK)
    return figure


def _sub(index: int) -> str:
    return "₁₂₃₄"[index]


def _signed(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def draw(folder: Path) -> None:
    # Text stays text, and the files are the same from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gatematch"}):
        for name, figure in (("transpose.svg", transpose()), ("outer-product.svg", outer())):
            figure.savefig(folder / name, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(__file__).parent)
