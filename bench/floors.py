"""What a row of `speed` on a GPU could take at least, beside what it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .problems import Work


def add_floors(row: dict[str, Any], work: Work | None, rates: Mapping[str, float] | None) -> None:
    """Achieved rates and shares of what the device does at best; of an LSTM, the time of a step, too."""
    seconds = row["ours"]["median"] / 1e3
    if row["case"] == "lstm/single":
        row["us_per_step"] = seconds * 1e6 / row["shape"]["T"]
    if work is None or rates is None:
        return
    row["floors_ms"] = floors(work, rates)
    row["share"] = max(row["floors_ms"].values()) / row["ours"]["median"]
    row["achieved"] = {"bytes_per_s": work.bytes / seconds, "flops_per_s": work.flops / seconds}


def floors(work: Work, rates: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds that each of memory, tensor cores and special functions would need alone."""
    return {
        "memory": work.bytes / rates["bytes"] * 1e3,
        "product": work.flops / rates[f"{work.product}_flops"] * 1e3,
        "specials": work.specials / rates["specials"] * 1e3,
    }
