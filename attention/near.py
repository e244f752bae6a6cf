"""The near pairs of a tile (see tiled.py): found in a few passes, their rows gathered a few at a time.

Shapes: q (B, Q, D), a (B, A, D). A pair's place is its position in the tile, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Block
from .operands import Operands, Scratch

# Pairs are first looked at in groups of so many, most of which hold no near one.
GROUP = 8
# Elements of the room that the rows of near pairs are gathered in.
SCRATCH = 1 << 18


class Near(NamedTuple):
    """The near pairs of one tile: their places in it, ascending, and their distances."""

    place: Tensor
    distance: Tensor


def groups_within(values: Tensor, bound: float) -> Tensor:
    """The groups in which not all values exceed the bound.

    Group n holds the values at n, n + N, n + 2N, ... for N groups, so that its minimum is one of vectors;
    what is left over at the end is in none. Several times faster than looking for single values.
    """
    N = values.numel() // GROUP
    smallest = values.view(-1)[: N * GROUP].view(GROUP, N).amin(0)
    return torch.gt(smallest, bound).logical_not_().nonzero().squeeze(1)


def places_within(values: Tensor, groups: Tensor, bound: float) -> Tensor:
    """Where in these groups, or in none, values do not exceed the bound, in ascending order."""
    values = values.view(-1)
    N = values.shape[0] // GROUP
    found = values[: N * GROUP].view(GROUP, N).index_select(1, groups)
    turn, column = torch.gt(found, bound).logical_not_().nonzero().unbind(1)
    place = groups.index_select(0, column).add_(turn, alpha=N)
    if values.shape[0] == N * GROUP:
        return place
    rest = torch.gt(values[N * GROUP :], bound).logical_not_().nonzero().squeeze(1)
    return torch.cat([place, rest + N * GROUP])


def extreme_places(x: Operands, block: Block, safe: Tensor) -> Tensor:
    """The places of the real pairs whose squares are not `safe`: from now on differences are scaled."""
    x.extreme = True
    x.fill_padding(block, safe, True)
    return safe.logical_not_().view(-1).nonzero().squeeze(1)


def near_pairs(x: Operands, block: Block, place: Tensor) -> Near | None:
    """The pairs at these places of a tile, with their distances from the differences."""
    if place.shape[0] == 0:
        return None
    distance = x.q.new_empty(place.shape[0])
    for some, _, _, step in differences(x, block, place):
        if x.extreme:
            largest = step.abs().amax(1, keepdim=True)
            largest.masked_fill_((largest == 0) | ~largest.isfinite(), 1)
            torch.mul(torch.linalg.vector_norm(step.div_(largest), dim=1), largest[:, 0], out=distance[some])
        else:
            torch.linalg.vector_norm(step, dim=1, out=distance[some])
    return Near(place, distance)


def pair_rows(x: Operands, block: Block, place: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in q (B*Q, D) and in a (B*A, D) of the pairs at these places of a tile."""
    (_, Q, A), (_, rows, cols) = x.sizes, block.shape
    line = place // cols  # batch in the tile * rows + row in the tile
    batch = line // rows
    q_row = line + (batch * (Q - rows) + (block.b.start * Q + block.i.start))
    a_row = place - line * cols + (batch * A + (block.b.start * A + block.j.start))
    return q_row, a_row


_scratch = Scratch(SCRATCH)


def differences(x: Operands, block: Block, place: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """The pairs at these places of a tile, a few at a time: which, their rows in q and a, and q - a (n, D).

    What is yielded holds until the next.
    """
    q_rows, a_rows = pair_rows(x, block, place)
    D = x.q.shape[2]
    step = max(1, SCRATCH // (2 * D))
    for start in range(0, place.shape[0], step):
        some = slice(start, min(start + step, place.shape[0]))
        q_row, a_row = q_rows[some], a_rows[some]
        q, a = _scratch.two((q_row.shape[0], D), (q_row.shape[0], D), x.q)
        torch.index_select(x.q.view(-1, D), 0, q_row, out=q)
        torch.index_select(x.a.view(-1, D), 0, a_row, out=a)
        yield some, q_row, a_row, q.sub_(a)
