"""The table of cases: what is run, on which data, beside which peers, and what is right.

It feeds `gatematch-bench speed` and the pytest-benchmark suite. A case builds one `Problem`: inputs, our
function, the peers' functions of the same inputs, and the true result in float64.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gatematch.attention import pairwise_attention
from gatematch.lstm import LSTM, LSTMCell

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One row of the table; shape letters as everywhere: T B I H P L, and B Q A D."""

    name: str
    shape: dict[str, int]
    data: str = "random"
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Problem:
    """Functions without arguments that give the output, each with what it depends on, in one order."""

    ours: Function
    ours_wrt: list[Tensor]
    peers: dict[str, tuple[Function, list[Tensor]]]
    exact: Function
    exact_wrt: list[Tensor]
    # Largest error allowed in the output: ours, and a peer's before it counts as wrong.
    bound: float
    peer_bound: float
    relative: bool
    # Of the output and of each gradient, the part that `exact` computes.
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor
    skipped: dict[str, str] = field(default_factory=dict)
    # Ours on random rows of the same shape, for data that could be slower.
    random: tuple[Function, list[Tensor]] | None = None


def _pairwise(name: str, B: int, Q: int, A: int, D: int, data: str = "random", **more: Any) -> Case:
    return Case(f"pairwise/{name}", {"B": B, "Q": Q, "A": A, "D": D}, data, **more)


def _lstm(
    name: str, T: int, B: int, I: int, H: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Case:
    return Case(f"lstm/{name}", {"T": T, "B": B, "I": I, "H": H}, dtype=dtype, options=options)


CASES = [
    _lstm("single-step", 1, 1, 64, 64),
    _lstm("decode", 1, 8, 256, 256),
    _lstm("short", 32, 16, 64, 64, compiled=True),
    _lstm("odd", 63, 5, 65, 63),
    _lstm("medium", 100, 16, 128, 256),
    _lstm("bidirectional-2-layers", 50, 16, 128, 128, num_layers=2, bidirectional=True),
    _lstm("projection", 50, 16, 128, 128, proj_size=64),
    _lstm("batch-first", 50, 32, 64, 128, batch_first=True),
    _lstm("variable-length", 64, 32, 128, 128, lengths=True),
    _lstm("variable-length-bidirectional", 64, 32, 128, 128, lengths=True, bidirectional=True),
    _lstm("bfloat16", 32, 16, 128, 128, dtype=torch.bfloat16),
    _lstm("cell", 1, 32, 128, 128, cell=True),
    _pairwise("one-pair-of-sentences", 1, 40, 40, 300),
    _pairwise("sentences-50", 256, 40, 40, 50),
    _pairwise("sentences-50", 256, 40, 40, 50, "text"),
    _pairwise("sentences-300", 64, 40, 40, 300),
    _pairwise("sentences-300", 64, 40, 40, 300, "text"),
    _pairwise("odd", 4, 65, 63, 300),
    _pairwise("paragraphs", 32, 128, 128, 64),
    _pairwise("documents", 8, 512, 512, 128),
    _pairwise("documents", 8, 512, 512, 128, "offset"),
    _pairwise("documents-300", 16, 512, 512, 300),
    _pairwise("long", 1, 2048, 2048, 128),
    _pairwise("narrow", 8, 512, 512, 16),
    _pairwise("points", 8, 512, 512, 3),
]


def has_compiler() -> bool:
    """Whether torch.compile can work: it needs a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))


def build(case: Case, device: torch.device, compiled: bool = True) -> Problem:
    """The problem of one case, from fresh random inputs; `compiled` adds the peers of torch.compile."""
    make = pairwise_problem if case.name.startswith("pairwise/") else lstm_problem
    return make(case, device, compiled)


# Pairwise attention


def rows(case: Case, device: torch.device, data: str) -> tuple[Tensor, Tensor]:
    """q and a: Gaussian rows; the same on a common offset; or words of a Zipf vocabulary's embedding."""
    B, Q, A, D = case.shape.values()
    if data == "text":
        vocabulary = torch.randn(10_000, D, device=device)
        frequency = 1 / torch.arange(1.0, 10_001, device=device)
        q, a = (vocabulary[torch.multinomial(frequency, B * n, True).view(B, n)] for n in (Q, A))
    else:
        q, a = torch.randn(B, Q, D, device=device), torch.randn(B, A, D, device=device)
        if data == "offset":
            q, a = q + 10, a + 10
    return q.to(case.dtype).requires_grad_(), a.to(case.dtype).requires_grad_()


def cdist_fast(q: Tensor, a: Tensor) -> Tensor:
    return 1 / (1 + torch.cdist(q, a, compute_mode="use_mm_for_euclid_dist"))


def cdist_exact(q: Tensor, a: Tensor) -> Tensor:
    return 1 / (1 + torch.cdist(q, a, compute_mode="donot_use_mm_for_euclid_dist"))


def broadcast(q: Tensor, a: Tensor) -> Tensor:
    return 1 / (1 + torch.linalg.vector_norm(q[:, :, None] - a[:, None], dim=-1))


def expansion(q: Tensor, a: Tensor) -> Tensor:
    squared = q.square().sum(-1)[:, :, None] + a.square().sum(-1)[:, None] - 2 * q @ a.mT
    return 1 / (1 + squared.clamp_min(1e-30).sqrt())


def pairwise_problem(case: Case, device: torch.device, compiled: bool) -> Problem:
    q, a = rows(case, device, case.data)
    B, Q, A, D = case.shape.values()
    functions = {"cdist, fast mode": cdist_fast, "cdist, exact mode": cdist_exact}
    skipped = {}
    if B * Q * A * D * q.element_size() <= 1 << 29:
        functions["broadcast"] = broadcast
    else:
        skipped["broadcast"] = "its differences would take over 512 MiB"
    if not compiled:
        skipped["compiled expansion"] = "left out"
    elif has_compiler():
        functions["compiled expansion"] = torch.compile(expansion, dynamic=False)
    else:
        skipped["compiled expansion"] = "torch.compile needs a C++ compiler"

    # Sentences are independent: some of them stand for all in the float64 check.
    few = max(1, (1 << 20) // (Q * A))
    exact_wrt = [tensor.detach()[:few].double().requires_grad_() for tensor in (q, a)]
    random = None
    if case.data != "random":
        plain = list(rows(case, device, "random"))
        random = (lambda: pairwise_attention(*plain), plain)
    return Problem(
        ours=lambda: pairwise_attention(q, a),
        ours_wrt=[q, a],
        peers={name: ((lambda f=f: f(q, a)), [q, a]) for name, f in functions.items()},
        exact=lambda: cdist_exact(*exact_wrt),
        exact_wrt=exact_wrt,
        bound=1e-6 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps,
        peer_bound=1e-4,
        relative=False,
        part=lambda tensor: tensor[:few],
        skipped=skipped,
        random=random,
    )


# LSTM


def lstm_problem(case: Case, device: torch.device, compiled: bool) -> Problem:
    T, B, I, H = case.shape.values()
    options = dict(case.options)
    with_lengths, loop = options.pop("lengths", False), options.pop("compiled", False)
    if options.pop("cell", False):
        return _cell_problem(case, device)
    peer = nn.LSTM(I, H, device=device, dtype=case.dtype, **options)
    ours = LSTM(I, H, device=device, dtype=case.dtype, **options)
    ours.load_state_dict(peer.state_dict())
    exact = nn.LSTM(I, H, device=device, dtype=torch.float64, **options)
    exact.load_state_dict(peer.state_dict())
    first = options.get("batch_first", False)
    x = torch.randn(*((B, T) if first else (T, B)), I, device=device, dtype=case.dtype, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    lengths = torch.randint(T // 8, T + 1, (B,)) if with_lengths else None
    if lengths is not None:
        lengths[0] = T

    def packed(module: nn.Module, x: Tensor) -> Tensor:
        if lengths is None:
            return module(x)[0]
        y, _ = module(pack_padded_sequence(x, lengths, first, enforce_sorted=False))
        return pad_packed_sequence(y, first, total_length=T)[0]

    on_device = None if lengths is None else lengths.to(device)
    peers: dict[str, tuple[Function, list[Tensor]]] = {
        "torch.nn.LSTM": (lambda: packed(peer, x), [x, *peer.parameters()])
    }
    skipped = {}
    if loop:
        if not compiled:
            skipped["compiled loop"] = "left out"
        elif has_compiler():
            peers["compiled loop"] = (_compiled_loop(peer, x), [x, *peer.parameters()])
        else:
            skipped["compiled loop"] = "torch.compile needs a C++ compiler"
    return Problem(
        ours=lambda: ours(x, lengths=on_device)[0],
        ours_wrt=[x, *ours.parameters()],
        peers=peers,
        exact=lambda: packed(exact, x64),
        exact_wrt=[x64, *exact.parameters()],
        skipped=skipped,
        **_lstm_bounds(case.dtype),
    )


def _lstm_bounds(dtype: torch.dtype) -> dict[str, Any]:
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}[dtype]
    return {"bound": bound, "peer_bound": bound, "relative": True}


def _cell_problem(case: Case, device: torch.device) -> Problem:
    _, B, I, H = case.shape.values()
    peer = nn.LSTMCell(I, H, device=device, dtype=case.dtype)
    ours, exact = LSTMCell(I, H, device=device, dtype=case.dtype), nn.LSTMCell(I, H, device=device).double()
    ours.load_state_dict(peer.state_dict())
    exact.load_state_dict(peer.state_dict())
    x = torch.randn(B, I, device=device, dtype=case.dtype, requires_grad=True)
    h, c = (torch.randn(B, H, device=device, dtype=case.dtype, requires_grad=True) for _ in range(2))
    x64, h64, c64 = (tensor.detach().double().requires_grad_() for tensor in (x, h, c))
    return Problem(
        ours=lambda: ours(x, (h, c))[0],
        ours_wrt=[x, h, c, *ours.parameters()],
        peers={"torch.nn.LSTMCell": (lambda: peer(x, (h, c))[0], [x, h, c, *peer.parameters()])},
        exact=lambda: exact(x64, (h64, c64))[0],
        exact_wrt=[x64, h64, c64, *exact.parameters()],
        **_lstm_bounds(case.dtype),
    )


def _compiled_loop(peer: nn.LSTM, x: Tensor) -> Function:
    """What users write when they need more than nn.LSTM: a loop over a compiled step."""

    def step(
        gates_x: Tensor, h: Tensor, c: Tensor, W_hh: Tensor, b_ih: Tensor, b_hh: Tensor
    ) -> tuple[Tensor, Tensor]:
        i, f, g, o = (gates_x + h @ W_hh.T + b_ih + b_hh).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    compiled = torch.compile(step, dynamic=False)

    def loop() -> Tensor:
        W_ih, W_hh, b_ih, b_hh = (
            getattr(peer, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h = c = x.new_zeros(x.shape[1], W_hh.shape[1])
        outputs = []
        for gates_x in (x @ W_ih.T).unbind(0):
            h, c = compiled(gates_x, h, c, W_hh, b_ih, b_hh)
            outputs.append(h)
        return torch.stack(outputs)

    return loop
