"""What a row of `speed` on a GPU could take at least, beside what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .problems import Work
from .roofline import H200, Cell, Device, costs


def add_floors(row: dict[str, Any], work: Work | None, rates: Mapping[str, float] | None) -> None:
    """Achieved rates and shares of what the device does at best; of an LSTM, the time of a step, too."""
    seconds = row["ours"]["median"] / 1e3
    if row["case"] == "lstm/single":
        row["us_per_step"] = seconds * 1e6 / row["shape"]["T"]
        row["model_us_per_step"] = model_us_per_step(row, rates)
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


def model_us_per_step(row: Mapping[str, Any], rates: Mapping[str, float] | None) -> float | None:
    """By the model of roofline.py, with measured rates where there are some, for the kernels that served the
    row; None where by the model one of them could not have."""
    device = measured(H200, rates) if rates else H200
    dtype = "bfloat16" if row["dtype"] == "float16" else row["dtype"]
    total = 0.0
    for name in row["configs"]:
        kernel, _, way = name.removeprefix("lstm_").partition("_")
        direction = {"fwd": "forward", "bwd": "backward"}[way]
        offers = costs(device, Cell(row["shape"]["H"], row["shape"]["B"], dtype, direction))
        if kernel not in offers:
            return None
        total += offers[kernel].us
    return total


def measured(device: Device, rates: Mapping[str, float]) -> Device:
    return replace(
        device,
        bfloat16_tflops=rates["bfloat16_flops"] / 1e12,
        tf32_tflops=rates["tf32_flops"] / 1e12,
        hbm_tb_s=rates["bytes"] / 1e12,
        mufu_clock=rates["specials"] / device.sms / device.clock_ghz / 1e9,
    )
