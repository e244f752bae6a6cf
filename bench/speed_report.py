"""What the rows of `speed` say, as Markdown: case by case, on a GPU the LSTM in classes; what is slower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .problems import MODES
from .tables import NONE, Rows, grouped, number, table


def speed_tables(rows: Rows) -> str:
    """The LSTM, pairwise attention, and below them every row of ours that is wrong, or slower on a GPU."""
    parts = []
    for half in ("lstm/", "pairwise/"):
        # A case that failed as a whole is named at the end.
        members = [row for row in rows if row["case"].startswith(half) and "mode" in row]
        if members:
            in_classes = half == "lstm/" and "timing" in members[0]
            parts.append((_classes if in_classes else _cases)(members))
    found = [*faults(rows), *_slower(rows)]
    if found or any("timing" in row for row in rows):
        found = found or ["no row in which a peer whose results are right is faster"]
        parts += ["Slower than a peer, or wrong:", "\n".join(f"- {line}" for line in found)]
    return "\n\n".join(parts)


class Class(NamedTuple):
    """Rows that share a claim on a GPU: those of a case, dtype, pass and way of timing.

    Hidden sizes of 2048, where the weights of an LSTM do not fit the chip, are a class of their own.
    """

    words: tuple[str, ...]
    rows: Rows

    def against(self, peer: str) -> tuple[float, float, dict[str, Any], int, int] | None:
        """Of a peer's times over ours the geometric mean, the least, its row, how many there are, and in how
        many of them the peer is wrong.
        """
        timed = [
            (ratio, row)
            for row in self.rows
            for entry in [row["peers"].get(peer, {})]
            if (ratio := entry.get("ratio", entry.get("wrong_ratio"))) is not None
        ]
        if not timed:
            return None
        worst, row = min(timed, key=lambda pair: pair[0])
        mean = float(np.exp(np.mean(np.log([ratio for ratio, _ in timed]))))
        wrong = sum("wrong_ratio" in row["peers"][peer] for _, row in timed)
        return mean, worst, row, len(timed), wrong


def classes(rows: Rows) -> list[Class]:
    def case(row: dict[str, Any]) -> str:
        return row["case"] + (" H2048" if row["shape"].get("H") == 2048 else "")

    return [Class(*found) for found in grouped(rows, case, "dtype", "mode", "timing").items()]


def _classes(rows: Rows) -> str:
    """A line for each class and peer: of both passes the geometric mean and the worst row."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for members in classes(rows):
        case, dtype, mode, timing = members.words
        for peer in sorted({name for row in members.rows for name in row["peers"]}):
            if (found := members.against(peer)) is not None:
                groups.setdefault((case, dtype, timing, peer), {})[mode] = found
    lines = []
    for words, of_modes in groups.items():
        cells = [str(max(found[3] for found in of_modes.values()))]
        for mode in MODES:
            if (found := of_modes.get(mode)) is None:
                cells += [NONE] * 2
                continue
            mean, worst, row, _, wrong = found
            cells += [f"{mean:.2f}x" + (f", {wrong} wrong" if wrong else ""), f"{worst:.2f}x, {_size(row)}"]
        lines.append([*words, *cells])
    heads = ["case", "dtype", "timing", "beside", "rows"]
    return table([*heads, *(f"{mode}: {what}" for mode in MODES for what in ("mean", "worst"))], lines, 5)


def _cases(rows: Rows) -> str:
    """A line for each case, in cells that have both passes; what is timed in two ways is shown cold."""
    peers = [
        name
        for name in dict.fromkeys(name for row in rows for name in row["peers"])
        if any(_shown(row["peers"].get(name)) not in (NONE, "fails") for row in rows)
    ]
    optional = [
        (head, key, form)
        for head, key, form in (("of the floor", "share", ".0%"), ("to random rows", "time_to_random", ".2f"))
        if any(key in row for row in rows)
    ]
    lines = []
    for words, members in grouped(rows, _named, _shape, "dtype").items():
        of_modes: dict[str, dict[str, Any]] = {}
        for row in members:
            if row.get("timing") == "cold" or row["mode"] not in of_modes:
                of_modes[row["mode"]] = row
        forward, both = (of_modes.get(mode, {"ours": {}, "peers": {}}) for mode in MODES)
        errors = forward["ours"].get("error"), both["ours"].get("gradient_error")
        cells = [[_ms(forward), _ms(both)], [number(error, ".0e") for error in errors]]
        cells += [[number(row.get(key), form) for row in (forward, both)] for _, key, form in optional]
        cells += [[_shown(row["peers"].get(peer)) for row in (forward, both)] for peer in peers]
        lines.append([*words, *(NONE if set(cell) == {NONE} else ", ".join(cell) for cell in cells)])
    heads = ["case", "size", "dtype", "ours, ms", "error, of gradients", *(head for head, *_ in optional)]
    return table([*heads, *peers], lines, 3)


def _ms(row: Mapping[str, Any]) -> str:
    """Short times have two digits."""
    time = row["ours"].get("median")
    return number(time, ".2g" if time and time < 1 else ".2f")


def _shown(peer: Mapping[str, Any] | None) -> str:
    if peer is None or peer["status"].startswith("skipped"):
        return NONE
    if "ratio" in peer:
        return f"{peer['ratio']:.2f}x"
    if peer["status"] != "wrong":
        return "fails"
    time = f" ({peer['wrong_ratio']:.2f}x)" if "wrong_ratio" in peer else ""
    return f"wrong by {max(peer['error'], peer['gradient_error'] or 0.0):.0e}{time}"


def _named(row: Mapping[str, Any]) -> str:
    return row["case"] + ("" if row["data"] == "random" else f", {row['data']}")


def _shape(row: Mapping[str, Any]) -> str:
    return " ".join(f"{letter}{size}" for letter, size in row["shape"].items())


def _size(row: Mapping[str, Any]) -> str:
    """Letters that tell the rows of a class from each other."""
    letters = "BH" if "H" in row["shape"] else "BQAD"
    return " ".join(f"{letter}{row['shape'][letter]}" for letter in letters)


def _slower(rows: Rows) -> list[str]:
    """The rows on a GPU in which a peer whose results are right is faster."""
    found: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        for name, peer in row["peers"].items():
            if "timing" in row and round(peer.get("ratio", 1.0), 2) < 1:
                where = f"{_named(row)} {row['dtype']}, {row['mode']}, {row['timing']}, beside {name}"
                found.setdefault(where, []).append((peer["ratio"], _size(row)))
    return [
        f"{where}: " + ", ".join(f"{ratio:.2f}x ({size})" for ratio, size in sorted(slower))
        for where, slower in found.items()
    ]


def faults(rows: Rows) -> list[str]:
    """Rows of which ours is wrong, or failed."""
    found = []
    for row in rows:
        fault, _, why = row["ours"]["status"].partition(": ")
        if fault != "timed":
            where = f"{row['case']} {row['data']} {row['dtype']} {row.get('mode', why)}"
            found.append(f"{fault.upper()}: {where}")
    return found
