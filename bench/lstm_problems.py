"""The cases `lstm/`: sequences, the cell and a training step, beside torch's own (cuDNN on a GPU)."""

from __future__ import annotations

from typing import Any

import torch
import torch.backends.cudnn.rnn as cudnn_rnn
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gatematch.lstm import LSTM, LSTMCell

from .problems import Case, Function, Part, Problem, has_compiler

_WORDS = 1000  # of the matcher's vocabulary
# Operations that a forward pass of the float64 check may take.
_CHECKED = 1 << 39


def lstm_problem(case: Case, device: torch.device, compiled: bool) -> Problem:
    if "cell" in case.options:
        return _cell_problem(case, device)
    if "matcher" in case.options:
        return _matcher_problem(case, device)
    T, B, I, H = (case.shape[letter] for letter in "TBIH")
    options = dict(case.options)
    with_lengths, loop = options.pop("lengths", False), options.pop("compiled", False)
    peer = nn.LSTM(I, H, device=device, dtype=case.dtype, **options)
    if device.type == "cuda" and case.dtype == torch.bfloat16 and torch.backends.cudnn.is_available():
        flatten(peer)
    ours = LSTM(I, H, device=device, dtype=case.dtype, impl=_impl(device), **options)
    ours.load_state_dict(peer.state_dict())
    exact = nn.LSTM(I, H, device=device, dtype=torch.float64, **options)
    exact.load_state_dict(peer.state_dict())
    first = options.get("batch_first", False)
    x = torch.randn(*((B, T) if first else (T, B)), I, device=device, dtype=case.dtype, requires_grad=True)
    part = _part(case, device)
    x64 = (part(x) if part else x).detach().double().requires_grad_()
    lengths = torch.randint(T // 8, T + 1, (B,)) if with_lengths else None
    if lengths is not None:
        lengths[0] = T
    lengths64 = lengths if lengths is None or part is None else lengths[part.rows.cpu()]

    def packed(module: nn.Module, x: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is None:
            return module(x)[0]
        y, _ = module(pack_padded_sequence(x, lengths, first, enforce_sorted=False))
        return pad_packed_sequence(y, first, total_length=T)[0]

    on_device = None if lengths is None else lengths.to(device)
    peers: dict[str, tuple[Function, list[Tensor]]] = {
        "torch.nn.LSTM": (lambda: packed(peer, x, lengths), [x, *peer.parameters()])
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
        exact=lambda: packed(exact, x64, lengths64),
        exact_wrt=[x64, *exact.parameters()],
        part=part,
        wrt_parts=(part, *[_whole] * len(list(exact.parameters()))) if part else (),
        skipped=skipped,
        modules=(peer,),
        **_bounds(case),
    )


def _part(case: Case, device: torch.device) -> Part | None:
    """Some rows of the batch, which do not depend on each other, where float64 would take long."""
    T, B, I, H = (case.shape[letter] for letter in "TBIH")
    cells = case.options.get("num_layers", 1) * (1 + case.options.get("bidirectional", False))
    most = max(_CHECKED // (cells * T * 8 * H * (I + H)), 2)
    rows = Part.of(1, B, most, device).rows
    return Part(torch.arange(T, device=device), rows) if len(rows) < B else None


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def flatten(peer: nn.LSTM) -> None:
    """Its weights as the one piece of memory that cuDNN wants, or else copies in every call.

    What `peer.flatten_parameters` does, which leaves out bfloat16 (torch 2.13).
    """
    weights = [weight for weight in peer._flat_weights if weight is not None]
    with torch.no_grad(), torch.cuda.device_of(weights[0]):
        torch._cudnn_rnn_flatten_weight(
            weights,
            (4 if peer.bias else 2) + (peer.proj_size > 0),
            peer.input_size,
            cudnn_rnn.get_cudnn_mode(peer.mode),
            peer.hidden_size,
            peer.proj_size,
            peer.num_layers,
            peer.batch_first,
            bool(peer.bidirectional),
        )


def _impl(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "auto"


def _bounds(case: Case) -> dict[str, Any]:
    """As a share of the largest output: roundings of a step, and what the others pass on of theirs."""
    bounds = {"float64": 1e-12, "float32": 1e-5, "tf32": 5e-3, "float16": 1e-2, "bfloat16": 2e-2}
    bound = bounds[case.numbers]
    return {"bound": bound, "peer_bound": bound, "relative": True}


def _cell_problem(case: Case, device: torch.device) -> Problem:
    B, I, H = (case.shape[letter] for letter in "BIH")
    peer = nn.LSTMCell(I, H, device=device, dtype=case.dtype)
    ours = LSTMCell(I, H, device=device, dtype=case.dtype, impl=_impl(device))
    exact = nn.LSTMCell(I, H, device=device, dtype=torch.float64)
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
        **_bounds(case),
    )


def _matcher_problem(case: Case, device: torch.device) -> Problem:
    """A training step of the model of `gatematch-bench answers`, up to its gradients, on random texts."""
    from .answers import model
    from .answers.batches import Batch, Texts
    from .answers.text import MAX_LENGTH

    B, I, H = (case.shape[letter] for letter in "BIH")
    settings = model.MatcherSettings(embedding=I, hidden=H, dropout=0.0, forget_words=0.0)
    answers = B * (1 + settings.wrong)

    def texts(number: int) -> Texts:
        lengths = torch.randint(1, MAX_LENGTH + 1, (number,), device=device)
        weights = torch.rand(number, MAX_LENGTH, device=device)
        inside = model.mask(lengths, MAX_LENGTH)
        tokens = torch.randint(_WORDS, (number, MAX_LENGTH), device=device)
        return Texts(tokens * inside, lengths, weights * inside)

    batch = Batch(
        spellings=torch.randint(1, _WORDS, (_WORDS, 4), device=device),
        questions=texts(B),
        answers=texts(answers),
        question_of=torch.arange(B, device=device).repeat_interleave(1 + settings.wrong),
    )
    right = torch.zeros(B, dtype=torch.long, device=device)
    built = [build(_WORDS, settings).to(device) for build in (model.ours, model.peer, model.ours)]
    ours, peer, exact = built
    for other in (peer, exact.double()):
        other.load_state_dict(ours.state_dict())

    def step_of(matcher: nn.Module) -> tuple[Function, list[Tensor]]:
        # A bias that all candidates share has no gradient but rounding errors.
        wrt: list[Tensor] = [
            weight for name, weight in matcher.named_parameters() if name != "compare.3.bias"
        ]
        return lambda: F.cross_entropy(matcher(batch).view(B, -1), right), wrt

    (of_ours, ours_wrt), (of_exact, exact_wrt) = step_of(ours), step_of(exact)
    return Problem(
        ours=of_ours,
        ours_wrt=ours_wrt,
        peers={"torch's pieces": step_of(peer)},
        exact=of_exact,
        exact_wrt=exact_wrt,
        modules=(peer,),
        **_bounds(case),
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
