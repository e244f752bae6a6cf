"""The sentences of all errors about arguments, and what both halves take as lengths."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from gatematch import checks, ops
from gatematch.attention import (
    ABCNN,
    AttentionFeatures,
    attention_pool,
    pairwise_attend,
    pairwise_attention,
    pairwise_sums,
)
from gatematch.attention import functional as attention
from gatematch.checks import (
    check_bool,
    check_choice,
    check_dtype,
    check_int,
    check_kind,
    check_lengths,
    check_number,
    check_shape,
)
from gatematch.lstm import LSTM
from gatematch.lstm import functional as lstm

ROOT = Path(__file__).parents[1]

SENTENCE = re.compile(r"[^ :]+( \([^)]+\))?: expected .+, got .+", re.DOTALL)
# As torch.nn.LSTM's constructor says them, and what `impl` is refused for.
OTHERS = [
    r"dropout should be a number in range \[0, 1\] .+, got X",
    "proj_size should be a positive integer or zero to disable projections, got X",
    r"proj_size has to be smaller than hidden_size \(X\), got X",
    "X should be of type (bool|int), got: X",
    "X must be greater than zero, got X",
]


def messages() -> dict[str, str]:
    """What each `raise` of an error about an argument says, X for what is filled in, by file and line."""
    found = {}
    for folder in ("core", "lstm", "attention", "curvature"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                    continue
                if ast.unparse(node.exc.func) in ("TypeError", "ValueError", "RuntimeError", "MemoryError"):
                    (message,) = node.exc.args
                    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
                    text = [part.value if isinstance(part, ast.Constant) else "X" for part in parts]
                    found[f"{folder}/{path.name}:{node.lineno}"] = "".join(text)
    return found


def test_every_error_about_an_argument_says_what_was_expected_and_what_came() -> None:
    found = messages()
    assert {"core", "lstm", "attention", "curvature"} == {place.split("/")[0] for place in found}
    other = {place: text for place, text in found.items() if not SENTENCE.fullmatch(text)}
    used = [[pattern for pattern in OTHERS if re.fullmatch(pattern, text)] for text in other.values()]
    assert all(used), dict(zip(other, used, strict=True))
    assert {pattern for patterns in used for pattern in patterns} == set(OTHERS)


x = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("check", "args", "error", "message"),
    [
        (check_kind, (3, Tensor), TypeError, "n: expected a Tensor, got int"),
        (
            check_kind,
            (3, (str, dict), "a name", "; say why"),
            TypeError,
            "n: expected a name, got int; say why",
        ),
        (check_bool, (1,), TypeError, "n: expected a bool, got int"),
        (check_number, ("1",), TypeError, "n: expected a number, got str"),
        (check_number, (True,), TypeError, "n: expected a number, got bool"),
        (check_number, (float("-inf"),), ValueError, "n: expected a finite number, got -inf"),
        (check_number, (10**309,), ValueError, f"n: expected a finite number, got {10**309}"),
        (check_number, (0, 0), ValueError, "n: expected a finite number over 0, got 0"),
        (check_int, (2.0, 1), TypeError, "n: expected an int, got float"),
        (check_int, (True, 1), TypeError, "n: expected an int, got bool"),
        (check_int, (0, 1), ValueError, "n: expected at least 1, got 0"),
        (check_choice, ("c", (None, "b")), ValueError, "n: expected one of None, 'b', got 'c'"),
        (
            check_dtype,
            (torch.int8, (torch.int32, torch.int64)),
            TypeError,
            "n: expected dtype torch.int32 or torch.int64, got torch.int8",
        ),
        (check_shape, (x, (2, None)), ValueError, "n: expected shape (2, any), got (2, 3, 4)"),
        (check_shape, (x, (2, 4, None), "; so"), ValueError, None),
        (
            check_shape,
            (x, (2, 5, None), "; so"),
            ValueError,
            "n: expected shape (2, 5, any), got (2, 3, 4); so",
        ),
    ],
)
def test_checks(check: Any, args: tuple[Any, ...], error: type[Exception], message: str | None) -> None:
    message = message or "n: expected shape (2, 4, any), got (2, 3, 4); it looks transposed"
    with pytest.raises(error) as info:
        check("n", *args)
    assert str(info.value) == message


def test_lengths_are_on_the_device_of_what_they_belong_to_or_on_the_cpu() -> None:
    lengths = torch.tensor([0, 3])
    for time in (0, 1):
        for device in ("cpu", "meta"):
            check_lengths("n", lengths, "x", x.transpose(0, 1 - time).to(device), time)
    check_lengths("n", lengths.to("meta"), "x", x.to("meta"))
    with pytest.raises(ValueError, match=r"^n: expected values from 0 to Q = 3, got 4$"):
        check_lengths("n", lengths + 1, "x", x.to("meta"), size="Q")
    with pytest.raises(ValueError, match=r"^n: expected device cpu, got meta$"):
        check_lengths("n", lengths.to("meta"), "x", x)
    with FakeTensorMode() as mode:
        rows, other = torch.empty(2, 3, 4, device="cuda:0"), torch.empty(2, device="cuda:1").long()
    with mode, pytest.raises(ValueError, match=r"^n: expected device cuda:0 or cpu, got cuda:1$"):
        check_lengths("n", other, "x", rows)


def test_lengths_on_a_device_are_asserted_there_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asserted: list[Tensor] = []
    monkeypatch.setattr(checks, "assert_async", asserted.append)
    on_device = torch.tensor([0, 3], device="meta")
    for value, calls in (("0", 0), ("1", 1)):
        monkeypatch.setenv("GATEMATCH_DEBUG", value)
        check_lengths("n", on_device, "x", x.to("meta"))
        assert [condition.is_meta for condition in asserted] == [True] * calls


def test_ops_get_lengths_from_the_cpu_on_the_device_of_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands in for a GPU: ops give shapes there, and torch refuses a second device."""
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: x.is_meta))
    for module in (checks, attention, lstm):
        monkeypatch.setattr(module, "surroundings", lambda *args: "torch.compile")
    monkeypatch.setattr(attention, "who_computes", lambda *args: "torch")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # torch knows no autocast there
    monkeypatch.setattr(ops, "bypasses_dispatcher", lambda args: False)
    call, devices = ops.Op.__call__, []

    def recorded(op: ops.Op, *args: Any) -> Any:
        devices.append({x.device.type for x in args if isinstance(x, Tensor)})
        return call(op, *args)

    monkeypatch.setattr(ops.Op, "__call__", recorded)
    q, a = torch.empty(2, 3, 4, device="meta"), torch.empty(2, 5, 4, device="meta")
    q_lengths, a_lengths = torch.tensor([1, 3]), torch.tensor([5, 2])
    both = {"q_lengths": q_lengths, "a_lengths": a_lengths}
    calls = [
        lambda: pairwise_attention(q, a, **both),
        lambda: pairwise_sums(q, a, **both),
        lambda: pairwise_attend(q, a, a, **both),
        lambda: attention_pool(q, a, 2, **both),
        lambda: AttentionFeatures(4, length=5, device="meta")(q, a, **both),
        lambda: ABCNN(4, length=5, device="meta")(q, a, **both),
        lambda: ABCNN(4, length=5, variant="paper", device="meta")(q, a, **both),
        lambda: LSTM(4, 3, batch_first=True, device="meta", impl="torch")(q, lengths=q_lengths),
    ]
    for call_op in calls:
        devices.clear()
        call_op()
        assert devices and all(found == {"meta"} for found in devices)
