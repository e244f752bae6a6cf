"""Every kernel in other tiles than the shipped ones: what `gatematch-bench tune` tries is as right."""

import contextlib
import dataclasses

import pytest
import torch
from interpreted.cooperative import cooperative
from triton.runtime.errors import InterpreterError

from gatematch.bench import sanitizer
from gatematch.bench.launches import LAUNCHES, launched_with
from gatematch.bench.tune import TOLERANCE
from gatematch.kernels import config, launch

torch.set_num_threads(1)


def results(kernel, call, tile):
    with launched_with(kernel, tile), cooperative(0) if "persistent" in kernel else contextlib.nullcontext():
        return call()


def cases():
    """The first case of each kernel, and one of few features and with all that a gradient may come with."""
    seen = set()
    for kernel, sample in sanitizer.cases("sm_90", "cpu"):
        few = sample.features == 7
        sample = dataclasses.replace(sample, training=not few)
        case = f"{kernel} of {'few' if few else 'many'}"
        if case not in seen:
            seen.add(case)
            yield pytest.param(kernel, sample, id=case)


@pytest.mark.parametrize(("kernel", "sample"), list(cases()))
def test_tiles_of_any_size_are_right_or_refused(kernel, sample):
    """The least, and each size at its largest: a kernel asserts what it relies on, or does without."""
    shipped = config.shipped(kernel, "sm_90")[0][2]
    tiles = [{name: 32 if name.startswith("BLOCK_") else 1 for name in shipped.blocks}]
    tiles += [{**shipped.blocks, name: 256} for name in shipped.blocks if name.startswith("BLOCK_")]
    call = LAUNCHES[kernel](sample)
    want = results(kernel, call, shipped)
    for blocks in tiles:
        try:
            got = results(kernel, call, dataclasses.replace(shipped, blocks=blocks))
        except InterpreterError as error:
            assert "AssertionError" in str(error), (blocks, error)  # of a static_assert
            continue
        for x, y in zip(got, want, strict=True):
            assert (x is None) == (y is None)
            if x is not None and x.numel() > 0:
                assert (x - y).abs().max() <= TOLERANCE[sample.dtype] * y.abs().max(), blocks


@pytest.mark.parametrize("sizes", [(1, 2**31, 3), (1, 2, 2**23)])
def test_more_than_32_bits_count_is_refused(sizes):
    with pytest.raises(ValueError, match=r"up to 2146435072 rows of up to 4194304 features, got \(1, "):
        launch.rows(torch.zeros(1).expand(sizes))
