"""Pairwise attention as ops ``torch.ops.gatematch.pairwise_*``, opaque to torch.compile.

`impl` says who computes: "torch" (by_torch.py) on any device and in any dtype, or "triton" (by_triton.py).
core/ops.py makes derivatives and vmap from what is declared here.

Shapes: q (B, Q, D), a (B, A, D), v (B, A, V), S (B, Q, A), lengths (B,). What an op leaves out is empty.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gatematch.ops import Grads, Op, no_autocast
from gatematch.precision import library_products

from . import by_torch
from .reference import pairwise_attend_reference, pairwise_attention_reference, pairwise_sums_reference

Lengths = Tensor | None


@functools.cache
def _by(impl: str) -> ModuleType:
    if impl == "torch":
        return by_torch
    # Imported when it is first used, since it needs Triton.
    from . import by_triton

    return by_triton


def _products(x: Tensor) -> AbstractContextManager[Any]:
    """Exact products, whatever autocast and torch's switches say; a compiler cannot follow their lock."""
    return no_autocast(x) if torch.compiler.is_compiling() else library_products(x.device.type)


def _wide(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A reference that computes in float32 at least."""

    def wide(x: Any) -> Any:
        floats = isinstance(x, Tensor) and x.is_floating_point()
        return x.to(torch.promote_types(x.dtype, torch.float32)) if floats else x

    @functools.wraps(reference)
    def computed(*args: Any, **named: Any) -> Any:
        return reference(*map(wide, args), **{name: wide(x) for name, x in named.items()})

    return computed


# Elements of the differences (B, rows, A, D) that the reference holds at a time in forward mode.
TILE = 1 << 22


def by_reference(op: Op, q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, **others: Any) -> Any:
    """The results of an op by its reference, some rows of q at a time, in the dtype of q."""
    rows = max(1, TILE // max(1, a.numel()))
    # Sizes that a compiler knows are not those of every call.
    tiles = [q] if torch.compiler.is_compiling() or q.shape[1] <= rows else q.split(rows, 1)
    found = []
    with _products(q):
        for tile in tiles:
            found.append(op.reference(tile, a, q_lengths=q_lengths, a_lengths=a_lengths, **others))
            q_lengths = None if q_lengths is None else q_lengths.long() - rows
    if op is sums:
        r, c = zip(*found, strict=True)
        return torch.cat(r, 1).to(q.dtype), torch.stack(c).sum(0).to(q.dtype)
    return torch.cat(found, 1).to(q.dtype)


def _attention(
    q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, impl: str, precision: str, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return _by(impl).attention(q, a, q_lengths, a_lengths, precision, save)


def _fake_attention(
    q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, impl: str, precision: str, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    (B, Q, D), A = q.shape, a.shape[1]
    S, W, centre = q.new_empty(B, Q, A), None, None
    if save and impl == "triton":
        kept = _by(impl).pairwise
        W = q.new_empty(B, Q, kept.kept_columns(A), dtype=kept.kept_dtype(q.dtype))
        if kept.takes_centre(q):
            centre = q.new_empty(B, D, dtype=torch.float32)
    return S, W, centre


def _attention_backward(
    q: Tensor,
    a: Tensor,
    W: Tensor,
    centre: Tensor,
    g_S: Tensor | None,
    q_lengths: Lengths,
    a_lengths: Lengths,
    impl: str,
    precision: str,
    wanted: list[bool],
) -> Grads:
    return _by(impl).attention_backward(q, a, W, centre, g_S, q_lengths, a_lengths, precision, wanted)


# S, and what "triton" saves: W (B, Q, A up to a multiple of 8), centre (B, D).
attention = Op(
    "pairwise_attention",
    _attention,
    _fake_attention,
    _attention_backward,
    _wide(pairwise_attention_reference),
    outputs=("S", "W", "centre"),
    results=1,
    wrt=("q", "a"),
    batch=dict.fromkeys(("q", "a", "q_lengths", "a_lengths", "S", "W", "centre"), 0),
    spared=lambda impl, **call: ("W", "centre") if impl == "torch" else (),
    products=_products,
)


def _attend(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    normalize: bool,
    impl: str,
    precision: str,
) -> tuple[Tensor, Tensor | None]:
    return _by(impl).attend(q, a, v, q_lengths, a_lengths, normalize, precision)


def _fake_attend(
    q: Tensor, a: Tensor, v: Tensor, q_lengths: Lengths, a_lengths: Lengths, normalize: bool, *others: Any
) -> tuple[Tensor, Tensor | None]:
    exact = torch.promote_types(q.dtype, torch.float32)
    O = v.new_empty(*q.shape[:2], v.shape[2], dtype=exact if normalize else v.dtype)
    return O, q.new_empty(q.shape[:2], dtype=exact) if normalize else None


def _attend_backward(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    O: Tensor,
    r: Tensor,
    g_O: Tensor | None,
    q_lengths: Lengths,
    a_lengths: Lengths,
    normalize: bool,
    impl: str,
    precision: str,
    wanted: list[bool],
) -> Grads:
    return _by(impl).attend_backward(q, a, v, O, r, g_O, q_lengths, a_lengths, precision, wanted)


@_wide
def _attend_reference(
    q: Tensor, a: Tensor, v: Tensor, q_lengths: Lengths, a_lengths: Lengths, normalize: bool
) -> Tensor:
    return pairwise_attend_reference(q, a, v, q_lengths, a_lengths, "rows" if normalize else None)


# O = S @ v (B, Q, V). With `normalize` its rows are divided by their sums r (B, Q), and both are in float32
# at least.
attend = Op(
    "pairwise_attend",
    _attend,
    _fake_attend,
    _attend_backward,
    _attend_reference,
    outputs=("O", "r"),
    results=1,
    wrt=("q", "a", "v"),
    batch=dict.fromkeys(("q", "a", "v", "q_lengths", "a_lengths", "O", "r"), 0),
    spared=lambda normalize, **call: () if normalize else ("O",),
    products=_products,
)


def _sums(
    q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, impl: str, precision: str
) -> tuple[Tensor, Tensor]:
    return _by(impl).sums(q, a, q_lengths, a_lengths, precision)


def _fake_sums(q: Tensor, a: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape[:2], dtype=exact), q.new_empty(a.shape[:2], dtype=exact)


def _sums_backward(
    q: Tensor,
    a: Tensor,
    g_rows: Tensor | None,
    g_cols: Tensor | None,
    q_lengths: Lengths,
    a_lengths: Lengths,
    impl: str,
    precision: str,
    wanted: list[bool],
) -> Grads:
    exact = torch.promote_types(q.dtype, torch.float32)
    g_rows = q.new_zeros(q.shape[:2], dtype=exact) if g_rows is None else g_rows
    g_cols = q.new_zeros(a.shape[:2], dtype=exact) if g_cols is None else g_cols
    return _by(impl).sums_backward(q, a, g_rows, g_cols, q_lengths, a_lengths, precision, wanted)


# Row sums (B, Q) and column sums (B, A) of S, in float32 at least.
sums = Op(
    "pairwise_sums",
    _sums,
    _fake_sums,
    _sums_backward,
    _wide(pairwise_sums_reference),
    outputs=("rows", "cols"),
    results=2,
    wrt=("q", "a"),
    batch=dict.fromkeys(("q", "a", "q_lengths", "a_lengths", "rows", "cols"), 0),
    products=_products,
)
