"""The lists of kernel configurations, and which of them a launch gets."""

import importlib
import json
import logging
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from gatematch.kernels import config
from gatematch.kernels.config import Config, architecture, choose, shipped

LISTS = sorted(config.CONFIGS.glob("*.json"))
SMALL = Config({"BLOCK_M": 16}, num_warps=2, num_stages=1)
LARGE = Config({"BLOCK_M": 128}, num_warps=8, num_stages=3)


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """A folder of lists of its own for a test, of which nothing is remembered before or after."""

    def entry(dtype, size, tile):
        return {"dtype": dtype, "shape": {"Q": size, "D": 64}, "config": vars(tile), "source": "a test"}

    toy = [entry("float32", 16, SMALL), entry("float32", 1024, LARGE), entry("float16", 4, LARGE)]
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        (tmp_path / f"{arch}.json").write_text(json.dumps({"kernels": {"toy": toy}}))
    caches = (config._choose, config._listed, config.entries)
    monkeypatch.setattr(config, "CONFIGS", tmp_path)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("size", "expected"), [(0, SMALL), (1, SMALL), (127, SMALL), (129, LARGE), (10**9, LARGE)]
)
def test_the_nearest_ratio_decides(lists, size, expected):
    assert choose("toy", "sm_90", torch.float32, {"Q": size, "D": 64, "unlisted": 5}) == expected


def test_only_entries_of_the_dtype_count(lists):
    assert choose("toy", "sm_90", torch.float16, {"Q": 16, "D": 64}) == LARGE
    with pytest.raises(ValueError, match=r"'toy' has no configuration in torch\.float64 for sm_90"):
        choose("toy", "sm_90", torch.float64, {"Q": 16, "D": 64})


def test_an_unknown_kernel_is_named(lists):
    with pytest.raises(ValueError, match="kernel 'other' has no configuration for sm_90"):
        choose("other", "sm_90", torch.float32, {"Q": 16, "D": 64})


@pytest.mark.parametrize(
    ("arch", "nearest"),
    [
        ("sm_75", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_103", "sm_100"),
        ("sm_110", "sm_100"),
        ("sm_120", "sm_80"),
        ("gfx90a", "gfx942"),
        ("gfx1100", "gfx942"),
    ],
)
def test_an_unlisted_architecture_takes_the_nearest_list(lists, caplog, arch, nearest):
    for listed in lists.glob("*.json"):
        if listed.stem != nearest:
            listed.unlink()
    with caplog.at_level(logging.INFO, "gatematch"):
        assert choose("toy", arch, torch.float32, {"Q": 16, "D": 64}) == SMALL
        assert shipped("toy", arch) == shipped("toy", nearest)
    assert caplog.messages == [f"no configurations for {arch}: those of {nearest} are used"]


def test_a_choice_is_logged_once(lists, caplog):
    with caplog.at_level(logging.DEBUG, "gatematch"):
        for _ in range(3):
            choose("toy", "sm_90", torch.float32, {"Q": 20, "D": 64})
    (message,) = caplog.messages
    assert message.startswith("toy in torch.float32 on sm_90 at {'Q': 20, 'D': 64}: Config(")


def test_options_are_those_of_a_launch():
    assert LARGE.numbers == {"BLOCK_M": 128, "num_warps": 8, "num_stages": 3}
    assert LARGE.options == {**LARGE.numbers, "enable_fp_fusion": True}


def test_architectures_are_named_as_compilers_do():
    assert architecture(torch.device("cpu")) == "sm_90"
    properties = SimpleNamespace(major=10, minor=3, gcnArchName="gfx942:sramecc+:xnack-")
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=properties):
        assert architecture(torch.device("cuda", 93)) == "sm_103"
        with mock.patch.object(torch.version, "hip", "6.4"):
            assert architecture(torch.device("cuda", 94)) == "gfx942"
    architecture.cache_clear()


@pytest.mark.parametrize("path", LISTS, ids=[path.stem for path in LISTS])
def test_shipped_lists_are_well_formed(path):
    lists = json.loads(path.read_text())
    assert set(lists) == {"kernels"}
    for kernel, entries in lists["kernels"].items():
        assert {entry["dtype"] for entry in entries} == {"float32", "float16", "bfloat16"}, kernel
        assert len({(entry["dtype"], *entry["shape"].items()) for entry in entries}) == len(entries), kernel
        for entry in entries:
            assert set(entry) == {"dtype", "shape", "config", "source"}
            assert set(entry["config"]) == {"blocks", "num_warps", "num_stages"}
            blocks = entry["config"]["blocks"]
            # Of columns that stay on the chip and blocks that are loaded ahead there may be any number.
            sizes = [size for name, size in blocks.items() if name not in ("RESIDENT", "AHEAD")]
            sizes.append(entry["config"]["num_warps"])
            assert all(size > 0 and size & (size - 1) == 0 for size in sizes), entry
            assert min(entry["shape"].values()) > 0


def test_every_kernel_is_listed_everywhere_and_reported():
    pytest.importorskip("triton")
    pytest.importorskip("rich")
    from triton.runtime.jit import JITFunction

    from gatematch.bench.launches import LAUNCHES

    named_by_file = {
        name
        for path in config.CONFIGS.parent.glob("[!_]*.py")
        for name, value in vars(importlib.import_module(f"gatematch.kernels.{path.stem}")).items()
        if isinstance(value, JITFunction) and f"{name}_".startswith(f"{path.stem}_")
    }
    assert {path.stem for path in LISTS} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for path in LISTS:
        assert set(json.loads(path.read_text())["kernels"]) == named_by_file
    assert named_by_file == set(LAUNCHES)


def test_the_lists_can_be_read_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from gatematch.kernels.config import choose\n"
        "choose('pairwise_fwd', 'sm_90', torch.float32, {'Q': 1, 'A': 1, 'D': 1})"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
