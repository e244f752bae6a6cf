"""Choosing configurations: the search and the file that it writes, with made-up times."""

import json
import math
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from typer.testing import CliRunner

from gatematch.bench import console, tune
from gatematch.bench.__main__ import app
from gatematch.bench.launches import LAUNCHES, Sample, entries, served
from gatematch.bench.results import read_results
from gatematch.kernels import config
from gatematch.kernels.config import Config

START = Config({"BLOCK_M": 64, "BLOCK_N": 16}, num_warps=4, num_stages=1)


def test_neighbours_are_one_step_away():
    options = [neighbour.numbers for neighbour in tune.neighbours(START)]
    steps = [{name: size for name, size in o.items() if START.numbers[name] != size} for o in options]
    assert steps == [
        {"BLOCK_M": 32},
        {"BLOCK_M": 128},
        {"BLOCK_N": 32},
        {"num_warps": 2},
        {"num_warps": 8},
        {"num_stages": 2},
    ]


def test_counts_have_neighbours_below_the_least_side_of_a_tile():
    tile = Config({"BLOCK_K": 1024, "AHEAD": 4, "RESIDENT": 4096}, num_warps=1, num_stages=1)
    changed = [
        set(neighbour.blocks.items()) - set(tile.blocks.items()) for neighbour in tune.neighbours(tile)
    ]
    assert [change.pop() for change in changed if change] == [
        ("BLOCK_K", 512), ("AHEAD", 2), ("AHEAD", 8), ("RESIDENT", 2048), ("RESIDENT", 8192),
    ]  # fmt: skip


def climb(cost, able=list, late=lambda: False):
    return tune.climb(START, cost, able, late)


def test_the_search_climbs_to_the_best_and_asks_once():
    asked = []

    def cost(tile):
        asked.append(str(tile.numbers))
        return 1 + abs(math.log2(tile.blocks["BLOCK_N"] / 128)) + abs(tile.num_stages - 3)

    best, before, after, candidates = climb(cost)
    assert (before, after) == (6, 1)
    assert best == Config({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=4, num_stages=3)
    assert len(asked) == len(set(asked)) == candidates + 1


def test_the_search_leaves_what_fails_and_ignores_noise():
    assert climb(lambda tile: 1.0 if tile == START else 0.99) == (START, 1.0, 1.0, 6)
    assert climb(lambda tile: 5.0 if tile.num_warps == 8 else math.inf)[1:3] == (math.inf, 5.0)
    assert climb(lambda tile: math.inf) == (START, math.inf, math.inf, 6)


def test_what_is_timed_next_is_compiled_at_once_and_timed_if_it_can_be():
    log = []

    def able(tiles):
        log.append([tile.num_warps for tile in tiles])
        return [tile for tile in tiles if tile.num_warps != 2]

    def cost(tile):
        log.append(tile.num_warps)
        return 10 - tile.num_warps  # that of 2 would be dear too, but it is never asked

    best = climb(cost, able).best
    assert best.num_warps == 16
    assert log[0] == [4, 4, 4, 4, 2, 8, 4] and log[1:7] == [4, 4, 4, 4, 8, 4]
    assert log[7] == [8, 8, 8, 16, 8]
    assert 2 not in log


@pytest.mark.parametrize(
    ("timed", "warps", "after", "candidates"),
    [(1, 4, 3.0, 0), (6, 8, 2.0, 5)],
)
def test_the_search_ends_in_time_with_the_best_so_far(timed, warps, after, candidates):
    asked = []

    def cost(tile):
        asked.append(tile)
        return {8: 2.0, 16: 1.0}.get(tile.num_warps, 3.0)

    found = climb(cost, late=lambda: len(asked) >= timed)
    assert (found.best.num_warps, *found[1:]) == (warps, 3.0, after, candidates)


def test_no_time_finds_nothing():
    assert climb(lambda tile: 1.0, late=lambda: True) is None


class Pool:
    """A pool whose workers compile at once, but crash on 8 warps and never end on 2."""

    made = 0

    def __init__(self, jobs):
        Pool.made += 1
        self.broken = False
        self.waiting = []

    def submit(self, function, kernel, arch, sample, tile):
        if self.broken:
            raise BrokenProcessPool("crashed")
        future = Future()
        if tile.num_warps == 8:
            self.broken = True
            for lost in [*self.waiting, future]:
                lost.set_exception(BrokenProcessPool("crashed"))
        elif tile.num_warps == 2:
            self.waiting.append(future)
        else:
            future.set_result(None)
        return future

    def shutdown(self, cancel_futures):
        assert cancel_futures


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(tune, "workers", Pool)
    monkeypatch.setattr(Pool, "made", 0)


def warps(*numbers):
    return [Config({}, num_warps, num_stages=1) for num_warps in numbers]


def test_a_crash_of_the_compiler_costs_only_what_it_crashed_on(pool):
    with tune.Compiler(2, math.inf) as compiler:
        able = compiler.compile_all("toy", "sm_90", None, warps(1, 4, 8, 16, 32))
        assert able == warps(1, 4, 16, 32)
        assert Pool.made == 3
        assert compiler.compile_all("toy", "sm_90", None, warps(4)) == warps(4)


def test_nothing_waits_for_the_compiler_when_time_is_up(pool):
    with tune.Compiler(2, time.monotonic() + 0.1) as compiler:
        assert compiler.compile_all("toy", "sm_90", None, warps(1, 2, 4)) == warps(1, 4)
        assert compiler.late()
        assert compiler.compile_all("toy", "sm_90", None, warps(1)) == []


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_entry_is_timed_on_what_its_kernel_serves(arch):
    for entry in entries([arch], ""):
        sample = tune.timed_sample(entry, torch.device("cuda:1"))
        assert served(entry.kernel, arch, sample), entry
        assert sample.device == "cuda:1"
        assert tune.compiled_sample(sample).device == "cpu"


def test_wrong_failing_and_spilling_candidates_cost_infinity():
    def launches(sample):
        def call():
            warps = config.choose("toy", "sm_90", sample.dtype, {}).num_warps
            if warps == 8:
                raise RuntimeError("out of registers")
            return torch.full((4,), 1 + 1e-3 * (warps == 2)), None

        return call

    def spills(call):
        return call(), int(config.choose("toy", "sm_90", torch.float32, {}).num_stages == 2)

    sample = Sample(torch.float32, {}, 0)
    with (
        mock.patch.dict(LAUNCHES, {"toy": launches}),
        mock.patch.object(tune, "do_bench", return_value=0.5),
        mock.patch.object(tune, "_spills", spills),
    ):
        cost = tune.milliseconds("toy", sample, START)
        costs = {(tile.num_warps, tile.num_stages): cost(tile) for tile in tune.neighbours(START)}
    assert costs == {(4, 1): 0.5, (2, 1): math.inf, (8, 1): math.inf, (4, 2): math.inf}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_lists_are_written_as_they_are_read(arch):
    text = (config.CONFIGS / f"{arch}.json").read_text()
    assert tune.formatted(json.loads(text)["kernels"]) == text


def tuned(cost, folder, *options, late=lambda self: False, pattern="pairwise_bwd_near"):
    """`tune` with made-up costs: what it said, and the entries that it changed."""
    out = folder / "a.json"
    with (
        mock.patch.object(console, "usable_device", return_value=torch.device("cuda")),
        mock.patch.object(config, "architecture", return_value="sm_90"),
        mock.patch.object(tune, "milliseconds", lambda kernel, sample, shipped: cost),
        mock.patch.object(tune, "describe_machine", return_value={"device": "a GPU", "commit": "abc"}),
        mock.patch.object(tune.Compiler, "compile_all", lambda self, kernel, arch, sample, tiles: tiles),
        mock.patch.object(tune.Compiler, "late", late),
    ):
        arguments = [
            "tune",
            "--filter",
            pattern,
            "--out",
            str(out),
            "--json",
            str(folder / "b.json"),
            *options,
        ]
        said = CliRunner().invoke(app, arguments)
    if not out.exists():
        return said.output, None
    found, before = json.loads(out.read_text())["kernels"], config.entries("sm_90")
    changed = [
        (kernel, new)
        for kernel, entries in found.items()
        for new, old in zip(entries, before[kernel], strict=True)
        if new != old
    ]
    return said.output, changed


def test_what_was_found_is_written_and_the_other_entries_are_kept(pool, tmp_path):
    def cost(tile):
        return 2.0 if tile.num_warps == 4 else math.inf  # the shipped one spills

    pattern = "pairwise_bwd_near/sm_90/bfloat16"
    said, [(kernel, new)] = tuned(cost, tmp_path, pattern=pattern)
    assert said.endswith(f"configurations: {tmp_path / 'a.json'}\nresults: {tmp_path / 'b.json'}\n")
    assert "inf -> 2.0000 ms with {" in said
    assert (kernel, new["dtype"], new["config"]["num_warps"]) == ("pairwise_bwd_near", "bfloat16", 4)
    assert new["source"].startswith("2.0000 ms on a GPU, 20")
    results = read_results(tmp_path / "b.json")
    (row,) = results["rows"]
    (entry,) = entries(["sm_90"], pattern)
    assert results["meta"]["device"] == "a GPU"
    assert row == {
        "case": "tune/pairwise_bwd_near/sm_90/bfloat16/Q=512,A=512,D=300",
        "kernel": "pairwise_bwd_near",
        "arch": "sm_90",
        "dtype": "bfloat16",
        "shape": {"Q": 512, "A": 512, "D": 300},
        "before_ms": None,
        "after_ms": 2.0,
        "candidates": row["candidates"],
        "config_before": entry.tile.numbers,
        "config_after": {**entry.tile.numbers, "num_warps": 4},
    }
    assert row["candidates"] > 10


def test_an_entry_that_nothing_was_found_for_keeps_its_source(pool, tmp_path):
    said, changed = tuned(lambda tile: math.inf, tmp_path)
    assert said.count(" -> ") == 3 and changed == []


def test_a_kill_loses_one_entry(pool, tmp_path):
    timed = []

    def cost(tile):
        timed.append(tile)
        if len(timed) == 12:
            raise KeyboardInterrupt
        return 2.0 if tile == timed[0] else 3.0

    _, changed = tuned(cost, tmp_path)
    assert [new["source"][:9] for _, new in changed] == ["2.0000 ms"]
    assert len(read_results(tmp_path / "b.json")["rows"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_entries_that_were_not_reached_keep_their_source(pool, tmp_path):
    timed = []

    def cost(tile):
        timed.append(tile)
        return 3.0

    said, changed = tuned(cost, tmp_path, "--minutes", "0.5", late=lambda self: len(timed) >= 3)
    assert [new["source"][:9] for _, new in changed] == ["3.0000 ms"]
    assert "0.5 minutes are over: 2 of 3 entries are left as they were" in said
    said, changed = tuned(cost, tmp_path / "none", "--minutes", "0.01", late=lambda self: True)
    assert said == "Error: --minutes must be enough to time one configuration; got 0.01\n" and changed is None


@pytest.mark.parametrize("device", ["cpu", "nothing"])
def test_a_gpu_is_needed(device):
    result = CliRunner().invoke(app, ["tune", "--device", device])
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1


def test_inputs_have_near_rows_apart_and_lengths_of_all_kinds():
    """Equal rows alone would leave the slopes of near pairs at 0, and full lengths the masks untried."""
    sample = Sample(torch.float32, {"Q": 40, "A": 50}, features=30, batch=3)
    squares = torch.cdist(sample.rows("Q"), sample.rows("A")).square().flatten()
    assert (squares == 0).any() and ((squares > 0) & (squares < 1)).sum() > 30 and (squares > 10).any()
    assert sample.lengths("Q").tolist() == [40, 27, 13]
