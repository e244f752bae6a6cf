"""The model of `roofline` for a grid of shapes, as rows and as a table: `gatematch-bench roofline`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

from gatematch.bench.roofline import (
    DTYPES,
    KERNELS,
    LAYERS,
    Cell,
    Cost,
    Device,
    costs,
    served,
    step_wins_from,
    wavefront,
)

HS = (64, 128, 256, 512, 768, 1024, 2048)
BS = (1, 16, 64, 128, 256)


def cells(dtypes: tuple[str, ...] = DTYPES, backward: bool | None = None) -> Iterator[Cell]:
    """The cells of the table; `backward` picks one direction."""
    if unknown := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise ValueError(f"--dtype must be of {', '.join(DTYPES)}; got {unknown[0]!r}")
    directions = {None: ("forward", "backward"), False: ("forward",), True: ("backward",)}[backward]
    for dtype in dtypes:
        for direction in directions:
            for H in HS:
                yield from (Cell(H, B, dtype, direction) for B in BS)


def run_roofline(
    device: Device, dtypes: tuple[str, ...] = DTYPES, backward: bool | None = None
) -> list[dict[str, Any]]:
    """A row for every cell: each kernel's parts, the cheapest first, and what a wavefront would gain."""
    rows = []
    for cell in cells(dtypes, backward):
        ranked = costs(device, cell)
        chosen = next(iter(ranked))
        both = wavefront(device, cell)
        rows.append(
            {
                "case": cell.case,
                "dtype": cell.dtype,
                "pass": cell.direction,
                "shape": {"H": cell.H, "B": cell.B},
                "flops": cell.flops,
                "weights_bytes": cell.weights_bytes,
                "chosen": chosen,
                "served": served(cell),
                "us": _short(ranked[chosen].us),
                "kernels": {kernel: _parts(device, kernel, cost) for kernel, cost in ranked.items()},
                "wavefront": both and _gain(*both),
            }
        )
    return rows


def _parts(device: Device, kernel: str, cost: Cost) -> dict[str, Any]:
    parts: dict[str, Any] = asdict(cost)
    parts |= {name: _short(value) for name, value in parts.items() if isinstance(value, float)}
    if kernel == "step":
        parts["us_without_graph"] = _short(cost.us + device.launch_us - device.graph_launch_us)
    return parts | {"bound": cost.bound}


def _gain(apart: float, together: float) -> dict[str, float]:
    return {"apart_us": _short(apart), "us": _short(together), "gain": _short(apart / together)}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def summary(device: Device, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Two lines for each dtype and direction: where `step` wins, and where a wavefront pays."""
    for dtype, direction in dict.fromkeys((row["dtype"], row["pass"]) for row in rows):
        found = {B: step_wins_from(device, Cell(64, B, dtype, direction)) for B in BS}
        answers = ", ".join(f"B{B} " + (f"H{H}" if H else "never") for B, H in found.items())
        yield f"{dtype} {direction}, step is cheaper than persistent from: {answers}"
        gains = {
            row["case"].rsplit("/", 1)[1]: row["wavefront"]["gain"]
            for row in rows
            if (row["dtype"], row["pass"]) == (dtype, direction) and row["wavefront"]
        }
        pays = [cell for cell, gain in gains.items() if gain >= 1.1]
        yield (
            f"{dtype} {direction}, a wavefront of {LAYERS} layers gains 10% or more in {len(pays)} "
            f"of {len(gains)} cells, at most {max(gains.values()):.2f}x: {', '.join(pays)}"
        )


def roofline_table(device: Device, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"us a time step on one {device.name}: a model, nothing is measured")
    for column in ("dtype", "pass", "cell"):
        table.add_column(column, no_wrap=True)
    for column in (*KERNELS, "no graph"):
        table.add_column(column, justify="right")
    for column in ("cheapest", "bound", "blocks", "runs", "wavefront", "served by"):
        table.add_column(column)
    for row in rows:
        offers, chosen = row["kernels"], row["kernels"][row["chosen"]]
        table.add_row(
            row["dtype"],
            row["pass"],
            row["case"].rsplit("/", 1)[1],
            *(f"{offers[kernel]['us']:.2f}" if kernel in offers else "-" for kernel in KERNELS),
            f"{offers['step']['us_without_graph']:.2f}",
            row["chosen"],
            chosen["bound"],
            f"H{chosen['block_h']} B{chosen['block_b']}",
            str(chosen["runs"]),
            f"{row['wavefront']['gain']:.2f}x" if row["wavefront"] else "-",
            row["served"],
        )
    return table
