"""The kernels that measure a GPU, in Triton's interpreter: their own checks see what is wrong."""

import pytest
import torch
import triton
import triton.language as tl
from interpreted.cooperative import cooperative
from typer.testing import CliRunner

from gatematch.bench import barrier, expansion
from gatematch.bench.__main__ import app
from gatematch.bench.results import read_results
from gatematch.kernels.distance import TAU

CPU = torch.device("cpu")
VARIANTS = ("barrier", "exchange")
PATHS = {path.name: path for path in expansion.paths()}


def check(variant, programs, seed):
    with cooperative(seed):
        barrier.check(barrier.Setting(variant, programs, 4), 5, CPU, seconds=0.0)


@pytest.mark.parametrize("programs", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_barrier_passes_its_check(variant, programs):
    for seed in range(3):
        check(variant, programs, seed)


@triton.jit
def wait_for_nobody(counter_ptr, PROGRAMS: tl.constexpr):
    pass


@triton.jit
def wait_for_all_but_one(counter_ptr, PROGRAMS: tl.constexpr):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < PROGRAMS - 1:
        pass


@pytest.mark.parametrize("wrong", [wait_for_nobody, wait_for_all_but_one], ids=["nobody", "all but one"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_barrier_that_does_not_wait_for_all_is_caught(variant, wrong, monkeypatch):
    monkeypatch.setattr(barrier, "wait_for", wrong)
    caught = 0
    for seed in range(6):
        try:
            check(variant, 3, seed)
        except RuntimeError as error:
            caught += "passed a barrier before all had arrived" in str(error)
    assert caught >= 3


@pytest.mark.parametrize("name", PATHS)
def test_an_expansion_is_within_its_bound(name):
    row = expansion.measure(PATHS[name], 50, 2, CPU)
    assert expansion.failed([row]) == []
    assert 0 < row["c"] <= 11
    assert row["left"] == row["c"] * 2.0**-24 / (8 * TAU.value)
    rounding = PATHS[name].bound - expansion.BOUND if PATHS[name].dtype != torch.float32 else 0.0
    assert 0 < row["error"] <= row["left"] + rounding + 1e-7
    assert row["near"] > 100 and row["far"] > 1000


@pytest.mark.parametrize("name", ["float32", "float32 prepared", "float32 streamed"])
def test_an_expansion_that_is_less_exact_is_past_its_bound(name, monkeypatch):
    monkeypatch.setattr(expansion, "product_precision", lambda *args: "tf32")
    monkeypatch.setattr(expansion.Path, "parts", 1)
    row = expansion.measure(PATHS[name], 50, 2, CPU)
    assert expansion.failed([row]) == [row]
    assert row["c"] > 100 and row["tau_needed"] > TAU.value


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(expansion, "SIZES", (9,))
    monkeypatch.setattr(expansion, "TILES", 1)
    results = tmp_path / "expansion.json"
    said = CliRunner().invoke(app, ["expansion", "--device", "cpu", "--json", str(results)])
    assert said.exit_code == 0, said.output  # all within their bounds
    rows = read_results(results)["rows"]
    assert [row["case"] for row in rows] == [f"expansion/{name}/D 9" for name in PATHS]
    assert all(f"| {name} | " in said.output for name in PATHS)
