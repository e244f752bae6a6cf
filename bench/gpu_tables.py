"""Markdown tables of what a GPU shows: `speed` there, `barrier`, `expansion` and the stages of `gpu`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .speed import MODES
from .speed_report import classes, faults

_NONE = "–"


def speed_tables(rows: list[dict[str, Any]]) -> str:
    """Classes of the LSTM, rows of pairwise attention, and below them all in which a peer is faster."""
    timed = [row for row in rows if "timing" in row]  # a case that failed as a whole is named at the end
    lstm = [row for row in timed if row["case"].startswith("lstm/")]
    pairwise = [row for row in timed if row["case"].startswith("pairwise/")]
    tables = [_lstm(lstm)] * bool(lstm) + [_pairwise(pairwise)] * bool(pairwise)
    return "\n\n".join([*tables, _slower(rows)])


def _lstm(rows: list[dict[str, Any]]) -> str:
    """A line for each class and peer: of both passes the geometric mean and the worst row."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for members in classes(rows):
        case, dtype, mode, timing = members.words
        for peer in members.peers:
            groups.setdefault((case, dtype, timing, peer), {})[mode] = members.against(peer)
    lines = []
    for words, of_modes in groups.items():
        if not any(of_modes.values()):
            continue
        cells = [str(max(found[3] for found in of_modes.values() if found))]
        for mode in MODES:
            if (found := of_modes.get(mode)) is None:
                cells += [_NONE] * 2
                continue
            mean, worst, row, _, wrong = found
            cells += [f"{mean:.2f}x" + (f", {wrong} wrong" if wrong else ""), f"{worst:.2f}x, {_size(row)}"]
        lines.append([*words, *cells])
    heads = ["case", "dtype", "timing", "beside", "rows"]
    return _table([*heads, *(f"{mode}: {what}" for mode in MODES for what in ("mean", "worst"))], lines, 5)


def _pairwise(rows: list[dict[str, Any]]) -> str:
    """A line for each case, in cells that have both passes; what is timed in two ways is shown cold."""
    groups: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        name = row["case"] + ("" if row["data"] == "random" else f", {row['data']}")
        of_modes = groups.setdefault((name, _size(row), row["dtype"]), {})
        if row["timing"] == "cold" or row["mode"] not in of_modes:
            of_modes[row["mode"]] = row
    peers = [
        name
        for name in dict.fromkeys(name for row in rows for name in row["peers"])
        if any(_shown(row["peers"].get(name)) not in (_NONE, "fails") for row in rows)
    ]
    lines = []
    for words, of_modes in groups.items():
        both = [of_modes.get(mode, {"ours": {}, "peers": {}}) for mode in MODES]
        ours = [f"{row['ours']['median']:.2f}" if "median" in row["ours"] else _NONE for row in both]
        floor = [f"{row['share']:.0%}" if "share" in row else _NONE for row in both]
        cells = [[_shown(row["peers"].get(peer)) for row in both] for peer in peers]
        lines.append([*words, *map(", ".join, [ours, floor, *cells])])
    return _table(["case", "size", "dtype", "ours, ms", "of the floor", *peers], lines, 3)


def _shown(peer: Mapping[str, Any] | None) -> str:
    if peer is None or peer["status"].startswith("skipped"):
        return _NONE
    if "ratio" in peer:
        return f"{peer['ratio']:.2f}x"
    return f"wrong ({peer['wrong_ratio']:.2f}x)" if "wrong_ratio" in peer else "fails"


def _size(row: Mapping[str, Any]) -> str:
    """Letters that tell the rows of a class from each other."""
    shape = row["shape"]
    if "H" in shape:
        return f"B{shape['B']} H{shape['H']}"
    return " ".join(f"{letter}{shape[letter]}" for letter in "BQAD")


def _slower(rows: list[dict[str, Any]]) -> str:
    """Every row in which a peer whose results are right is faster, and every one of ours that is wrong."""
    found: dict[tuple[str, ...], list[tuple[float, str]]] = {}
    for row in rows:
        for name, peer in row["peers"].items():
            if round(peer.get("ratio", 1.0), 2) < 1:
                data = "" if row["data"] == "random" else f", {row['data']}"
                words = row["case"] + data, row["dtype"], row["mode"], row["timing"], name
                found.setdefault(words, []).append((peer["ratio"], _size(row)))
    lines = [f"- {fault}" for fault in faults(rows)]
    for (case, dtype, mode, timing, name), slower in found.items():
        where = ", ".join(f"{ratio:.2f}x ({size})" for ratio, size in sorted(slower))
        lines.append(f"- {case} {dtype}, {mode}, {timing}, beside {name}: {where}")
    if not found:
        lines.append("- no row in which a peer whose results are right is faster")
    return "\n".join(["Slower than a peer, or wrong:", "", *lines])


def barrier(rows: list[dict[str, Any]]) -> str:
    """A line for each kind and number of warps: nanoseconds a step by the number of programs."""
    programs = list(dict.fromkeys(row["programs"] for row in rows))
    groups: dict[tuple[str, int], list[str]] = {}
    for row in sorted(rows, key=lambda row: (row["variant"], row["warps"])):
        groups.setdefault((row["variant"], row["warps"]), []).append(f"{row['ns']:.0f}")
    lines = [[variant, str(warps), *cells] for (variant, warps), cells in groups.items()]
    return _table(["ns a step", "warps", *(f"{number} programs" for number in programs)], lines, 1)


def expansion(rows: list[dict[str, Any]]) -> str:
    """A line for each way of multiplying rows: c by the number of features, and the worst error of S."""
    features = list(dict.fromkeys(row["D"] for row in rows))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["path"], []).append(row)
    lines = []
    for path, of_path in groups.items():
        constants = [_NONE if row["c"] is None else f"{row['c']:.1f}" for row in of_path]
        errors = [row["error"] for row in of_path]
        worst = _NONE if None in errors else f"{max(errors):.1e}"
        lines.append([path, *constants, worst, f"{of_path[0]['bound']:.1e}"])
    return _table(["rows", *(f"c, D {D}" for D in features), "error of S", "bound"], lines, 1)


def stages(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["case"].startswith("gpu/"):
            what = ": ".join(filter(None, (row.get("what"), row.get("reason"))))
            lines.append([f"`{row['stage']}`", row["status"], what, f"{row['seconds']:.0f}"])
    return _table(["stage", "status", "what it found", "seconds"], lines, 3)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], words: int) -> str:
    """With `words` columns at the left; the others are numbers."""
    marks = "|" + "---|" * words + "---:|" * (len(heads) - words)
    return "\n".join([f"| {' | '.join(heads)} |", marks, *(f"| {' | '.join(line)} |" for line in lines)])
