"""Pairwise attention as PyTorch ops ``torch.ops.gatematch.pairwise_*``, opaque to torch.compile.

`impl` says who computes: "torch" (`by_torch.py`) on any device and in any dtype, or "triton"
(`by_triton.py`). They know nothing of autograd: see `autograd.py`, which calls them by the functions at the
end: those go by the dispatcher only where somebody has to be told of an op.

Shapes: q (B, Q, D), a (B, A, D), v (B, A, V), S (B, Q, A), lengths (B,). What an op leaves out is empty.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from gatematch.kernels.autograd import (
    called_directly,
    fake_gradients,
    only,
    or_empty,
    refuse_forward_mode,
    refuse_tangents,
)

from . import by_torch

Lengths = Tensor | None


@functools.cache
def _by(impl: str) -> ModuleType:
    if impl == "torch":
        return by_torch
    # Imported when it is first used, since it needs Triton.
    from . import by_triton

    return by_triton


def _attention(
    q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, impl: str, precision: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """S, and if `save` what "triton" needs for backward: W (B, Q, A up to a multiple of 8), centre (B, D)."""
    refuse_forward_mode()
    S, W, centre = _by(impl).attention(q, a, q_lengths, a_lengths, precision, save)
    return S, or_empty(W, q), or_empty(centre, q)


attention_op = custom_op("gatematch::pairwise_attention", _attention, mutates_args=())


@attention_op.register_fake
def _(q: Tensor, a: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, impl, _, save = others
    (B, Q, D), A = q.shape, a.shape[1]
    W = centre = None
    if save and impl == "triton":
        kept = _by(impl).pairwise
        W = q.new_empty(B, Q, kept.kept_columns(A), dtype=kept.kept_dtype(q.dtype))
        if kept.takes_centre(q):
            centre = q.new_empty(B, D, dtype=torch.float32)
    return q.new_empty(B, Q, A), or_empty(W, q), or_empty(centre, q)


def _attention_backward(
    q: Tensor,
    a: Tensor,
    W: Tensor,
    centre: Tensor,
    g: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    impl: str,
    precision: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """dL/dq and dL/da for g = dL/dS, empty where not wanted."""
    refuse_tangents(g)
    grads = _by(impl).attention_backward(q, a, W, centre, g, q_lengths, a_lengths, precision, wanted)
    dq, da = only(grads, wanted)
    return or_empty(dq, q), or_empty(da, a)


attention_backward_op = custom_op(
    "gatematch::pairwise_attention_backward", _attention_backward, mutates_args=()
)


@attention_backward_op.register_fake
def _(q: Tensor, a: Tensor, *others: Any) -> Any:
    return fake_gradients((q, a), others[-1])


def _attend(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    normalize: bool,
    impl: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """S @ v (B, Q, V). With `normalize` its rows divided by their sums (B, Q), which come along.

    Both are then in float32 at least, for the backward pass.
    """
    refuse_forward_mode()
    O, r = _by(impl).attend(q, a, v, q_lengths, a_lengths, normalize, precision)
    return O, or_empty(r, q)


attend_op = custom_op("gatematch::pairwise_attend", _attend, mutates_args=())


@attend_op.register_fake
def _(
    q: Tensor, a: Tensor, v: Tensor, q_lengths: Lengths, a_lengths: Lengths, normalize: bool, *others: Any
) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    O = v.new_empty(*q.shape[:2], v.shape[2], dtype=exact if normalize else v.dtype)
    return O, or_empty(q.new_empty(q.shape[:2], dtype=exact) if normalize else None, q)


def _attend_backward(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    O: Tensor,
    r: Tensor,
    g: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    impl: str,
    precision: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dq, dL/da and dL/dv for g = dL/dO, empty where not wanted. r is empty where O is not normalised."""
    refuse_tangents(g)
    grads = _by(impl).attend_backward(q, a, v, O, r, g, q_lengths, a_lengths, precision, wanted)
    dq, da, dv = only(grads, wanted)
    return or_empty(dq, q), or_empty(da, a), or_empty(dv, v)


attend_backward_op = custom_op("gatematch::pairwise_attend_backward", _attend_backward, mutates_args=())


@attend_backward_op.register_fake
def _(q: Tensor, a: Tensor, v: Tensor, *others: Any) -> Any:
    return fake_gradients((q, a, v), others[-1])


def _sums(
    q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, impl: str, precision: str
) -> tuple[Tensor, Tensor]:
    """Row sums (B, Q) and column sums (B, A) of S, in float32 at least."""
    refuse_forward_mode()
    return _by(impl).sums(q, a, q_lengths, a_lengths, precision)


sums_op = custom_op("gatematch::pairwise_sums", _sums, mutates_args=())


@sums_op.register_fake
def _(q: Tensor, a: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape[:2], dtype=exact), q.new_empty(a.shape[:2], dtype=exact)


def _sums_backward(
    q: Tensor,
    a: Tensor,
    g_rows: Tensor,
    g_cols: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    impl: str,
    precision: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """dL/dq and dL/da for the gradients of both sums, empty where not wanted."""
    refuse_tangents(g_rows, g_cols)
    grads = _by(impl).sums_backward(q, a, g_rows, g_cols, q_lengths, a_lengths, precision, wanted)
    dq, da = only(grads, wanted)
    return or_empty(dq, q), or_empty(da, a)


sums_backward_op = custom_op("gatematch::pairwise_sums_backward", _sums_backward, mutates_args=())


@sums_backward_op.register_fake
def _(q: Tensor, a: Tensor, *others: Any) -> Any:
    return fake_gradients((q, a), others[-1])


def _called(op: CustomOpDef, function: Callable[..., Any]) -> Callable[..., Any]:
    """What calls the op, or the function itself that it is made of."""
    return lambda *args: (function if called_directly(*args) else op)(*args)


attention = _called(attention_op, _attention)
attention_backward = _called(attention_backward_op, _attention_backward)
attend = _called(attend_op, _attend)
attend_backward = _called(attend_backward_op, _attend_backward)
sums = _called(sums_op, _sums)
sums_backward = _called(sums_backward_op, _sums_backward)
