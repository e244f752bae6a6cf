"""The cases `pairwise/`: S itself and S @ v, beside what one writes with torch.

Data: Gaussian rows; the same on a common offset; or text, words of a Zipf vocabulary's embedding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gatematch.attention import pairwise_attend, pairwise_attention

from .problems import Case, Function, Part, Problem, Work, has_compiler

# Elements of the differences that the float64 check may hold: 1 GiB.
_CHECKED = 1 << 27
_BROADCAST_BYTES = 1 << 29
_SCORES_BYTES = 1 << 33

Scores = Callable[[Tensor, Tensor], Tensor]


def rows(case: Case, device: torch.device, data: str) -> tuple[Tensor, Tensor]:
    B, Q, A, D = (case.shape[letter] for letter in "BQAD")
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
    differences = q.shape[0] * q.shape[1] * a.shape[1] * q.shape[2]
    if q.is_cuda and q.requires_grad and torch.is_grad_enabled() and differences >= 2**31:
        # Its kernel counts them in 32 bits and writes elsewhere, after which no call of CUDA works.
        raise RuntimeError("cdist's backward counts differences in 32 bits, and there are more")
    return 1 / (1 + torch.cdist(q, a, compute_mode="donot_use_mm_for_euclid_dist"))


def broadcast(q: Tensor, a: Tensor) -> Tensor:
    return 1 / (1 + torch.linalg.vector_norm(q[:, :, None] - a[:, None], dim=-1))


def expansion(q: Tensor, a: Tensor) -> Tensor:
    squared = q.square().sum(-1)[:, :, None] + a.square().sum(-1)[:, None] - 2 * q @ a.mT
    return 1 / (1 + squared.clamp_min(1e-30).sqrt())


def in_float32(scores: Scores) -> Scores:
    """For 16-bit rows, which cdist does not take or gets wrong."""
    return lambda q, a: scores(q.float(), a.float()).to(q.dtype)


def flex(q: Tensor, a: Tensor, v: Tensor) -> Tensor:
    """S @ v with the rows of S normalised, as a softmax of -log(1 + d)."""
    from torch.nn.attention.flex_attention import flex_attention

    q_squares, a_squares = q.float().square().sum(-1), a.float().square().sum(-1)

    def score(qa: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        squared = q_squares[b, i] + a_squares[b, j] - 2 * qa
        return -torch.log1p(squared.clamp_min(1e-30).sqrt())

    result = flex_attention(q[:, None], a[:, None], v[:, None], score_mod=score, scale=1.0)
    assert isinstance(result, Tensor)
    return result[:, 0]


def keops(q: Tensor, a: Tensor, v: Tensor, normalize: str | None) -> Tensor:
    from pykeops.torch import LazyTensor

    d = ((LazyTensor(q[:, :, None]) - LazyTensor(a[:, None])) ** 2).sum(-1).sqrt()
    S = 1 / (1 + d)
    attended = (S * LazyTensor(v[:, None])).sum(2)
    return attended / S.sum(2) if normalize == "rows" else attended


def of_scores(op: str, normalize: str | None, scores: Scores) -> Function:
    """The op of (q, a) or (q, a, v), from S in memory."""

    def attend(q: Tensor, a: Tensor, v: Tensor) -> Tensor:
        S = scores(q, a)
        return S @ v / S.sum(-1, keepdim=True) if normalize == "rows" else S @ v

    return attend if op == "attend" else scores


def pairwise_problem(case: Case, device: torch.device, compiled: bool) -> Problem:
    op, normalize = case.options.get("op", "attention"), case.options.get("normalize")
    inputs = list(rows(case, device, case.data))
    B, Q, A, D = (case.shape[letter] for letter in "BQAD")
    if op == "attend":
        v = torch.randn(B, A, case.shape["V"], device=device).to(case.dtype)
        inputs.append(v.requires_grad_())
    impl = "triton" if device.type == "cuda" else "auto"
    if op == "attend":
        ours: Function = partial(pairwise_attend, normalize=normalize, impl=impl)
    else:
        ours = partial(pairwise_attention, impl=impl)

    names: dict[str, Scores] = {"cdist, fast mode": cdist_fast, "cdist, exact mode": cdist_exact}
    if case.dtype in (torch.float16, torch.bfloat16):
        names = {name: in_float32(scores) for name, scores in names.items()}
    skipped = {}
    if B * Q * A * D * inputs[0].element_size() <= _BROADCAST_BYTES:
        names["broadcast"] = broadcast
    else:
        skipped["broadcast"] = "its differences would take over 512 MiB"
    functions = {name: of_scores(op, normalize, scores) for name, scores in names.items()}
    fused = {"compiled expansion": of_scores(op, normalize, expansion)}
    if op == "attend" and 4 * B * Q * A > _SCORES_BYTES:
        skipped |= dict.fromkeys([*functions, *fused], "its S would take over 8 GiB")
        functions, fused = {}, {}
    if op == "attend" and normalize == "rows" and device.type == "cuda":  # its backward has no CPU kernel
        fused["FlexAttention"] = flex
    for name, function in fused.items():
        if not compiled:
            skipped[name] = "left out"
        elif has_compiler():
            functions[name] = torch.compile(function, dynamic=False)
        else:
            skipped[name] = "torch.compile needs a C++ compiler"
    if op == "attend" and case.dtype == torch.float32 and device.type == "cuda":
        if importlib.util.find_spec("pykeops"):
            functions["pykeops"] = partial(keops, normalize=normalize)
        else:
            skipped["pykeops"] = "not installed"

    part = Part.of(B, Q, max(_CHECKED // (A * D), 1), device)

    def whole(tensor: Tensor) -> Tensor:
        return tensor[part.batches]

    of_inputs = (part, whole, whole)[: len(inputs)]
    exact_wrt = [of(x).detach().double().requires_grad_() for of, x in zip(of_inputs, inputs, strict=True)]
    exact = of_scores(op, normalize, cdist_exact)
    random = None
    if case.data != "random":
        plain = [*rows(case, device, "random"), *inputs[2:]]
        random = (lambda: ours(*plain), plain)
    return Problem(
        ours=lambda: ours(*inputs),
        ours_wrt=inputs,
        peers={name: (partial(f, *inputs), inputs) for name, f in functions.items()},
        exact=lambda: exact(*exact_wrt),
        exact_wrt=exact_wrt,
        bound=_bound(op, case.dtype),
        peer_bound=1e-4 if case.dtype == torch.float32 else _bound(op, case.dtype),
        relative=op == "attend",
        part=part,
        wrt_parts=of_inputs,
        skipped=skipped,
        random=random,
        work=work(op, case.shape, case.dtype),
    )


def _bound(op: str, dtype: torch.dtype) -> float:
    """Of S absolute, of S @ v as a share of the largest."""
    if dtype == torch.float32:
        return 1e-6 if op == "attention" else 1e-5
    return torch.finfo(dtype).eps * (1 if op == "attention" else 2)


def work(op: str, shape: dict[str, int], dtype: torch.dtype) -> dict[str, Work]:
    """Products of float32 count as often as they are made, at the rate of what is multiplied: for S three
    times in float16, for its gradient six in bfloat16, for S @ v three in TF32. A root and a reciprocal for
    each pair, and in backward a reciprocal, from S, or both again where S is not in memory."""
    B, Q, A, D, V = (shape.get(letter, 0) for letter in "BQADV")
    pairs, size = B * Q * A, dtype.itemsize
    inputs = B * (Q * D + A * D + A * V) * size
    product, passes, of_gradient = str(dtype).removeprefix("torch."), 1, 1
    if dtype == torch.float32:
        product, passes, of_gradient = "float16" if op == "attention" else "tf32", 3, 6
    if op == "attention":
        forward = inputs + pairs * size, 2 * pairs * D * passes, 2 * pairs
        # S and its gradient are read, and there are a product for dq and one for da.
        backward = 2 * inputs + 2 * pairs * size, 4 * pairs * D * of_gradient, pairs
    else:
        output = B * Q * V * size
        forward = inputs + output, 2 * pairs * (D + V) * passes, 2 * pairs
        # S again and dS = g vᵀ, then dq, da and dv.
        backward = 2 * inputs + output, 2 * pairs * (3 * D + 2 * V) * passes, 2 * pairs
    both = [x + y for x, y in zip(forward, backward, strict=True)]
    return {
        "forward": Work(forward[0], forward[1], product, forward[2]),
        "forward+backward": Work(both[0], both[1], product, both[2]),
    }
