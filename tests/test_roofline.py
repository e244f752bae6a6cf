"""The cost model of the LSTM's kernels: by hand, in its limits, in the order it must keep, as a command."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

from typer.testing import CliRunner

from gatematch.bench.__main__ import app
from gatematch.bench.markdown import markdown
from gatematch.bench.predictions import BS, HS, cells, run_roofline, summary
from gatematch.bench.results import read_results
from gatematch.bench.roofline import (
    DTYPES,
    H200,
    HELD,
    Cell,
    costs,
    persistent,
    price,
    resident,
    served,
    step,
    step_wins_from,
    wavefront,
)

DIRECTIONS = ("forward", "backward")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "h200-model" / "roofline.json"


@pytest.fixture(scope="module")
def rows():
    return run_roofline(H200)


def test_a_persistent_cell_by_hand():
    cell = Cell(256, 16)
    assert cell.flops == 2 * 4 * 256 * 256 * 16 == 8_388_608
    assert cell.weights_bytes == 4 * 256 * 256 * 2 == 524_288
    cost = price(H200, cell, "persistent", 16, 16, 16)
    assert cost.weights_shared_bytes == 524_288 and cost.weights_l2_bytes == cost.weights_hbm_bytes == 0
    assert cost.exchange_bytes == 16 * 256 * 16 * 2 + 256 * 16 * 2  # all programs read h, one writes each h
    assert cost.state_bytes == 256 * 16 * (4 * 2 + 4 * 2 + 4 + 2)  # z, gates, cells, y
    clock = 1980  # of a us
    assert cost.product_us == pytest.approx(2 * 64 * 256 * 16 / (989e6 / 132))
    # W, h read and written in bf16, sums written and read in float32: 57344 bytes, 448 clocks.
    assert cost.shared_us == pytest.approx((64 * 256 * 2 + 2 * 256 * 16 * 2 + 2 * 64 * 16 * 4) / 128 / clock)
    assert cost.exchange_us == pytest.approx(256 * 16 * 2 / 64 / clock)  # an SM's own rate, not L2's
    assert cost.elementwise_us == pytest.approx(16 * 16 * 10 / 16 / clock)
    assert cost.barrier_us == pytest.approx(1.2 + 7 * 30 / clock)
    assert cost.us == pytest.approx(cost.exchange_us + cost.shared_us + cost.elementwise_us + cost.barrier_us)
    assert cost.us == pytest.approx(1.678, abs=1e-3) and cost.bound == "barrier"


def test_the_other_kernels_by_hand():
    # resident: 8 reads of h for 512 rows of W, nothing through L2, no grid to wait for
    cost = resident(H200, Cell(128, 64))
    assert (cost.programs, cost.exchange_bytes, cost.launch_us) == (4, 0, 0)
    moved = 512 * 128 * 2 + (8 + 1) * 128 * 16 * 2 + 2 * 512 * 16 * 4
    assert cost.shared_us == pytest.approx(moved / 128 / 1980)
    assert cost.barrier_us == pytest.approx(7 * 30 / 1980)
    # step: 67 MB of W do not stay in L2, so all of it comes from HBM each step
    cost = step(H200, Cell(2048, 1, "tf32"))
    assert cost.weights_hbm_bytes == 4 * 2048 * 2048 * 4 and cost.launch_us == 2.5
    assert cost.weights_us == pytest.approx(67.108864 / 4.8) and cost.us > cost.weights_us + 2.5
    # and 33.5 MB of bfloat16 do
    cost = step(H200, Cell(2048, 1))
    assert cost.weights_hbm_bytes == 0 and cost.weights_us == pytest.approx(33.554432 / 5.5)


def test_backward_reads_one_gate_and_float32_multiplies_three_times():
    forward, backward = (
        price(H200, Cell(512, 16, "tf32", way), "persistent", 16, 16, 32) for way in DIRECTIONS
    )
    read, written = 32 * 512 * 16 * 4, 512 * 16 * 4
    partial = 32 * 64 * 16 * 4  # of 64 units, in float32: written and read
    assert forward.exchange_bytes == read + written
    assert backward.exchange_bytes == read + 4 * written + 2 * partial
    assert backward.barrier_us - forward.barrier_us == pytest.approx(0.6 + 2 * 30 / 1980)
    assert forward.product_us == backward.product_us and forward.state_bytes == backward.state_bytes
    assert forward.shared_us == backward.shared_us
    exact = price(H200, Cell(512, 16, "float32"), "persistent", 16, 16, 32)
    assert exact.product_us == pytest.approx(3 * forward.product_us)
    assert exact.weights_shared_bytes == 3 * forward.weights_shared_bytes
    # step sums over all gates: it reads four times as much as forward
    forward, backward = (price(H200, Cell(512, 16, "tf32", way), "step", 16, 16, 32) for way in DIRECTIONS)
    assert backward.exchange_bytes == 4 * forward.exchange_bytes == 4 * (read + written)


def test_what_does_not_fit_is_streamed():
    whole = price(H200, Cell(1024, 16), "persistent", 16, 16, 64)  # 128 KiB of W in a program
    assert whole.weights_l2_bytes == 0
    part = price(H200, Cell(2048, 16), "persistent", 16, 16, 128)  # 256 KiB, of which 190 stay
    assert part.weights_l2_bytes == 128 * (256 - 190) * 1024 and part.weights_hbm_bytes == 0
    large = price(H200, Cell(2048, 16, "tf32"), "persistent", 16, 16, 128)  # 512 KiB; W is 67 MB
    assert large.weights_hbm_bytes == large.weights_l2_bytes == 128 * (512 - 190) * 1024


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kernels_are_offered_within_their_limits(dtype, direction):
    for H in (
        1,
        16,
        63,
        64,
        65,
        100,
        128,
        129,
        192,
        256,
        257,
        384,
        512,
        513,
        700,
        1024,
        2048,
        4096,
        8448,
        9000,
    ):
        for B in (1, 5, 16, 17, 100, 256, 1000, 4096):
            cell = Cell(H, B, dtype, direction)
            offers = costs(H200, cell)
            alone = {"bfloat16": 128, "tf32": 64, "float32": 64}[dtype]
            assert ("resident" in offers) == (alone >= H)
            assert "step" in offers and ("persistent" in offers) == (H <= 132 * 64)
            for kernel, cost in offers.items():
                assert kernel == "step" or cost.programs <= H200.sms
                assert cost.us >= cost.hbm_us and cost.us >= cost.barrier_us + cost.launch_us
                covered = cost.programs * cost.runs * cost.block_h * cost.block_b
                assert covered >= H * B, (kernel, cell)
    small = replace(H200, shared_kib=100.0)
    assert resident(small, Cell(128, 1)) is None and resident(small, Cell(64, 1)) is not None


def test_weights_and_sums_fit_in_shared_memory():
    for cell in cells():
        cost = persistent(H200, cell)
        streamed = cost.weights_l2_bytes / (cost.programs * cost.runs * {"bfloat16": 2}.get(cell.dtype, 4))
        held = (4 * cost.block_h * cell.H - streamed) * HELD[cell.dtype]
        assert held <= 190 * 1024 and held + 4 * cost.block_h * cost.block_b * 4 <= 227 * 1024


def test_the_chosen_kernel_is_the_cheapest(rows):
    for row in rows:
        times = {kernel: cost["us"] for kernel, cost in row["kernels"].items()}
        assert row["us"] == times[row["chosen"]] == min(times.values())
        assert list(times.values()) == sorted(times.values())
        assert row["kernels"]["step"]["us_without_graph"] == pytest.approx(times["step"] + 3.5, rel=1e-3)


def test_more_units_or_rows_never_cost_less(rows):
    us = {(row["dtype"], row["pass"], row["shape"]["H"], row["shape"]["B"]): row["us"] for row in rows}
    for dtype in DTYPES:
        for direction in DIRECTIONS:
            for B in BS:
                along = [us[dtype, direction, H, B] for H in HS]
                assert along == sorted(along), (dtype, direction, B)
            for H in HS:
                along = [us[dtype, direction, H, B] for B in BS]
                assert along == sorted(along), (dtype, direction, H)
        for H in HS:
            for B in BS:
                assert (
                    us["bfloat16", "forward", H, B]
                    <= us["tf32", "forward", H, B]
                    <= us["float32", "forward", H, B]
                )


def test_measured_rates_can_replace_the_assumed():
    cell = Cell(768, 16)
    faster = replace(H200, grid_barrier_us=0.7)
    assert persistent(H200, cell).us - persistent(faster, cell).us == pytest.approx(0.5)
    assert step_wins_from(replace(H200, grid_barrier_us=100.0), Cell(64, 1)) == 64


def test_step_wins_from_is_where_it_says():
    cell = Cell(64, 256, "tf32")
    first = step_wins_from(H200, cell)
    assert first is not None
    for H, wins in ((first - 64, False), (first, True), (first + 64, True), (4096, True)):
        here = replace(cell, H=H)
        assert (step(H200, here).us < persistent(H200, here).us) == wins
    assert step_wins_from(H200, Cell(64, 1)) is None


def test_a_wavefront_by_hand():
    cell = Cell(256, 16)
    both = replace(cell, layers=2)
    assert both.flops == 3 * cell.flops and both.weights_bytes == 3 * cell.weights_bytes
    apart, together = wavefront(H200, cell)
    # the upper layer's programs take a product twice as wide; both layers' take one barrier
    cost = price(H200, both, "persistent", 16, 16, 32)
    assert cost.exchange_bytes == 3 * 16 * 256 * 16 * 2 + 2 * 256 * 16 * 2
    assert cost.shared_us == pytest.approx(
        (2 * (64 * 256 * 2 + 2 * 256 * 16 * 2) + 2 * 64 * 16 * 4) / 128 / 1980
    )
    assert together == pytest.approx(cost.us * 513 / 512)
    between = 8_388_608 / (0.7 * 989e6)  # the product takes longer than y and z through HBM
    assert between > 5 * 256 * 16 * 2 / 4.8e6
    assert apart == pytest.approx(2 * costs(H200, cell)["persistent"].us + between)
    assert wavefront(H200, Cell(8192, 1)) is None  # 2 x 128 programs are more than there are SMs


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command_prints_every_cell_and_writes_json(tmp_path):
    path = tmp_path / "roofline.json"
    code, output = run("roofline", "--json", path)
    assert code == 0, output
    results = read_results(path)
    assert [row["case"] for row in results["rows"]] == [cell.case for cell in cells()]
    assert len(results["rows"]) == len({row["case"] for row in results["rows"]}) == 3 * 2 * len(HS) * len(BS)
    for cell in cells():
        assert re.search(rf"{cell.dtype} +│ {cell.direction} +│ H{cell.H} B{cell.B} ", output), cell
    assert results["meta"]["device"] == "cpu" and results["meta"]["model"] == asdict(H200)
    assert "nothing is measured" in output
    table = markdown(path)
    assert len(re.findall(r"^\| (?:bfloat16|tf32|float32) ", table, re.M)) == 3 * 2 * len(HS)
    assert table.splitlines()[-1].startswith("A model of one H200, nothing measured, computed on ")


def test_the_command_takes_a_dtype_and_a_direction(tmp_path):
    path = tmp_path / "roofline.json"
    for option, direction in (("--backward", "backward"), ("--forward", "forward")):
        code, output = run("roofline", "--dtype", "tf32", option, "--json", path)
        assert code == 0 and "float32" not in output
        rows = json.loads(path.read_text())["rows"]
        assert {(row["dtype"], row["pass"]) for row in rows} == {("tf32", direction)}
    code, output = run("roofline", "--dtype", "float16")
    assert code == 2 and "--dtype must be of bfloat16, tf32, float32; got 'float16'" in output


def test_it_needs_neither_triton_nor_a_gpu():
    code = "import sys; sys.modules.update(triton=None, torch=None); import gatematch.bench.predictions"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")


def test_the_committed_results_are_those_of_the_model(rows):
    results = read_results(RESULTS)
    assert results["rows"] == rows, (
        "run: gatematch-bench roofline --json bench/results/h200-model/roofline.json"
    )
    assert results["meta"]["model"] == asdict(H200) and results["meta"]["device"] == "cpu"


def test_the_numbers_of_the_document_are_those_of_the_model(rows):
    prose = " ".join((ROOT / "docs" / "design" / "roofline.md").read_text().split())
    gains = {row["case"]: row["wavefront"]["gain"] for row in rows}
    pays, loses = (
        sum(test(gain) for gain in gains.values()) for test in (lambda g: g >= 1.1, lambda g: g < 1)
    )
    assert f"by 10% or more in {pays} of {len(rows)} cells, by {max(gains.values()):.2f}x at most" in prose
    assert f"loses in {loses}" in prose
    middle = [gains[Cell(H, B).case] for H in (128, 256, 512) for B in (1, 16, 64)]
    assert f"{min(middle):.2f}x to {max(middle):.2f}x" in prose
    assert max(gain for case, gain in gains.items() if "H2048" in case) < 1
    for dtype in DTYPES:
        for direction in DIRECTIONS:
            wins = [step_wins_from(H200, Cell(64, B, dtype, direction)) for B in BS]
            assert (
                f"| {dtype} | {direction} | {' | '.join(str(H) if H else 'never' for H in wins)} |" in prose
            )
    published = costs(H200, Cell(768, 16))["persistent"].us
    assert f"the model says {published:.2f}" in prose
    assert len(list(summary(H200, rows))) == 2 * len(DTYPES) * len(DIRECTIONS)


def test_the_kernel_that_serves_is_the_one_that_the_layer_takes():
    pytest.importorskip("triton")
    from gatematch.lstm.selection import Layer, select

    dtypes = {"bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
    for cell in cells():
        precision = "tf32" if cell.dtype == "tf32" else "float32"
        layer = Layer(cell.H, dtypes[cell.dtype], precision, torch.device("cpu"))
        assert served(cell) == select(layer, cell.direction == "backward"), cell


def test_what_the_lstm_document_says_of_the_model(rows):
    text = " ".join((ROOT / "docs" / "design" / "lstm-kernels.md").read_text().split())
    gains = [
        row["wavefront"]["gain"]
        for row in rows
        if (row["dtype"], row["pass"]) == ("bfloat16", "forward")
        and 128 <= row["shape"]["H"] <= 512
        and row["shape"]["B"] <= 64
    ]
    assert f"{min(gains):.2f}x to {max(gains):.1f}x for two layers in bfloat16" in text
    first = step_wins_from(H200, Cell(64, 256))
    assert f"only for large batches forward: from H = {first} on for 256 rows in bfloat16" in text
