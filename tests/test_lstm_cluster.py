"""The cluster kernel, as far as can be told without a GPU: its order of rows, and what it compiles to."""

import itertools
import re

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")
pytest.importorskip("rich")
from gatematch.bench.kernels import ARCHITECTURES, _read_cubin, compiled  # noqa: E402
from gatematch.kernels import lstm_cluster  # noqa: E402
from gatematch.kernels.config import shipped  # noqa: E402

# Register allocation changes from version to version; this is the one that torch 2.13 comes with.
GATED = "3.6.0"


@pytest.mark.parametrize(("HP", "warps"), [(64, 4), (128, 4), (256, 4), (512, 4), (256, 8)])
def test_rows_of_the_product_are_of_the_right_gate_and_unit(HP, warps):
    gate, unit = lstm_cluster.weight_row.fn(torch.arange(4 * HP), warps)
    assert sorted((gate * HP + unit).tolist()) == list(range(4 * HP))

    W, h = torch.randn(4, HP, HP, dtype=torch.float64), torch.randn(16, HP, dtype=torch.float64)
    z = lstm_cluster.by_unit.fn(W[gate, unit] @ h.T, HP, 16, warps)
    for number, (q1, q0) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):  # as `split_units` splits them
        torch.testing.assert_close(z[..., q0, q1], W[number] @ h.T)


SHIPPED = {listed["H"]: tile for _, listed, tile in shipped("lstm_cluster_fwd", "sm_90")}


@pytest.mark.parametrize("HP", SHIPPED)
def test_each_cta_and_thread_has_all_gates_of_its_units(HP):
    ctas, warps = SHIPPED[HP].blocks["CTAS"], SHIPPED[HP].num_warps
    gate, unit = lstm_cluster.weight_row.fn(torch.arange(4 * HP), warps)
    row = torch.arange(4 * HP)
    # Whose a row is: its CTA, its warp, and in it the 4 threads that hold the rows r and r + 8.
    owner = row // (4 * HP // ctas) * 1000 + row // 16 % warps * 10 + row % 8
    of_unit = torch.full((HP, 4), -1).index_put_((unit, gate), owner)
    assert (of_unit == of_unit[:, :1]).all()
    assert (unit // (HP // ctas) == row // (4 * HP // ctas)).all()


def inputs(dtype, H, N, with_lengths=True, B=20, T=3):
    z = torch.zeros(N, T, B, 4 * H, dtype=dtype)
    weights = [torch.zeros(4 * H, H, dtype=dtype)] * N
    state = torch.zeros(N, B, H, dtype=dtype)
    return z, weights, state, state, torch.full((B,), T) if with_lengths else None


def binary(dtype, H, N, with_lengths, save):
    args = inputs(dtype, H, N, with_lengths)
    (found,) = compiled(
        "lstm_cluster_fwd", "sm_90", lambda: lstm_cluster.forward(*args, precision="tf32", save=save)
    )
    return found


SIZES = {torch.float32: (64, 256), torch.bfloat16: (128, 512, 301), torch.float16: (300,)}
CASES = [
    (dtype, H, N, with_lengths, save)
    for dtype, sizes in SIZES.items()
    for H in sizes
    for N, with_lengths, save in ((2, True, True), (1, False, False))
]


@pytest.mark.parametrize(("dtype", "H", "N", "with_lengths", "save"), CASES)
def test_compiles_for_hopper(dtype, H, N, with_lengths, save):
    found = binary(dtype, H, N, with_lengths, save)
    assert found.metadata.num_ctas == max(64, triton.next_power_of_2(H)) // 32
    assert found.metadata.shared <= ARCHITECTURES["sm_90"]
    assert "convert_layout" not in found.asm["ttgir"]  # gates stay in the threads that have them
    used = _read_cubin(found.asm["cubin"])
    assert used["tensor_core_instructions"] > 0
    if triton.__version__ == GATED:
        assert used["spills"] == used["stack_bytes"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_h_is_read_between_the_barrier_and_the_product(dtype):
    ptx = binary(dtype, 256, 2, True, True).asm["ptx"]
    # Newer Triton ends with a barrier of its own, which orders nothing.
    marks = r"barrier\.cluster\.(?:arrive\.release|wait\.acquire)|ld\.global\.cg|wgmma\.mma_async|st\.shared"
    order = [mark for mark, _ in itertools.groupby(re.findall(marks, ptx))]
    barrier = ["barrier.cluster.arrive.release", "barrier.cluster.wait.acquire"]
    # W_hh and h_0, then the loop.
    assert order == ["st.shared", *barrier, "ld.global.cg", "st.shared", "wgmma.mma_async", *barrier]


def test_sizes_of_the_batch_and_of_time_are_not_compiled_in():
    def launch():
        for B, T in ((1, 1), (16, 16), (33, 7)):
            lstm_cluster.forward(*inputs(torch.bfloat16, 64, 2, B=B, T=T), precision="float32", save=True)

    assert len({found.hash for found in compiled("lstm_cluster_fwd", "sm_90", launch)}) == 1


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_shapes(with_lengths, save):
    args = inputs(torch.bfloat16, 40, 2, with_lengths)
    results = []
    compiled(
        "lstm_cluster_fwd",
        "sm_90",
        lambda: results.extend(lstm_cluster.forward(*args, precision="float32", save=save)),
    )
    y, h_n, c_n, cells = results
    assert y.shape == (3, 20, 80) and h_n.shape == c_n.shape == (2, 20, 40)
    assert {x.dtype for x in (y, h_n, c_n)} == {torch.bfloat16}
    if save:
        assert cells.shape == (2, 3, 20, 40) and cells.dtype == torch.float32
    else:
        assert cells is None
    if with_lengths:
        assert not y.any()


def test_nothing_is_launched_for_an_empty_batch():
    args = inputs(torch.bfloat16, 40, 2, B=0)
    found = compiled(
        "lstm_cluster_fwd", "sm_90", lambda: lstm_cluster.forward(*args, precision="float32", save=True)
    )
    assert found == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_serves_half_precision(dtype, precision):
    assert lstm_cluster.serves(1, dtype, precision, "sm_90")
    assert lstm_cluster.serves(512, dtype, precision, "sm_90")
    assert not lstm_cluster.serves(513, dtype, precision, "sm_90")


def test_serves_float32_in_tf32_alone():
    assert lstm_cluster.serves(256, torch.float32, "tf32", "sm_90")
    assert not lstm_cluster.serves(257, torch.float32, "tf32", "sm_90")
    assert not lstm_cluster.serves(64, torch.float32, "float32", "sm_90")


def test_serves_neither_other_dtypes_nor_other_gpus():
    assert not lstm_cluster.serves(64, torch.float64, "tf32", "sm_90")
    for arch in ("sm_80", "sm_100", "sm_120", "gfx942"):
        assert not lstm_cluster.serves(64, torch.bfloat16, "float32", arch)


@pytest.mark.parametrize(
    ("dtype", "H", "precision", "got"),
    [
        (torch.float32, 64, "float32", "64 in torch.float32 with precision 'float32' on sm_90"),
        (torch.float32, 257, "tf32", "257 in torch.float32 with precision 'tf32' on sm_90"),
        (torch.bfloat16, 513, "float32", "513 in torch.bfloat16 with precision 'float32' on sm_90"),
    ],
)
def test_other_layers_are_errors(dtype, H, precision, got):
    with pytest.raises(ValueError, match=rf"a cluster on sm_90 takes .*; got {re.escape(got)}"):
        lstm_cluster.forward(*inputs(dtype, H, 1), precision=precision, save=False)
