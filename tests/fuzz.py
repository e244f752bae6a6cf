"""Draws calls of everything public, valid ones and spoilt ones, and judges what comes.

A valid call agrees with the oracle, or where it has none with the same call in float64. A spoilt one, of
which one argument or option is replaced, agrees too or raises one sentence that starts with the name of an
argument of that call. Calls run in child processes, since some could crash or hang; after such a call another
process goes on with the next. Numbers are seeds, drawn from by `random`: hypothesis would shrink in the
process that a crash ends.

    python tests/fuzz.py CALLS [FIRST]        all of them, in batches; those at fault are printed
    python tests/fuzz.py batch FIRST LAST     one batch, in this process; a single call is the batch N N+1
"""

import copy
import inspect
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
import oracle
import torch
from public import calls, public
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

import gatematch
from gatematch.attention import ABCNN, AttentionFeatures, PairwiseAttention
from gatematch.lstm import LSTM, LSTMCell

Arguments = dict[str, Any]
PUBLIC = public()
BATCH, TIMEOUT = 100, 120
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
        steps, ordered = [draw.randint(1, T) for _ in range(B)], draw.random() < 0.5
        steps = sorted(steps, reverse=True) if ordered else steps
        x = pack_padded_sequence(x, torch.tensor(steps), batch_first=first, enforce_sorted=ordered)
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


def network_options(draw: random.Random) -> Arguments:
    both, bias, layers = draw.choice((True, False)), draw.choice((True, False)), draw.choice((1, 2))
    sizes = {"input_size": draw.choice(SIZES), "hidden_size": draw.choice(SIZES), "num_layers": layers}
    return {**sizes, "bias": bias, "bidirectional": both, "dtype": draw.choice(DTYPES[:2])}


def cell_options(draw: random.Random) -> Arguments:
    found = network_options(draw)
    return {key: found[key] for key in ("input_size", "hidden_size", "bias", "dtype")}


def of_network(draw: random.Random, key: str) -> Arguments:
    return {key: LSTM(**network_options(draw))}


def of_library(draw: random.Random, name: str) -> Arguments:
    """Arrays as a library has them, made by the way back; some of them read-only."""
    options = network_options(draw)
    if name != "keras":
        options |= {"bias": True}
    if name == "onnx":
        options["num_layers"] = 1
    arrays = getattr(gatematch, f"to_{name}")(LSTM(**options))
    arrays = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = draw.random() < 0.5
    return {"weights": arrays} | ({} if name == "onnx" else {"bidirectional": options["bidirectional"]})


def curved(draw: random.Random, **others: Any) -> Arguments:
    """The sum of the cubes of M z, whose Hessian is 6 M' diag(M z) M."""
    n, m, dtype = draw.choice(SIZES), draw.choice(SIZES), draw.choice(DTYPES[:2])
    w, u = (torch.randn(size).to(dtype).requires_grad_() for size in (n, m))
    M = torch.randn(4, n + m, dtype=torch.float64)

    def loss() -> Tensor:
        return (M.to(dtype) @ torch.cat([w, u])).pow(3).sum()

    def exact(params: Any) -> Tensor:
        """Of the parameters asked for alone."""
        rows = {id(w): torch.arange(n), id(u): torch.arange(n, n + m)}
        asked = torch.cat([rows[id(p)] for p in (params.values() if isinstance(params, dict) else params)])
        N, z = M.to(dtype).double(), torch.cat([w, u]).detach().double()
        return (6 * N.T @ ((N @ z)[:, None] * N))[asked][:, asked]

    setattr(loss, "exact", exact)  # noqa: B010
    found = {"loss_fn": loss, "params": draw.choice(([w, u], {"w": w, "u": u})), **others}
    return found | ({"vector": torch.randn(n + m).to(dtype)} if "vector" in found else {})


def of_table(name: str) -> Callable[[random.Random], Arguments]:
    return lambda draw: calls()[name]


VALID: dict[str, Callable[[random.Random], Arguments]] = {
    **{name: of_table(name) for name in PUBLIC},
    "ABCNN.forward": network,
    "AttentionFeatures.forward": features,
    "LSTM": network_options,
    "LSTM.forward": lambda draw: recurrent(draw, False),
    "LSTMCell": cell_options,
    "LSTMCell.forward": lambda draw: cell(draw, False),
    "PairwiseAttention.forward": lambda draw: {"self": PairwiseAttention(), **pair(draw)},
    "attention_pool": pool,
    "convert": lambda draw: {"module": nn.Sequential(nn.LSTM(**network_options(draw)))},
    "from_keras": lambda draw: of_library(draw, "keras"),
    "from_onnx": lambda draw: of_library(draw, "onnx"),
    "from_tf1": lambda draw: of_library(draw, "tf1"),
    "hessian": lambda draw: curved(draw, block_diagonal=False, chunk_size=draw.choice((None, 1, 3))),
    "hvp": lambda draw: curved(draw, vector=None),
    "lstm": lambda draw: recurrent(draw, True),
    "lstm_cell": lambda draw: cell(draw, True),
    "named_gates": lambda draw: of_network(draw, "module"),
    "pairwise_attend": attend,
    "pairwise_attention": pair,
    "pairwise_sums": pair,
    "to_keras": lambda draw: of_network(draw, "source"),
}
# Those that compute something are drawn more often.
OFTEN = ("ABCNN.forward", "AttentionFeatures.forward", "LSTM.forward", "LSTMCell.forward", "attention_pool")
OFTEN += ("PairwiseAttention.forward", "lstm", "lstm_cell", "pairwise_attend", "pairwise_attention")
NAMES = [*VALID, *5 * [*OFTEN, "pairwise_sums"]]


# --- spoilt ones ---


ODD = (None, "x", [], {}, float("nan"), float("inf"), -1, 0, 2.5, True, np.int64(2), np.bool_(True))


def spoilt(draw: random.Random, value: Any) -> Iterator[tuple[str, Any]]:
    """Other values in its place, and what they are."""
    yield from ((repr(odd), copy.copy(odd)) for odd in ODD)
    yield from (("an object", object()), ("an array", np.ones((2, 2))))
    if isinstance(value, np.ndarray):
        yield from (("of int64", value.astype(np.int64)), ("big-endian", value.astype(">f4")))
        yield from (("transposed", value.T), ("a row less", value[1:]), ("one more dimension", value[None]))
    if isinstance(value, Tensor):
        for dtype in (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64):
            yield f"of {dtype}", value.detach().to(dtype)
        yield from (("on meta", value.detach().to("meta")), ("an array", value.detach().float().numpy()))
        yield from (("one more dimension", value[None]), ("repeated", torch.cat([value, value])))
        yield from (("negative", -value), ("plus 7", value + 7))
        if value.dim():
            yield from (("a row less", value[1:]), ("a feature less", value[..., 1:]))
        if value.dim() and len(value):
            yield "one less", value[0]
        if value.dim() > 1:
            yield "transposed", value.mT
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

SENTENCE = re.compile(r"(\w+)(?:\.\w+|\(\)|\[[^\]]*\])*(?: \(\w+\))?(?::| should| must| has) [^\n]+")
PYTHONS = re.compile(r"\w+(\.\w+)?\(\) (missing|got an unexpected|got multiple|takes) [^\n]+")
TORCHS = re.compile(r"empty\(\): argument '(dtype|device)' must be [^\n]+")  # of constructors


def named(name: str, arguments: Arguments, said: str) -> bool:
    """Whether one sentence starts with the name of an argument of that call, or is Python's or torch's."""
    found = SENTENCE.fullmatch(said)
    known = {*inspect.signature(PUBLIC[name]).parameters, *arguments, *parameter_names(arguments)}
    if "input" in known:
        known.add("x")  # as the docstring of LSTM.forward says
    return bool(PYTHONS.fullmatch(said) or TORCHS.fullmatch(said) or (found and found[1] in known))


def parameter_names(arguments: Arguments) -> Iterator[str]:
    """Parameters of a module or a dict in the call: a sentence may name these."""
    for value in arguments.values():
        yield from (key for key in value if isinstance(key, str)) if isinstance(value, dict) else ()
        yield from dict(value.named_parameters()) if isinstance(value, nn.Module) else ()


def as_array(x: Any) -> np.ndarray:
    return x.detach().double().numpy() if isinstance(x, Tensor) else np.asarray(x)


def exact(name: str, arguments: Arguments) -> list[Tensor] | None:
    """By the oracle, which has no line in common with the library; None where it has no such call."""
    given = {key: value for key, value in arguments.items() if value is not None}
    if name in ("hessian", "hvp"):
        if not hasattr(given["loss_fn"], "exact") or given.get("block_diagonal"):
            return None
        H = given["loss_fn"].exact(given["params"])
        return [H if name == "hessian" else H @ given["vector"].double()]
    if name.startswith(("pairwise_att", "pairwise_s", "PairwiseAttention.")):
        q, a = as_array(given["q"]), as_array(given["a"])
        single = q.ndim == 2
        q, a = (q[None], a[None]) if single else (q, a)
        lengths = [None if given.get(k) is None else np.asarray(given[k]) for k in ("q_lengths", "a_lengths")]
        S, _ = oracle.pairwise(q, a, *lengths)
        outs = [S]
        if name == "pairwise_sums":
            outs = list(oracle.sums(S))
        elif name == "pairwise_attend":
            v = as_array(given["v"])[None] if single else as_array(given["v"])
            rows = S.sum(2, keepdims=True)
            scale = np.where(rows > 0, rows, 1) if given.get("normalize") == "rows" else 1
            outs = [oracle.attend(S, v) / scale]
        return [torch.from_numpy(x[0] if single else x) for x in outs]
    if name in ("lstm", "LSTM.forward", "lstm_cell", "LSTMCell.forward"):
        return recurrence(name, given)
    return None


def recurrence(name: str, given: Arguments) -> list[Tensor]:
    step, module = "ell" in name, given.get("self")
    params = module.state_dict() if module is not None else given if step else given["params"]
    W = {f"{k}_l0" if step else k: as_array(w) for k, w in params.items() if re.match("weight|bias", k)}
    x, n = given["input" if module is not None else "x"], given.get("lengths")
    first = not step and (given.get("batch_first") if module is None else module.batch_first)
    packed = isinstance(x, PackedSequence)
    if packed:  # whose own order is time first
        padded, n, first = *pad_packed_sequence(x), False
    else:
        padded = x[None] if step else x
    single = padded.dim() == 2
    padded = padded.unsqueeze(1) if single else padded.transpose(0, 1) if first else padded
    cells, B = sum(k.startswith("weight_hh") for k in W), padded.shape[1]
    H, P = W["weight_hh_l0"].shape[0] // 4, W["weight_hh_l0"].shape[1]
    h, c = (as_array(s) for s in given["hx"]) if "hx" in given else (np.zeros(P), np.zeros(H))
    if "hx" in given:
        h, c = h.reshape(cells, B, P), c.reshape(cells, B, H)
    h, c = np.broadcast_to(h, (cells, B, P)), np.broadcast_to(c, (cells, B, H))
    (y, h_n, c_n, all_c), _ = oracle.lstm(as_array(padded), W, h, c, None if n is None else np.asarray(n))
    outs, states = [y, all_c], [h_n, c_n]
    if step:
        return [torch.from_numpy(s[0, 0] if single else s[0]) for s in states]
    if packed:
        order = slice(None) if x.sorted_indices is None else x.sorted_indices.numpy()
        outs = [np.concatenate([z[t, order][:size] for t, size in enumerate(x.batch_sizes)]) for z in outs]
    elif single:
        outs, states = [z[:, 0] for z in outs], [s[:, 0] for s in states]
    elif first:
        outs = [z.swapaxes(0, 1) for z in outs]
    found = [outs[0], *states, *([outs[1]] if given.get("return_cells") else [])]
    return [torch.from_numpy(np.ascontiguousarray(z)) for z in found]


def double(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, PackedSequence):
        return PackedSequence(double(value.data), *value[1:])
    return tree_map(_double, value)


def _double(x: Any) -> Any:
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        return x.astype(np.float64)
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def results(name: str, arguments: Arguments) -> list[Any]:
    torch.manual_seed(1)
    found = PUBLIC[name](**arguments)
    return [torch.as_tensor(x) if isinstance(x, np.ndarray) else x for x in tree_leaves(_plain(found))]


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
    if not any(isinstance(x, Tensor) and x.is_floating_point() and not x.is_meta for x in found):
        return None
    right = exact(name, arguments)
    given = [x.data if isinstance(x, PackedSequence) else x for x in arguments.values()]
    dtype = next((x.dtype for x in given if isinstance(x, Tensor) and x.is_floating_point()), None)
    if right is not None and dtype is not None and any(x.dtype != dtype for x in found):
        return f"dtypes {[x.dtype for x in found]} for {dtype}"
    if right is None:
        # A loss has parameters of its own, and random numbers are others in float64.
        if name in ("hessian", "hvp", "LSTM", "LSTMCell", "ABCNN", "AttentionFeatures") or name.endswith("_"):
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
    described = f"{number} {name}"
    print(described, flush=True)  # before it runs, so that a crash has a name
    arguments = VALID[name](draw)
    others = {key: p.default for key, p in inspect.signature(PUBLIC[name]).parameters.items()}
    others = {
        k: v for k, v in others.items() if v is not inspect.Parameter.empty and k not in ("device", "dtype")
    }
    keys = [key for key in {**arguments, **others} if key != "self"]
    valid = not keys or draw.random() < 0.35
    if not valid:
        key = draw.choice(keys)
        what, value = draw.choice(list(spoilt(draw, arguments.get(key, others.get(key)))))
        described += f", {key}: {what}"
        arguments[key] = value
        print(described, flush=True)
    try:
        return described, disagreement(name, arguments)
    except Exception as error:
        kinds: tuple[type[Exception], ...] = TypeError, ValueError, MemoryError
        said = str(error)
        if type(error) is RuntimeError and re.match(r"(x|input|loss_fn|params|op|vector)\S*: expected", said):
            kinds = (RuntimeError,)
        as_said = not valid and type(error) in kinds and named(name, arguments, said)
        return described, None if as_said else f"{type(error).__name__}: {said}"


def batch(first: int, last: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number in range(first, last):
        described, wrong = fault(number)
        if wrong:
            print(f"FAULT {described}: {' '.join(wrong.split())[:300]}", flush=True)
    print("END", flush=True)


def faults(first: int, last: int) -> list[str]:
    """Those of a batch in a process of its own. One that ends or hangs is the fault of its last call, and
    another process takes the calls after it.
    """
    found: list[str] = []
    while first < last:
        command = [sys.executable, __file__, "batch", str(first), str(last)]
        try:
            run = subprocess.run(command, capture_output=True, timeout=TIMEOUT, env=os.environ | FOLDER)
            said, how = run.stdout, f"ends the process with {run.returncode}: {run.stderr[-300:].decode()}"
        except subprocess.TimeoutExpired as hung:
            said, how = hung.stdout or b"", f"hangs for {TIMEOUT} s"
        lines = said.decode().splitlines()
        found += [line for line in lines if line.startswith("FAULT")]
        if lines and lines[-1] == "END":
            break
        begun = [line for line in lines if re.match(r"\d+ ", line)]
        if not begun:
            return [*found, f"FAULT before call {first}: {how}"]
        found.append(f"FAULT {begun[-1]}: {how}")
        first = int(begun[-1].split()[0]) + 1
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
