"""Every kernel in every shipped configuration, compiled for GPUs that this machine need not have."""

import dataclasses
import itertools
import re
import traceback
from collections import defaultdict
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("rich")
import triton.language as tl  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402
from triton.compiler.errors import CompilationError  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from gatematch.bench.__main__ import app  # noqa: E402
from gatematch.bench.kernels import ARCHITECTURES, compiled, faults, kernel_rows, run_kernels  # noqa: E402
from gatematch.bench.launches import LAUNCHES, Sample, entries, launched_with, samples, served  # noqa: E402
from gatematch.bench.results import read_results  # noqa: E402
from gatematch.kernels import config, pairwise_prepare  # noqa: E402
from gatematch.kernels.config import Config  # noqa: E402

# Register allocation changes from version to version; this is the one of constraints.txt.
GATED = "3.6.0"


def listed(kernel, arch, dtype):
    return [
        (entry["shape"], entry["config"]) for entry in config.entries(arch)[kernel] if entry["dtype"] == dtype
    ]


def launches(kernel, arch, dtype, quick):
    """Every configuration on one sample, and the first on all of them; of AMD's, only reported, the first."""
    amd = arch.startswith("gfx")
    for n, entry in enumerate(entries([arch], f"^{kernel}/{arch}/{dtype}$")):
        chosen = (
            sample for sample in samples(kernel, entry.dtype, entry.shape) if served(kernel, arch, sample)
        )
        for sample in itertools.islice(chosen, 1 if quick or amd or n else None):
            yield kernel, arch, sample, entry.tile
        if amd:
            break


def shipped_dtypes():
    for arch in ARCHITECTURES:
        for kernel in LAUNCHES:
            for dtype in ("float32", "bfloat16", "float16"):
                if kernel not in config.entries(arch):
                    continue
                # Of 16-bit layers in the same tiles, which take most of the time, one dtype stands for both.
                twin = kernel.startswith("lstm_") and dtype == "float16"
                if twin and listed(kernel, arch, "float16") == listed(kernel, arch, "bfloat16"):
                    continue
                yield pytest.param(kernel, arch, dtype, False, marks=pytest.mark.slow)
                # Recurrent kernels have one for each hidden size: test_lstm_compile.py has the quick ones.
                if arch == "sm_90" and dtype == "float32" and not kernel.startswith("lstm_"):
                    yield kernel, arch, dtype, True


@pytest.mark.parametrize(("kernel", "arch", "dtype", "quick"), list(shipped_dtypes()))
def test_shipped_configurations(kernel, arch, dtype, quick, record_property):
    rows = [row for launch in launches(kernel, arch, dtype, quick) for row in kernel_rows(*launch)]
    record_property("spills", {row["case"]: row["spills"] for row in rows})
    assert {row["kernel"] for row in rows} == {kernel}
    if triton.__version__ != GATED:
        spills = sum(row["spills"] for row in rows)
        pytest.skip(f"{spills} spills in Triton {triton.__version__}; they count in {GATED} alone")
    assert not {row["case"]: found for row in rows if (found := faults(row))}


@pytest.mark.parametrize("kernel", LAUNCHES)
def test_every_launch_asks_for_fma(kernel, monkeypatch):
    asked = []
    monkeypatch.setattr(
        JITFunction, "run", lambda *args, enable_fp_fusion=False, **options: asked.append(enable_fp_fusion)
    )
    monkeypatch.setattr(config, "architecture", lambda device: "sm_90")
    entry = next(iter(entries(["sm_90"], f"^{kernel}/")))
    LAUNCHES[kernel](next(samples(kernel, entry.dtype, entry.shape)))()
    assert asked and all(asked)


@pytest.mark.parametrize(
    ("kernel", "sized_by"),
    [
        ("pairwise_bwd_near", "pairwise_bwd"),
        ("pairwise_stream_fwd", "pairwise_stream_fwd"),
        ("pairwise_stream_bwd", "pairwise_stream_bwd"),
    ],
)
def test_tiles_narrower_than_their_bit_do_not_compile(kernel, sized_by):
    """A second walk in steps of 32 columns would lose the near pairs of every other tile of 16."""
    (entry, *_) = entries(["sm_90"], f"^{sized_by}/sm_90/bfloat16$")
    tile = dataclasses.replace(entry.tile, blocks={**entry.tile.blocks, "BLOCK_N": 16})
    sample = next(samples(kernel, entry.dtype, {"Q": 300, "A": 300, **entry.shape}))
    with launched_with(sized_by, tile), pytest.raises(CompilationError) as raised:
        compiled(kernel, "sm_90", lambda: LAUNCHES[kernel](sample)())
    assert "whole groups of NEAR columns" in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["pairwise_stream_fwd", "pairwise_stream_bwd"])
def test_both_walks_add_up_a_product_in_the_same_order(kernel, dtype, arch):
    """Instructions for one kind of numbers all take as many features: then no width of a tile matters."""
    (entry, *_) = entries([arch], f"^{kernel}/{arch}/{dtype}$")
    sample = next(samples(kernel, entry.dtype, entry.shape))
    with launched_with(kernel, entry.tile):
        binaries = compiled(kernel, arch, lambda: LAUNCHES[kernel](sample)())
    for binary in binaries:
        depths = defaultdict(set)
        for _, k, kind in re.findall(r"mma\S*\.m\d+n(\d+)k(\d+)((?:\.\w+)+)", binary.asm["ptx"]):
            depths[kind].add(int(k))
        assert depths and all(len(found) == 1 for found in depths.values()), depths


# What the report must see, in kernels of a few lines.


@triton.jit(do_not_specialize=["stride"])
def toy(
    x_ptr, y_ptr, mask_ptr, size, stride, scale, wide: tl.int64, SIZE: tl.constexpr, PRECISION: tl.constexpr
):
    i = tl.arange(0, SIZE)
    at = i[:, None] * stride + i[None, :]
    x = tl.load(x_ptr + at)
    y = tl.load(x_ptr + at + size + wide)
    if mask_ptr is not None:
        y *= tl.load(mask_ptr)
    if PRECISION is not None:
        x = tl.dot(x, y, input_precision=PRECISION)
    tl.store(y_ptr + at, (scale * x).to(y_ptr.dtype.element_ty))


def toy_row(size, precision, arch="sm_90", warps=4, dtype=torch.float32):
    def launch(sample):
        tile = config.choose("toy", arch, dtype, {})
        x = sample.normal(128, 128)
        args = (x, torch.empty_like(x), None, 1, 128, 0.5, 1)
        return lambda: toy[(1,)](*args, PRECISION=precision, **tile.options)

    sample = Sample(dtype, {}, 0)
    with mock.patch.dict(LAUNCHES, {"toy": launch}):
        (row,) = kernel_rows("toy", arch, sample, Config({"SIZE": size}, num_warps=warps, num_stages=2))
    return row


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_product_on_tensor_cores(arch):
    row = toy_row(64, "tf32", arch, dtype=torch.bfloat16)
    assert row["tensor_core_products"] == 1
    assert row["tensor_core_instructions"] > 0
    assert 0 < row["registers"] <= 512
    assert row["instructions"] > 50
    assert row["spills"] == row["stack_bytes"] == 0
    assert 0 < row["shared_bytes"] < row["shared_limit"]
    assert faults(row) == []


@pytest.mark.parametrize(("precision", "products"), [(None, 0), ("ieee", 0), ("tf32", 1)])
def test_only_products_of_full_precision_do_without_tensor_cores(precision, products):
    row = toy_row(32, precision)
    assert row["tensor_core_products"] == products
    assert (row["tensor_core_instructions"] > 0) == (products > 0)
    assert faults(row) == []


def test_spills_and_too_much_shared_memory_are_faults():
    row = toy_row(64, "tf32x3", warps=2)
    assert row["spills"] > 0
    assert "spills" in faults(row)[0]
    row = {**row, "spills": 0, "stack_bytes": 0, "shared_bytes": 228 * 1024, "tensor_core_instructions": 0}
    assert faults(row) == [
        "233472 bytes of shared memory, and there are 232448",
        "no tensor-core instruction",
    ]
    assert faults({**row, "arch": "gfx942"}) == []


def test_the_launch_is_specialised_as_on_a_gpu():
    with mock.patch("gatematch.bench.kernels._row") as row:
        toy_row(32, None)
    source = row.call_args.args[-1].src
    assert source.signature == {
        "x_ptr": "*fp32",
        "y_ptr": "*fp32",
        "mask_ptr": "constexpr",
        "size": "constexpr",  # 1 is compiled in, unless told not to
        "stride": "i32",
        "scale": "fp32",
        "wide": "i64",
        "SIZE": "constexpr",
        "PRECISION": "constexpr",
    }
    aligned = [path for path, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes]
    assert aligned == [(0,), (1,)]


def test_a_row_says_what_differs():
    row = toy_row(32, None)
    assert row["variant"] == "no mask_ptr, size=1, no PRECISION"
    assert row["case"] == f"kernels/toy/sm_90/float32/SIZE=32, num_warps=4, num_stages=2/{row['variant']}"
    assert row["config"] == {"SIZE": 32, "num_warps": 4, "num_stages": 2}


def on_a_device(launch):
    """Launches as on an sm_90, with Triton's own driver of it, up to where the GPU itself comes in."""
    device = object.__new__(CudaDriver)
    device.get_current_device = lambda: 0
    device.get_device_capability = lambda device: (9, 0)
    device.get_current_stream = lambda device: 0
    run = JITFunction.run

    def found(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    with mock.patch.object(driver, "_active", device), mock.patch.object(JITFunction, "run", found):
        launch()


def test_what_workers_have_compiled_is_compiled_no_more(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, pattern = pairwise_prepare.pairwise_prepare, "^pairwise_prepare/sm_90/bfloat16$"
    (entry,) = entries(["sm_90"], pattern)
    sample = Sample(entry.dtype, entry.shape, entry.shape["D"])
    two = [sample, dataclasses.replace(sample, with_lengths=False)]
    monkeypatch.setattr("gatematch.bench.kernels.samples", lambda *entry: two)
    rows = run_kernels(["sm_90"], pattern, jobs=2)
    assert ["no x_lengths_ptr" in row["variant"] for row in rows] == [False, True]
    hits = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **event: hits.append(event["cache_hit"]))
    monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    assert run_kernels(["sm_90"], pattern) == rows
    assert hits == [True, True]
    on_a_device(LAUNCHES["pairwise_prepare"](dataclasses.replace(sample, batch=32)))
    assert hits == [True, True, True]


def test_the_command_reports_and_fails(tmp_path):
    row = toy_row(32, "tf32")
    spilled = {**row, "case": "kernels/bad", "spills": 3}
    path = tmp_path / "kernels.json"
    for rows, code in (([row], 0), ([row, spilled], 1)):
        with mock.patch("gatematch.bench.kernels.run_kernels", return_value=rows) as run:
            result = CliRunner().invoke(app, ["kernels", "--json", str(path), "--jobs", "3"])
        run.assert_called_once_with(list(ARCHITECTURES), "", 3)
        assert result.exit_code == code
        assert read_results(path)["rows"] == rows
        assert ("kernels/bad: 3 spills, 0 bytes of stack" in result.output) == (code == 1)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("--arch", "sm_99", "--arch must be of sm_80, sm_90, sm_100, gfx942; got 'sm_99'"),
        ("--filter", "(", "--filter must be a regular expression; got '('"),
        ("--filter", "nothing", "--filter 'nothing' matches no kernel/arch/dtype of pairwise_fwd"),
    ],
)
def test_wrong_options_are_named(option, value, error):
    result = CliRunner().invoke(app, ["kernels", option, value])
    assert result.exit_code == 2
    assert result.output.startswith(f"Error: {error}")
