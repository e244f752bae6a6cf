"""Choosing configurations: the search and the file that it writes, with made-up times."""

import json
import math
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from typer.testing import CliRunner

from gatematch.bench import tune
from gatematch.bench.__main__ import app
from gatematch.bench.launches import LAUNCHES, Sample
from gatematch.kernels import config
from gatematch.kernels.config import Config

START = Config({"BLOCK_M": 64, "BLOCK_N": 16}, num_warps=4, num_stages=1)


def test_neighbours_are_one_step_away():
    options = [neighbour.options for neighbour in tune.neighbours(START)]
    steps = [{name: size for name, size in o.items() if START.options[name] != size} for o in options]
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
        {name: size for name, size in neighbour.blocks.items() if size != tile.blocks[name]}
        for neighbour in tune.neighbours(tile)
    ]
    wanted = [{"BLOCK_K": 512}, {"AHEAD": 2}, {"AHEAD": 8}, {"RESIDENT": 2048}, {"RESIDENT": 8192}]
    assert [change for change in changed if change] == wanted


def test_the_search_climbs_to_the_best_and_asks_once():
    asked = []

    def cost(tile):
        asked.append(str(tile.options))
        return 1 + abs(math.log2(tile.blocks["BLOCK_N"] / 128)) + abs(tile.num_stages - 3)

    best, lowest = tune.climb(START, cost)
    assert lowest == 1
    assert best == Config({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=4, num_stages=3)
    assert len(asked) == len(set(asked))


def test_the_search_leaves_what_fails_and_ignores_noise():
    assert tune.climb(START, lambda tile: 1.0 if tile == START else 0.99) == (START, 1.0)
    assert tune.climb(START, lambda tile: 5.0 if tile.num_warps == 8 else math.inf)[1] == 5.0
    assert tune.climb(START, lambda tile: math.inf) == (START, math.inf)


def test_wrong_and_failing_candidates_cost_infinity():
    def launches(sample):
        def call():
            warps = config.choose("toy", "sm_90", sample.dtype, {}).num_warps
            if warps == 8:
                raise RuntimeError("out of registers")
            return torch.full((4,), 1 + 1e-3 * (warps == 2)), None

        return call

    sample = Sample(torch.float32, {}, 0)
    with mock.patch.dict(LAUNCHES, {"toy": launches}), mock.patch.object(tune, "do_bench", return_value=0.5):
        cost = tune.milliseconds("toy", sample, START)
        warps = {candidate.num_warps: cost(candidate) for candidate in tune.neighbours(START)}
    assert warps == {4: 0.5, 2: math.inf, 8: math.inf}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_lists_are_written_as_they_are_read(arch):
    text = (config.CONFIGS / f"{arch}.json").read_text()
    assert tune.formatted(json.loads(text)["kernels"]) == text


def test_the_entries_found_are_written_and_the_others_kept(tmp_path):
    def cost(kernel, sample, shipped):
        return lambda tile: 2.0 if tile.num_warps == 8 else 3.0

    said = []
    with (
        mock.patch.object(config, "architecture", return_value="sm_90"),
        mock.patch.object(tune, "milliseconds", cost),
        mock.patch.object(tune, "describe_machine", return_value={"device": "a GPU", "commit": "abc"}),
    ):
        out = tune.run_tune(
            torch.device("cuda"), "pairwise_fwd/sm_90/bfloat16", tmp_path / "a.json", said.append
        )
    found, before = json.loads(out.read_text())["kernels"], config.entries("sm_90")
    changed = [
        (kernel, new)
        for kernel, entries in found.items()
        for new, old in zip(entries, before[kernel], strict=True)
        if new != old
    ]
    assert {(kernel, new["dtype"], new["config"]["num_warps"]) for kernel, new in changed} == {
        ("pairwise_fwd", "bfloat16", 8)
    }
    assert all(new["source"].startswith("2.0000 ms on a GPU, 20") for _, new in changed)
    assert "3.0000 -> 2.0000 ms with {" in said[0]


@pytest.mark.parametrize("device", ["cpu", "nothing"])
def test_a_gpu_is_needed(device):
    result = CliRunner().invoke(app, ["tune", "--device", device])
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
