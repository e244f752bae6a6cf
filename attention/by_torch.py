"""What the ops of `ops.py` compute with PyTorch's own operations, tile by tile: any device, any dtype.

The backward pass computes everything again but reductions, which are saved. Every function takes the
arguments of its op; `precision` is the kernels' and means nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gatematch.ops import Grads
from gatematch.precision import library_products

from . import tiled
from .blocks import Block, squares, whole_rows
from .operands import Operands

Lengths = Tensor | None


def attention(
    q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, precision: str, save: bool
) -> tuple[Tensor, None, None]:
    with library_products(q.device.type):
        S = tiled.attention(Operands(q, a, q_lengths, a_lengths))[0]
    return S.to(q.dtype), None, None


def attention_backward(
    q: Tensor,
    a: Tensor,
    W: Tensor,
    centre: Tensor,
    g: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    precision: str,
    wanted: list[bool],
) -> Grads:
    with library_products(q.device.type):
        grads = attention_gradients(Operands(q, a, q_lengths, a_lengths), g)
    return tuple(grad.to(q.dtype) for grad in grads)


def attention_gradients(x: Operands, g: Tensor) -> tuple[Tensor, Tensor]:
    g = g.to(x.q.dtype)
    return tiled.backward(x, whole_rows(x.sizes), lambda block, S: block.of_pairs(g))


def attend(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    normalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor | None]:
    with library_products(q.device.type):
        x = Operands(q, a, q_lengths, a_lengths)
        O, r = tiled.attend(x, values(x, v), normalize)
    return O if normalize else O.to(v.dtype), r


def attend_backward(
    q: Tensor,
    a: Tensor,
    v: Tensor,
    O: Tensor,
    r: Tensor,
    g: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    precision: str,
    wanted: list[bool],
) -> Grads:
    normalized = (O, r) if r.dim() == 2 else ()
    with library_products(q.device.type):
        grads = attend_gradients(Operands(q, a, q_lengths, a_lengths), v, normalized, g)
    return tuple(grad.to(q.dtype) for grad in grads)


def values(x: Operands, v: Tensor) -> Tensor:
    """v in the precision of the tiles, 0 past its lengths."""
    v = v.to(x.q.dtype)
    return v if x.a_padding is None else v.masked_fill(x.a_padding, 0)


def attend_gradients(
    x: Operands, v: Tensor, normalized: Sequence[Tensor], g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`normalized` is O and r where O is, else nothing."""
    g, v = g.to(x.q.dtype), values(x, v)
    grad_v = v.new_zeros(v.shape)
    # O_i = sum_j S_ij v_j / r_i and r_i = sum_j S_ij, so dL/dS_ij = (g_i / r_i)·(v_j - O_i).
    mean = None
    if normalized:
        O, r = normalized
        g = g / r[..., None]
        mean = torch.linalg.vecdot(g, O)[..., None]

    def upstream(block: Block, S: Tensor) -> Tensor:
        block.of_a(grad_v).baddbmm_(S.mT, block.of_q(g))
        tile = torch.bmm(block.of_q(g), block.of_a(v).mT)
        return tile if mean is None else tile.sub_(block.of_q(mean))

    return *tiled.backward(x, squares(x.sizes), upstream), grad_v


def sums(
    q: Tensor, a: Tensor, q_lengths: Lengths, a_lengths: Lengths, precision: str
) -> tuple[Tensor, Tensor]:
    with library_products(q.device.type):
        return tiled.sums(Operands(q, a, q_lengths, a_lengths))


def sums_backward(
    q: Tensor,
    a: Tensor,
    g_rows: Tensor,
    g_cols: Tensor,
    q_lengths: Lengths,
    a_lengths: Lengths,
    precision: str,
    wanted: list[bool],
) -> Grads:
    with library_products(q.device.type):
        grads = sums_gradients(Operands(q, a, q_lengths, a_lengths), g_rows, g_cols)
    return tuple(grad.to(q.dtype) for grad in grads)


def sums_gradients(x: Operands, g_rows: Tensor, g_cols: Tensor) -> tuple[Tensor, Tensor]:
    g_rows, g_cols = g_rows.to(x.q.dtype), g_cols.to(x.q.dtype)

    def upstream(block: Block, S: Tensor) -> Tensor:
        return block.of_q(g_rows)[..., None] + block.of_a(g_cols)[:, None]

    return tiled.backward(x, squares(x.sizes), upstream)
