"""Draws calls of everything public, valid ones and spoilt ones, and judges what comes.

A valid call agrees with the same in float64. A spoilt one, of which one argument is replaced, agrees too or
raises one sentence that names the argument. Calls run in child processes, since some could crash or hang:

    python tests/fuzz.py CALLS [FIRST]        all of them, in batches; those at fault are printed
    python tests/fuzz.py batch FIRST LAST     one batch, in this process; a single call is the batch N N+1
"""

import copy
import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from public import calls, public
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map

from gatematch.attention import ABCNN, AttentionFeatures, PairwiseAttention
from gatematch.lstm import LSTM, LSTMCell

Arguments = dict[str, Any]
PUBLIC = public()
BATCH, TIMEOUT = 100, 300
FOLDER = {"PYTHONPATH": str(Path(__file__).parent)}  # under PYTHONSAFEPATH it is not there by itself
DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
# Of the largest value: roundings of inputs, results and states.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
SIZES = (1, 2, 3, 5, 9)


# --- valid calls ---


def rows(draw: random.Random, *sizes: int, dtype: torch.dtype) -> Tensor:
    """Contiguous, transposed or every other of more."""
    x = torch.randn(*sizes)
    layout = draw.choice(("plain", "transposed", "strided"))
    if layout == "transposed":
        x = x.mT.contiguous().mT
    elif layout == "strided":
        x = x.repeat_interleave(2, -1)[..., ::2]
    return x.to(dtype)


def lengths(draw: random.Random, B: int, most: int) -> Any:
    """None, a tensor of some integer type, or a list."""
    found = torch.tensor([draw.randint(0, most) for _ in range(B)], dtype=torch.int64)
    kind = draw.choice(("none", "none", "int64", "int32", "uint8", "list", "array"))
    if kind == "none":
        return None
    if kind in ("list", "array"):
        return found.tolist() if kind == "list" else found.numpy()
    return found.to(getattr(torch, kind))


def pair(
    draw: random.Random, least: int = 0, D: int | None = None, dtype: torch.dtype | None = None
) -> Arguments:
    """Two sentences: near rows, equal ones, far ones, or all on an offset."""
    B, Q, A = (
        draw.choice((0, 1, 2, 3)),
        max(least, draw.choice((0, *SIZES))),
        max(least, draw.choice((0, *SIZES))),
    )
    D, dtype = D or draw.choice((*SIZES, 17)), dtype or draw.choice(DTYPES)
    q, a = rows(draw, B, Q, D, dtype=dtype), rows(draw, B, A, D, dtype=dtype)
    if B * Q * A:
        what = draw.choice(("nothing", "equal", "near", "offset", "far"))
        if what in ("equal", "near"):
            a[:, 0] = q[:, -1] + (0.01 if what == "near" else 0)
        elif what == "offset":
            q, a = q + 8, a + 8
        elif what == "far" and dtype in (torch.float32, torch.float64):
            q, a = q * 1e22, a * 1e22
    if draw.random() < 0.2:
        return {"q": rows(draw, max(Q, 1), D, dtype=dtype), "a": rows(draw, max(A, 1), D, dtype=dtype)}
    return {"q": q, "a": a, "q_lengths": lengths(draw, B, Q), "a_lengths": lengths(draw, B, A)}


def attend(draw: random.Random) -> Arguments:
    found = pair(draw)
    v = rows(draw, *found["a"].shape[:-1], draw.choice(SIZES), dtype=found["a"].dtype)
    return found | {"v": v, "normalize": draw.choice((None, "rows"))}


def pool(draw: random.Random) -> Arguments:
    return pair(draw, least=2) | {"width": draw.choice((1, 2)), "normalize": draw.choice((True, False))}


def features(draw: random.Random) -> Arguments:
    D, dtype = draw.choice(SIZES), draw.choice(DTYPES)
    module = AttentionFeatures(D, length=9, shared=draw.choice((True, False)), dtype=dtype)
    return {"self": module, **pair(draw, 1, D, dtype)}


def network(draw: random.Random) -> Arguments:
    D, dtype = draw.choice(SIZES), draw.choice((torch.float64, torch.float32))
    kinds = {
        "kind": draw.choice(("bcnn", "abcnn1", "abcnn2", "abcnn3")),
        "variant": draw.choice(("official", "paper")),
    }
    module = ABCNN(
        D, length=9, channels=4, width=2, blocks=2, **kinds, classes=draw.choice((None, 2)), dtype=dtype
    )
    return {"self": module, **pair(draw, 1, D, dtype)}


def recurrent(draw: random.Random, functional: bool) -> Arguments:
    I, H, N = draw.choice(SIZES), draw.choice((1, 2, 3, 8)), draw.choice((1, 2))
    dtype, both = draw.choice(DTYPES), draw.choice((True, False))
    first, project = draw.choice((True, False)), draw.choice((0, 0, 1)) if H > 1 else 0
    options = {"bias": draw.choice((True, False)), "batch_first": first, "bidirectional": both}
    module = LSTM(I, H, N, proj_size=project, dropout=0.5 if N > 1 else 0.0, dtype=dtype, **options).eval()
    T, B = draw.choice(SIZES), draw.choice((0, 1, 2, 5))
    x: Any = rows(draw, *((B, T, I) if first else (T, B, I)), dtype=dtype)
    hx = None
    if draw.random() < 0.5:
        cells = N * (1 + both)
        hx = torch.randn(cells, B, project or H).to(dtype), torch.randn(cells, B, H).to(dtype)
    found = {"hx": hx, "lengths": lengths(draw, B, T), "return_cells": draw.choice((True, False))}
    if B and draw.random() < 0.2:
        steps = [draw.randint(1, T) for _ in range(B)]
        x = pack_padded_sequence(x, torch.tensor(steps), batch_first=first, enforce_sorted=False)
        found["lengths"] = None
    elif draw.random() < 0.1:
        x, found = rows(draw, T, I, dtype=dtype), {}
    if functional:
        return {"x": x, "params": dict(module.state_dict()), "batch_first": first, **found}
    return {"self": module, "input": x, **found}


def cell(draw: random.Random, functional: bool) -> Arguments:
    I, H, B, dtype = draw.choice(SIZES), draw.choice(SIZES), draw.choice((0, 1, 4)), draw.choice(DTYPES)
    module = LSTMCell(I, H, bias=draw.choice((True, False)), dtype=dtype)
    lead = (B,) if draw.random() < 0.8 else ()
    hx = (torch.randn(*lead, H).to(dtype), torch.randn(*lead, H).to(dtype)) if draw.random() < 0.5 else None
    x = torch.randn(*lead, I).to(dtype)
    return {"x": x, "hx": hx, **module.state_dict()} if functional else {"self": module, "input": x, "hx": hx}


def of_table(name: str) -> Callable[[random.Random], Arguments]:
    return lambda draw: calls()[name]


VALID: dict[str, Callable[[random.Random], Arguments]] = {
    **{name: of_table(name) for name in PUBLIC},
    "ABCNN.forward": network,
    "AttentionFeatures.forward": features,
    "LSTM.forward": lambda draw: recurrent(draw, False),
    "LSTMCell.forward": lambda draw: cell(draw, False),
    "PairwiseAttention.forward": lambda draw: {"self": PairwiseAttention(), **pair(draw)},
    "attention_pool": pool,
    "lstm": lambda draw: recurrent(draw, True),
    "lstm_cell": lambda draw: cell(draw, True),
    "pairwise_attend": attend,
    "pairwise_attention": pair,
    "pairwise_sums": pair,
}
# Those that compute something are drawn more often.
NAMES = [
    *VALID,
    *5
    * [
        name
        for name, drawn in VALID.items()
        if name in ("lstm", "pairwise_sums") or "<lambda>" not in drawn.__name__
    ],
]
NAMES += 5 * ["LSTM.forward", "lstm", "lstm_cell", "LSTMCell.forward", "PairwiseAttention.forward"]


# --- spoilt ones ---


def spoilt(draw: random.Random, value: Any) -> Iterator[tuple[str, Any]]:
    """Other values in its place, and what they are."""
    yield from (
        ("None", None),
        ("'x'", "x"),
        ("[]", []),
        ("{}", {}),
        ("nan", float("nan")),
        ("an object", object()),
    )
    yield from (
        ("-1", -1),
        ("2.5", 2.5),
        ("np.int64(2)", np.int64(2)),
        ("an array", np.ones((2, 2))),
        ("True", True),
    )
    if isinstance(value, Tensor):
        for dtype in (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64):
            yield f"of {dtype}", value.detach().to(dtype)
        yield from (("on meta", value.detach().to("meta")), ("an array", value.detach().float().numpy()))
        yield from (
            ("one more dimension", value[None]),
            ("one less", value[0] if value.dim() and len(value) else value),
        )
        yield from (
            ("transposed", value.mT if value.dim() > 1 else value),
            ("repeated", torch.cat([value, value])),
        )
        yield from (
            ("a row less", value[1:] if value.dim() else value),
            ("negative", -value),
            ("plus 7", value + 7),
        )
        yield "a feature less", value[..., 1:] if value.dim() else value
        for layout in ("to_sparse", "to_mkldnn"):
            try:
                yield layout, getattr(value.detach(), layout)()
            except RuntimeError:
                continue
        if value.dim() > 1 and len(value):
            yield "nested", torch.nested.nested_tensor(list(value.detach()))
    elif isinstance(value, PackedSequence):
        yield "less data", PackedSequence(value.data[1:], value.batch_sizes, *value[2:])
        yield "other sizes", PackedSequence(value.data, value.batch_sizes.flip(0) + 1, *value[2:])
        yield "its data", value.data
    elif isinstance(value, (list, tuple)):
        yield from (("one less", value[1:]), ("one more", (*value, None)))
        for k, item in enumerate(value[:2]):
            described, other = draw.choice(list(spoilt(draw, item)))
            yield f"[{k}] {described}", type(value)([*value[:k], other, *value[k + 1 :]])
    elif isinstance(value, dict) and value:
        key = draw.choice(list(value))
        described, other = draw.choice(list(spoilt(draw, value[key])))
        yield f"[{key!r}] {described}", value | {key: other}
        yield f"without {key!r}", {k: v for k, v in value.items() if k != key}


# --- judging ---

NAME = r"[A-Za-z_][\w.]*(\(\)|\[[^\]]*\])*( \(\w+\))?"
SENTENCE = re.compile(rf"{NAME}(:| should| must| has) [^\n]+")
MISSING = re.compile(r"\w+(\.\w+)?\(\) (missing|got an unexpected|got multiple|takes) [^\n]+")  # Python's own


def double(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, PackedSequence):
        return PackedSequence(double(value.data), *value[1:])
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def results(name: str, arguments: Arguments) -> list[Any]:
    torch.manual_seed(1)
    found = PUBLIC[name](**arguments)
    return [x.data if isinstance(x, PackedSequence) else x for x in tree_leaves(_plain(found))]


def _plain(found: Any) -> Any:
    if isinstance(found, nn.Module):
        return dict(found.state_dict())
    if isinstance(found, PackedSequence):
        return found.data
    if isinstance(found, tuple) and any(isinstance(x, PackedSequence) for x in found):
        return tuple(map(_plain, found))
    return found


def disagreement(name: str, arguments: Arguments) -> str | None:
    """How a call differs from the same in float64, if it does; errors are the caller's to judge."""
    found = results(name, arguments)
    # A loss has parameters of its own, and random numbers are others in float64.
    if name in ("hessian", "hvp", "HessianOperator") or name.endswith("_"):
        return None
    if not any(isinstance(x, Tensor) and x.is_floating_point() and not x.is_meta for x in found):
        return None
    right = results(name, {key: double(value) for key, value in arguments.items()})
    for x, y in zip(found, right, strict=True):
        if not isinstance(x, Tensor) or x.is_meta or not x.is_floating_point():
            continue
        if x.shape != y.shape:
            return f"shape {tuple(x.shape)} for {tuple(y.shape)}"
        largest = max(1.0, float(y.abs().nan_to_num(0, 0, 0).max())) if y.numel() else 1.0
        if not torch.allclose(
            x.double(), y.double(), rtol=0, atol=TOLERANCE[x.dtype] * largest, equal_nan=True
        ):
            return f"off by {float((x.double() - y.double()).abs().max()):.2g} of {largest:.2g}"
    return None


def fault(number: int) -> tuple[str, str | None]:
    """The call of that number, and what is wrong with what comes of it."""
    draw = random.Random(number)
    torch.manual_seed(number)
    name = draw.choice(NAMES)
    arguments = VALID[name](draw)
    described = f"{number} {name}"
    keys = [key for key in arguments if key != "self"]
    if not keys or draw.random() < 0.35:
        try:
            return described, disagreement(name, arguments)
        except Exception as error:
            return described, f"{type(error).__name__}: {error}"
    key = draw.choice(keys)
    what, value = draw.choice(list(spoilt(draw, arguments[key])))
    described += f", {key}: {what}"
    print(described, flush=True)
    try:
        return described, disagreement(name, arguments | {key: value})
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        said = str(error)
        if type(error) is RuntimeError and not re.match(
            r"(x|input|loss_fn|params|op|vector)\S*: expected", said
        ):
            return described, f"RuntimeError: {said}"
        return described, None if SENTENCE.fullmatch(said) or MISSING.fullmatch(
            said
        ) else f"{type(error).__name__}: {said}"
    except Exception as error:
        return described, f"{type(error).__name__}: {error}"


def batch(first: int, last: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number in range(first, last):
        described, wrong = fault(number)
        print(f"FAULT {described}: {' '.join(wrong.split())[:300]}" if wrong else described, flush=True)


def faults(first: int, last: int) -> list[str]:
    """Those of a batch in a process of its own; one that ends or hangs is the fault of its last call."""
    command = [sys.executable, __file__, "batch", str(first), str(last)]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | FOLDER
        )
    except subprocess.TimeoutExpired as hung:
        lines = (hung.stdout or b"").decode().splitlines() or ["before the first call"]
        return [f"FAULT {lines[-1]}: hangs"]
    lines = run.stdout.splitlines() or ["before the first call"]
    found = [line for line in lines if line.startswith("FAULT")]
    if run.returncode:
        found.append(f"FAULT {lines[-1]}: ends the process with {run.returncode}: {run.stderr[-300:]}")
    return found


def main(count: int, first: int = 0) -> list[str]:
    starts = range(first, first + count, BATCH)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda start: faults(start, min(start + BATCH, first + count)), starts)
        return [line for lines in found for line in lines]


if __name__ == "__main__":
    if sys.argv[1] == "batch":
        batch(*map(int, sys.argv[2:]))
    else:
        wrong = main(*map(int, sys.argv[1:]))
        print(*wrong, f"{len(wrong)} calls at fault", sep="\n")
        sys.exit(bool(wrong))
