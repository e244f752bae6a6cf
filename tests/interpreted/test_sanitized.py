"""What compute-sanitizer is to watch on a GPU, in Triton's interpreter: no access outside of a tensor."""

import contextlib
import itertools

import pytest
import torch
from interpreted.cooperative import cooperative
from triton.runtime.errors import InterpreterError

from gatematch.bench import sanitizer
from gatematch.bench.launches import LAUNCHES

torch.set_num_threads(1)


def cases():
    """The first case of each kernel."""
    for kernel, group in itertools.groupby(sanitizer.cases("sm_90", "cpu"), key=lambda case: case[0]):
        yield pytest.param(*next(group), id=kernel)


@pytest.mark.parametrize(("kernel", "sample"), list(cases()))
def test_launches(kernel, sample):
    with cooperative(seed=0) if "persistent" in kernel else contextlib.nullcontext():
        results = LAUNCHES[kernel](sample)()
    assert all(x is None or x.isfinite().all() for x in results)


def test_the_planted_store_is_outside():
    with pytest.raises(InterpreterError, match="masked_store"):
        sanitizer.plant("memcheck", "cpu")
