"""What the rows of `speed` say: as a table, and in classes with a mean and a worst row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table


def speed_table(rows: list[dict[str, Any]]) -> Table:
    """Ratio above 1: we are faster."""
    table = Table(title="speed: ours, and each peer's time divided by ours (above 1 we are faster)")
    words = ("case", "data", "shape", "mode", "peers")
    for column in (*words[:4], "ours ms", "± ms", "error", "peak MiB", "of floor", *words[4:], "to random"):
        table.add_column(column, justify="left" if column in words else "right")
    for row in rows:
        ours = row["ours"]
        timed = ours["status"] == "timed"
        table.add_row(
            row["case"] + ("" if row["dtype"] == "float32" else f" {row['dtype']}"),
            row["data"],
            " ".join(f"{letter}{size}" for letter, size in row["shape"].items()),
            row.get("mode", "") + (f", {row['timing']}" if "timing" in row else ""),
            f"{ours['median']:.3f}" if timed else ours["status"].partition(":")[0].upper(),
            f"{ours['spread']:.3f}" if timed else "",
            f"{ours['error']:.0e}" if "error" in ours else "",
            f"{ours['peak_bytes'] / 2**20:.1f}" if timed else "",
            f"{row['share']:.0%}" if "share" in row else "",
            "\n".join(_peer(name, peer) for name, peer in row["peers"].items()),
            f"{row['time_to_random']:.2f}" if "time_to_random" in row else "",
        )
    return table


def _peer(name: str, peer: dict[str, Any]) -> str:
    if "ratio" in peer:
        return f"{name} {peer['ratio']:.2f}x"
    if peer["status"] == "wrong":
        time = f" ({peer['wrong_ratio']:.2f}x)" if "wrong_ratio" in peer else ""
        return f"{name} wrong by {peer['error']:.0e}{time}"
    return f"{name} {peer['status']}"


@dataclass(frozen=True)
class Class:
    """Rows that share a claim: all of a CPU's; on a GPU those of a case, dtype, pass and way of timing.

    Hidden sizes of 2048, where the weights of an LSTM do not fit the chip, are a class of their own.
    """

    words: tuple[str, ...]  # case, dtype, pass, way of timing; () on a CPU
    rows: list[dict[str, Any]]

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

    @property
    def peers(self) -> list[str]:
        return sorted({name for row in self.rows for name in row["peers"]})

    @property
    def share(self) -> float | None:
        """The least share of the floor."""
        return min((row["share"] for row in self.rows if "share" in row), default=None)


def classes(rows: list[dict[str, Any]]) -> list[Class]:
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        words: tuple[str, ...] = ()
        if "timing" in row:
            large = " H2048" if row["shape"].get("H") == 2048 else ""
            words = row["case"] + large, row["dtype"], row["mode"], row["timing"]
        found.setdefault(words, []).append(row)
    return [Class(words, members) for words, members in found.items()]


def speed_summary(rows: list[dict[str, Any]]) -> list[str]:
    """For each class and peer the mean and the worst ratio; what other data cost, and what was wrong."""
    lines = []
    for members in classes(rows):
        title = " ".join([*members.words, ""])
        for name in members.peers:
            if (found := members.against(name)) is not None:
                mean, worst, row, number, wrong = found
                but = f", {wrong} of them wrong" if wrong else ""
                where = " ".join(f"{letter}{size}" for letter, size in row["shape"].items())
                lines.append(
                    f"{title}{name}: {mean:.2f}x over {number} rows{but}, worst {worst:.2f}x "
                    f"({row['case']} {row['data']} {row['mode']} {where})"
                )
        if members.share is not None:
            lines.append(f"{title}at least {members.share:.0%} of the floor")
    slower = [row for row in rows if "time_to_random" in row]
    if slower:
        worst_row = max(slower, key=lambda row: row["time_to_random"])
        lines.append(
            f"text and offset rows: at most {worst_row['time_to_random']:.2f}x the time of random rows"
            f" ({worst_row['case']} {worst_row['data']} {worst_row['mode']})"
        )
    return lines + faults(rows)


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of which ours is wrong, or failed."""
    found = []
    for row in rows:
        fault, _, why = row["ours"]["status"].partition(": ")
        if fault != "timed":
            where = f"{row['case']} {row['data']} {row['dtype']} {row.get('mode', why)}"
            found.append(f"{fault.upper()}: {where}")
    return found
