"""The tools themselves, on kernels of a few lines."""

import pytest
import torch
import triton
import triton.language as tl
from interpreted.bounds import OutOfBounds
from triton.runtime.errors import InterpreterError


@triton.jit
def copy(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride, i < n), i < n)


@triton.jit
def add_one(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(x_ptr + i, 1, i < n)


@triton.jit
def multiply(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION)
    tl.store(c_ptr + at, product.to(c_ptr.dtype.element_ty))


@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, other=0.0)
    y = tl.load(y_ptr + i, i < n, other=0.0)
    result = tl.where(x > y, x * y - x, tl.abs(y) + 3)
    tl.store(out_ptr + i, result + i.to(out_ptr.dtype.element_ty), i < n)


@triton.jit
def total(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


@triton.jit
def larger(x, y):
    return tl.where(x > y, x, y)


@triton.jit
def reduce(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, KEEP: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    found = tl.reduce(tl.load(x_ptr + at), AXIS, larger, keep_dims=KEEP)
    if KEEP:
        found = tl.sum(found, AXIS)
    tl.store(out_ptr + tl.arange(0, N if AXIS == 0 else M), found)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_reduction_by_a_function_is_torchs(axis, keep):
    x = torch.randn(8, 4)
    out = torch.empty(x.shape[1 - axis])
    reduce[(1,)](x, out, M=8, N=4, AXIS=axis, KEEP=keep)
    assert torch.equal(out, x.amax(axis))


def test_accesses_inside_pass():
    x = torch.arange(30.0)
    y = torch.empty(10)
    copy[(2,)](x[::3], y, 10, 3, BLOCK=8)
    assert torch.equal(y, x[::3])


@pytest.mark.parametrize(
    ("x", "y", "what"),
    [
        (torch.ones(64)[8:19], torch.ones(12), "masked_load"),
        (torch.ones(64)[8:20], torch.ones(64)[40:51], "masked_store"),
    ],
)
def test_one_lane_too_many_is_caught_inside_the_storage_too(x, y, what):
    with pytest.raises(
        InterpreterError, match=rf"{what} in program \(1, 0, 0\): 1 of 8 lanes .* \(3,\)"
    ) as error:
        copy[(2,)](x, y, 12, 1, BLOCK=8)
    assert isinstance(error.value.__cause__, OutOfBounds)


def test_atomics_are_watched():
    x = torch.zeros(8, dtype=torch.int32)
    add_one[(1,)](x[:5], 5, BLOCK=8)
    assert x.tolist() == [1] * 5 + [0] * 3
    with pytest.raises(InterpreterError, match="atomic_rmw"):
        add_one[(1,)](x[:5], 6, BLOCK=8)


def test_what_is_not_written_shows():
    x = torch.ones(10)
    for y in (torch.empty(10), x.new_empty(10), torch.empty_like(x), x.new_empty_strided((10,), (1,))):
        copy[(1,)](x, y, 10, 1, BLOCK=8)  # one program too few
        assert y.isnan().tolist() == [False] * 8 + [True] * 2
    assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2


def test_bfloat16_products_are_torchs():
    a, b = torch.randn(2, 32, 32).bfloat16()
    c = torch.empty(32, 32)
    multiply[(1,)](a, b, c, SIZE=32, PRECISION="tf32")
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=0, atol=1e-5)
    rounded = torch.empty(32, 32, dtype=torch.bfloat16)
    multiply[(1,)](a, b, rounded, SIZE=32, PRECISION="tf32")
    assert torch.equal(rounded, c.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_torchs(dtype):
    x, y = (4 * torch.randn(2, 100)).to(dtype)
    out = torch.empty(100, dtype=dtype)
    arithmetic[(1,)](x, y, out, 100, BLOCK=128)
    expected = torch.where(x > y, x * y - x, y.abs() + 3) + torch.arange(100).to(dtype)
    assert torch.equal(out, expected)


def test_a_bfloat16_sum_is_refused():
    with pytest.raises(InterpreterError, match="convert to float32 first"):
        total[(1,)](torch.ones(8).bfloat16(), torch.empty(1).bfloat16(), BLOCK=8)


def test_products_show_the_error_of_their_precision():
    a, b = torch.randn(2, 64, 64)
    exact = a.double() @ b.double()
    error = {}
    for precision in ("ieee", "tf32x3", "tf32"):
        c = torch.empty(64, 64)
        multiply[(1,)](a, b, c, SIZE=64, PRECISION=precision)
        error[precision] = float((c - exact).abs().max())
    assert error["ieee"] < 2e-5
    assert error["tf32x3"] < 5e-5
    assert 2e-3 < error["tf32"] < 1e-1


def test_three_passes_keep_infinity():
    a, b = torch.ones(2, 16, 16)
    a[3, 5] = float("inf")
    c = torch.empty(16, 16)
    multiply[(1,)](a, b, c, SIZE=16, PRECISION="tf32x3")
    assert c[3].isinf().all()
    assert torch.equal(c[[0, 15]], torch.full((2, 16), 16.0))
