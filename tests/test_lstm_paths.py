"""The fused and the written-out path answer one call alike: dtypes, dropout, lengths, meta tensors."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from gatematch.lstm import LSTM, LSTMCell, lstm

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

T, B, I, H = 6, 5, 5, 7
LENGTHS = torch.tensor([2, 6, 3, 6, 1])
PROJECTIONS = pytest.mark.parametrize("proj_size", [0, 3], ids=["plain", "projection"])


def flat(result: Any) -> list[Tensor]:
    y, (h_n, c_n), *cells = result
    return [out.data if isinstance(out, PackedSequence) else out for out in (y, h_n, c_n, *cells)]


def pack(x: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, LENGTHS, enforce_sorted=False)


@pytest.mark.usefixtures("bfloat16_lstm")
@PROJECTIONS
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
def test_autocast_dtypes_and_values(form: str, given: torch.dtype, state: Any, proj_size: int) -> None:
    torch.manual_seed(0)
    theirs, ours = nn.LSTM(I, H, 2, proj_size=proj_size), LSTM(I, H, 2, proj_size=proj_size)
    ours.load_state_dict(theirs.state_dict())
    x: Any = torch.randn(T, B, I).to(given)
    hx = None
    if state is not None:
        hx = torch.randn(2, B, proj_size or H).to(state), torch.randn(2, B, H).to(state)
    lengths = LENGTHS if form == "lengths" else None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        want = flat(theirs(x if form == "padded" else pack(x), hx))
        x = pack(x) if form == "packed" else x
        plain, cells = flat(ours(x, hx, lengths)), flat(ours(x, hx, lengths, True))
    assert [out.dtype for out in plain] == [out.dtype for out in want]
    assert [out.dtype for out in cells] == [*(out.dtype for out in want), want[2].dtype]
    torch.testing.assert_close(cells[:3], plain, rtol=0, atol=0.03)


@PROJECTIONS
def test_autocast_without_a_step_keeps_dtype_and_state(proj_size: int) -> None:
    ours, x = LSTM(I, H, proj_size=proj_size), torch.randn(T, B, I)
    hx = torch.randn(1, B, proj_size or H), torch.randn(1, B, H)
    with torch.autocast("cpu", torch.bfloat16):
        want = flat(ours(x, hx, LENGTHS))
        for return_cells in (False, True):
            got = flat(ours(x, hx, torch.zeros_like(LENGTHS), return_cells))
            assert [out.dtype for out in got[:3]] == [out.dtype for out in want]
            torch.testing.assert_close(got[2], hx[1], rtol=0, atol=0)


@PROJECTIONS
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("form", ["packed", "lengths"])
def test_dropout_draws_the_packed_mask_with_cells_too(form: str, batch_first: bool, proj_size: int) -> None:
    torch.manual_seed(0)
    args: dict[str, Any] = {"bidirectional": True, "dropout": 0.4, "proj_size": proj_size}
    theirs = nn.LSTM(I, H, 3, **args, dtype=torch.float64)
    ours = LSTM(I, H, 3, **args, batch_first=batch_first and form == "lengths", dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    torch.manual_seed(5)
    want = flat(theirs(pack(x)))
    state = torch.random.get_rng_state()
    for return_cells in (False, True):
        torch.manual_seed(5)
        if form == "packed":
            y, states, *_ = ours(pack(x), None, None, return_cells)
        else:
            padded = x.transpose(0, 1) if ours.batch_first else x
            y, states, *_ = ours(padded, None, LENGTHS, return_cells)
            y = pack(y.transpose(0, 1) if ours.batch_first else y)
        torch.testing.assert_close(flat((y, states)), want, rtol=0, atol=1e-14)
        assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_with_cells_and_no_steps() -> None:
    ours = LSTM(I, H, 2, dropout=0.5)
    y, _, cells = ours(torch.randn(T, B, I), None, torch.zeros_like(LENGTHS), True)
    assert not y.any() and not cells.any()


UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("integer", [torch.int8, torch.int16, torch.int32, torch.uint8, *UNSIGNED], ids=str)
def test_lengths_of_any_integer_dtype(integer: torch.dtype) -> None:
    ours, x = LSTM(I, H), torch.randn(T, B, I)
    for return_cells in (False, True):
        got, want = (ours(x, None, lengths, return_cells) for lengths in (LENGTHS.to(integer), LENGTHS))
        torch.testing.assert_close(flat(got), flat(want), rtol=0, atol=0)


def test_lengths_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA each read of them waits for the device; the range check reads only what is on the CPU."""
    reads = []
    ours, x = LSTM(I, H, 2, dropout=0.5), torch.randn(T, B, I)
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: (reads.append(tensor), cpu(tensor))[1])
    for name in ("any", "item", "tolist", "__bool__"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("read again"))
    ours(x, None, LENGTHS)
    assert len(reads) == 1
    ours(x, None, LENGTHS, True)
    assert len(reads) == 2
    ours.eval()(x, None, LENGTHS, True)
    assert len(reads) == 2


@pytest.mark.parametrize("return_cells", [False, True], ids=["plain", "cells"])
@pytest.mark.parametrize("lengths", [None, LENGTHS, LENGTHS.to("meta")], ids=["none", "cpu", "meta"])
def test_meta_tensors_give_shapes(lengths: Tensor | None, return_cells: bool) -> None:
    ours = LSTM(I, H, 2, dropout=0.5, device="meta")
    x = torch.empty(T, B, I, device="meta")
    got = flat(ours(x, None, lengths, return_cells))
    want = [(T, B, H), (2, B, H), (2, B, H), (T, B, H)][: len(got)]
    assert all(out.is_meta for out in got) and [tuple(out.shape) for out in got] == want


@pytest.mark.parametrize("shape", [(0, B, I), (0, I), (0, 0, I)], ids=str)
def test_no_steps_is_torchs_runtime_error(shape: tuple[int, ...]) -> None:
    for cls in (nn.LSTM, LSTM):
        with pytest.raises(RuntimeError) as info:
            cls(I, H)(torch.zeros(shape))
    assert str(info.value) == f"x: expected at least one time step, got T = 0 in shape {shape}"


def test_cell_under_vmap_equals_the_plain_call() -> None:
    cell, x = LSTMCell(I, H), torch.randn(T, B, I)
    got = torch.func.vmap(lambda x: cell(x)[0])(x)
    torch.testing.assert_close(got, torch.stack([cell(step)[0] for step in x]))


def pairs_of_dtypes() -> list[tuple[str, Any]]:
    """What autocast on the CPU would not unite: the name that is blamed, and a call."""
    f64, f32, f16 = torch.float64, torch.float32, torch.bfloat16
    x, h = torch.randn(T, B, I), torch.randn(1, B, H)
    wide, narrow = LSTM(I, H, dtype=f64), LSTM(I, H)
    cells = LSTMCell(I, H, dtype=f64), LSTMCell(I, H)
    mixed = dict(narrow.state_dict())
    mixed["bias_hh_l0"] = mixed["bias_hh_l0"].double()
    return [
        ("x", lambda: wide(x)),
        ("x", lambda: wide(x.to(f16))),
        ("x", lambda: wide(pack(x))),
        ("x", lambda: wide(x, None, LENGTHS, True)),
        ("x", lambda: narrow(x.to(f64))),
        ("bias_hh_l0", lambda: lstm(x, mixed)),
        ("hx[0]", lambda: narrow(x, (h.to(f64), h))),
        ("hx[1]", lambda: narrow(x.to(f16), (h.to(f32), h.to(f64)))),
        ("x", lambda: cells[0](x[0])),
        ("x", lambda: cells[1](x[0].to(f64))),
        ("hx[0]", lambda: cells[1](x[0], (h[0].to(f64), h[0]))),
        ("hx[1]", lambda: cells[0](x[0].to(f64), (h[0].to(f64), h[0]))),
        ("x", lambda: torch.func.vmap(lambda x: cells[0](x)[0])(x)),
    ]


@pytest.mark.parametrize("number", range(len(pairs_of_dtypes())))
def test_autocast_unites_float64_with_nothing(number: int) -> None:
    name, call = pairs_of_dtypes()[number]
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=rf"^{re.escape(name)}: expected dtype torch\.\w+ as \w+, got torch\."),
    ):
        call()


@pytest.mark.parametrize("proj_size", [0, 3])
def test_autocast_leaves_float64_alone(proj_size: int) -> None:
    module = LSTM(I, H, 2, proj_size=proj_size, dtype=torch.float64)
    cell = LSTMCell(I, H, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    calls: list[Any] = [
        lambda: flat(module(x)),
        lambda: flat(module(pack(x))),
        lambda: flat(module(x, None, LENGTHS, True)),
        lambda: torch.func.vmap(lambda x: flat(module(x)))(x[None]),
        lambda: cell(x[0]),
    ]
    for call in calls:
        want = call()
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(call(), want, rtol=0, atol=0)


def test_autocast_of_another_device_unites_nothing() -> None:
    """torch.nn.LSTM asks for that of any device, and fails later on."""
    module, cell, x = LSTM(I, H), LSTMCell(I, H), torch.randn(T, B, I)
    torch.set_autocast_enabled("cuda", True)
    try:
        want = "x: expected dtype torch.float32 as weight_ih{}, got torch.bfloat16"
        for call, suffix in ((module, "_l0"), (cell, "")):
            with pytest.raises(TypeError) as info:
                call((x if suffix else x[0]).bfloat16())
            assert str(info.value) == want.format(suffix)
        with pytest.raises(TypeError, match=r"^x: expected dtype torch.float32 as weight_ih_l0, got"):
            LSTM(I, H, device="meta")(x.to("meta", torch.bfloat16))
        assert module(x)[0].dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)
