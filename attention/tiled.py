"""Pairwise attention tile by tile: one matrix product a tile, exact near zero, little kept.

    S = 1 / (1 + d),    d²[i, j] = ||q_i||² + ||a_j||² - 2 q_i·a_j

The expansion cancels when q_i and a_j are close: it carries a rounding error of c ε (||q_i||² + ||a_j||²),
and half of all d² near 0 even come out negative. So every **near** pair, d² <= TAU (||q_i||² + ||a_j||²),
is recomputed from the difference q_i - a_j itself; the cost follows the number of near pairs. For the
others the error left in S is at most c ε / (8 TAU): with c <= 11, as measured for D up to 4096, and
TAU = 1/8 that is 7e-7 in float32.
With up to DIRECT features the differences themselves cost less, and every pair is computed from them.
A common offset of all rows changes no distance but makes all pairs look near, so it is taken out first.

With k = g / (d (1 + d)²) for g = dL/dS, and k = 0 where d = 0 (the subgradient), the gradients are

    dL/dq_i = sum_j k_ij (a_j - q_i) = (k @ a)_i - q_i sum_j k_ij
    dL/da_j = sum_i k_ij (q_i - a_j) = (kᵀ @ q)_j - a_j sum_i k_ij

and cancel for near pairs in the same way; those add k (a_j - q_i) from the difference instead.

Where S is the output, k = g S³ / (1 - S) is read from it and only the near pairs are kept beside it. The
streaming ops keep nothing and compute their tiles of d again: their memory is O(Q + A).

Shapes: q (B, Q, D), a (B, A, D), v (B, A, V), S (B, Q, A). float64 is computed in float64, everything
else in float32. Rows past their lengths get an infinite norm: their d is infinite and their S is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Block, squares, whole_rows
from .near import GROUP, Near, differences, extreme_places, groups_within, near_pairs, places_within
from .operands import LOOK, Operands

# Pairs with d² <= TAU (||q||² + ||a||²) are near.
TAU = 1 / 8
# With a larger share of groups below a tile's common threshold, look for an offset, or closer.
CROWD = 1 / 4
# Below this d, 1 - S has lost too many digits for a gradient: such tiles compute d again.
CLOSE = 1 / 16
# Near pairs are kept for the backward pass up to this share of all pairs, and searched again beyond it.
KEPT = 1 / 8


def centred(x: Operands, blocks: list[Block]) -> list[Block]:
    """These blocks, a common offset taken out before the first of several; a single one sees for itself.

    A large one is looked at first: to compute it, find it crowded and compute it again takes twice as long.
    """
    if len(blocks) > 1 or (x.a.numel() >= LOOK and x.looks_offset()):
        x.centre()
    return blocks


class Workspace:
    """Buffers of one tile, kept for a whole call: fresh memory for every tile costs more than its work."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < math.prod(shape):
            buffer = self.buffers[name] = self.like.new_empty(shape)
            return buffer
        return buffer if buffer.shape == shape else buffer.view(-1)[: math.prod(shape)].view(shape)


def distances(x: Operands, block: Block, work: Workspace, out: Tensor) -> tuple[float | None, Near | None]:
    """Fill `out` with the distances of one tile; returns what all but the near pairs exceed, and those."""
    if x.direct:
        return direct_distances(x, block, work, out)
    if not x.measured:
        x.measure()
    torch.add(block.of_q(x.q_norms), block.of_a(x.a_norms).mT, out=out)
    out.baddbmm_(block.of_q(x.q_centred), block.of_a(x.a_centred).mT, alpha=-2)
    q_squares, a_squares = block.of_q(x.q_squares), block.of_a(x.a_squares)
    bound = TAU * (q_squares.max().item() + a_squares.max().item())
    floor = out.amin().item()
    near = None
    within = 1 / x.large < bound < x.large
    # One look at the smallest d² spares most tiles of unrelated rows the search.
    if not (within and floor > bound):
        # A few pairs that are not near do no harm: the tile's largest threshold serves for all of them,
        # unless it lets many through.
        groups = groups_within(out, bound) if within else None
        if groups is not None and groups.shape[0] * GROUP <= CROWD * out.numel():
            floor, near = bound, near_pairs(x, block, places_within(out, groups, bound))
        elif x.centre():
            return distances(x, block, work, out)
        else:
            threshold = torch.add(q_squares, a_squares.mT, out=work.take("threshold", out.shape)).mul_(TAU)
            if within:
                floor = threshold.amin().item()
                over = torch.sub(out, threshold, out=threshold)
                place = places_within(over, groups_within(over, 0), 0)
            else:
                safe = (out > threshold) & (threshold > 1 / x.large) & (threshold < x.large)
                place = extreme_places(x, block, safe)
                # A product that overflows makes an infinite norm NaN.
                x.fill_padding(block, out, torch.inf)
            near = near_pairs(x, block, place)
    out.sqrt_()
    if near is not None:
        out.view(-1).index_copy_(0, near.place, near.distance)
    return max(floor, 0) ** 0.5, near


def direct_distances(
    x: Operands, block: Block, work: Workspace, out: Tensor
) -> tuple[float | None, Near | None]:
    """`distances`, feature by feature; what they exceed is left to who asks for it."""
    step = work.take("step", out.shape)
    out.zero_()
    for q, a in features(block, x.q, x.a):
        torch.sub(q, a, out=step)
        out.addcmul_(step, step)
    near = None
    if not 1 / x.large < out.amax().item() < x.large:
        near = near_pairs(x, block, extreme_places(x, block, (out > 1 / x.large) & (out < x.large)))
    x.fill_padding(block, out, torch.inf)
    out.sqrt_()
    if near is not None:
        out.view(-1).index_copy_(0, near.place, near.distance)
    return None, near


def features(block: Block, q: Tensor, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """One feature after the other: that of q (b, rows, 1) and that of a (b, 1, cols)."""
    q, a = block.of_q(q), block.of_a(a)
    for feature in range(q.shape[2]):
        yield q[..., feature, None], a[:, None, :, feature]


class Kept(NamedTuple):
    """What S keeps of one tile for its backward pass."""

    block: Block
    near: int  # how many near pairs
    close: bool  # whether others are close, too


def attention(x: Operands, keep: bool = False) -> tuple[Tensor, list[Kept], list[Near]]:
    """S (B, Q, A); with `keep` what it keeps of each tile, and the near pairs of those that have any."""
    S = x.q.new_empty(x.sizes)
    work = Workspace(x.q)
    kept, found = [], []
    for block in centred(x, whole_rows(x.sizes)):
        tile = block.of_pairs(S)
        floor, near = distances(x, block, work, tile)
        if keep:
            if floor is None:
                floor = tile.amin().item()
            kept.append(Kept(block, 0 if near is None else near.place.shape[0], not floor >= CLOSE))
            if near is not None:
                found.append(near)
        tile.add_(1).reciprocal_()
    return S, kept, found


def score_tiles(x: Operands) -> Iterator[tuple[Block, Tensor]]:
    """S one tile at a time, each gone with the next."""
    work = Workspace(x.q)
    for block in centred(x, squares(x.sizes)):
        tile = work.take("scores", block.shape)
        distances(x, block, work, tile)
        tile.add_(1).reciprocal_()
        yield block, tile


def attend(x: Operands, v: Tensor, normalized: bool) -> tuple[Tensor, Tensor | None]:
    """``S @ v`` (B, Q, V), and the row sums (B, Q) that it was divided by if `normalized` (0 / 0 is 0)."""
    B, Q, _ = x.sizes
    O = x.q.new_zeros(B, Q, v.shape[2])
    r = x.q.new_zeros(B, Q) if normalized else None
    for block, S in score_tiles(x):
        block.of_q(O).baddbmm_(S, block.of_a(v))
        if r is not None:
            block.of_q(r).add_(S.sum(2))
    if r is not None:
        r.masked_fill_(r == 0, 1)
        O /= r[..., None]
    return O, r


def sums(x: Operands) -> tuple[Tensor, Tensor]:
    """Row sums (B, Q) and column sums (B, A) of S."""
    B, Q, A = x.sizes
    r, c = x.q.new_zeros(B, Q), x.q.new_zeros(B, A)
    for block, S in score_tiles(x):
        block.of_q(r).add_(S.sum(2))
        block.of_a(c).add_(S.sum(1))
    return r, c


class Gradients:
    """dL/dq and dL/da, gathered from tiles in which no row or column is left out."""

    def __init__(self, x: Operands) -> None:
        self.x = x
        make = torch.empty_like if math.prod(x.sizes) else torch.zeros_like
        self.q, self.a = make(x.q), make(x.a)

    def add_far(self, block: Block, k: Tensor) -> None:
        if self.x.direct:
            return self._add_direct(block, k)
        q, a = block.of_q(self.x.q_centred), block.of_a(self.x.a_centred)
        self._add(block.of_q(self.q), q, k, a, block.j.start == 0)
        self._add(block.of_a(self.a), a, k.mT, q, block.i.start == 0)

    def _add_direct(self, block: Block, k: Tensor) -> None:
        grads = features(block, self.q, self.a)
        for (q, a), (grad_q, grad_a) in zip(features(block, self.x.q, self.x.a), grads, strict=True):
            step = a - q
            if self.x.extreme:
                step.masked_fill_(step.isinf(), 0)
            step.mul_(k)
            for grad, total, first in (
                (grad_q, step.sum(2, keepdim=True), block.j.start == 0),
                (grad_a, step.sum(1, keepdim=True).neg_(), block.i.start == 0),
            ):
                grad.copy_(total) if first else grad.add_(total)

    @staticmethod
    def _add(grad: Tensor, rows: Tensor, k: Tensor, others: Tensor, first: bool) -> None:
        """``grad += k @ others - rows * k.sum(2)``; the first tile of a row overwrites what was there."""
        weight = k.sum(2, keepdim=True)
        if first:
            torch.mul(rows, weight, out=grad).baddbmm_(k, others, beta=-1)
        else:
            grad.addcmul_(rows, weight, value=-1).baddbmm_(k, others)

    def add_near(self, block: Block, place: Tensor, distance: Tensor, g: Tensor) -> None:
        """Add what the near pairs of a tile contribute, g (b, rows, cols) upstream."""
        scaled = self.x.extreme
        some_way = distance > 0
        if scaled:
            some_way &= distance < torch.inf
        apart = some_way.nonzero().squeeze(1)
        if apart.shape[0] == 0:
            return
        place, d = place.index_select(0, apart), distance.index_select(0, apart)
        k = g.reshape(-1).index_select(0, place)
        # In an order in which nothing overflows: d by itself, below.
        k = k / (1 + d) / (1 + d) if scaled else k / (d * (1 + d).square())
        D = self.q.shape[2]
        for some, q_row, a_row, step in differences(self.x, block, place):
            if scaled:
                step.div_(d[some, None])
            step.mul_(k[some, None])
            self.q.view(-1, D).index_add_(0, q_row, step, alpha=-1)
            self.a.view(-1, D).index_add_(0, a_row, step)


def backward(
    x: Operands, tiles: list[Block], upstream: Callable[[Block, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """dL/dq and dL/da from g = dL/dS, which `upstream` gives for a block and its S."""
    gradients = Gradients(x)
    work = Workspace(x.q)
    for block in tiles:
        d = work.take("distances", block.shape)
        _, near = distances(x, block, work, d)
        t = torch.add(d, 1, out=work.take("t", d.shape))
        g = upstream(block, torch.reciprocal(t, out=work.take("scores", d.shape))).expand(d.shape)
        k = torch.div(g, t.square_().mul_(d), out=t)
        # Padding has S = 0, where the upstream gradient may be infinite, as that of log S is.
        k.masked_fill_(d.isinf(), 0)
        if x.direct:
            k.masked_fill_(d == 0, 0)
        if near is not None:
            k.view(-1).index_fill_(0, near.place, 0)
        gradients.add_far(block, k)
        if near is not None:
            gradients.add_near(block, near.place, near.distance, g)
    return gradients.q, gradients.a


def backward_from_scores(
    x: Operands, g: Tensor, S: Tensor, kept: list[Kept], near: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """dL/dq and dL/da, reading the distances from S.

    `kept` is from `attention`; `near`, where there are near pairs, holds the fields of `Near` for all tiles
    in turn.
    """
    gradients = Gradients(x)
    t = k = S[:0]
    start = 0
    for block, count, close in kept:
        tile = block.of_pairs(S)
        # All tiles but the last have one shape, and share two buffers.
        if t.shape != tile.shape:
            t, k = torch.empty_like(tile), torch.empty_like(tile)
        if close:
            distances(x, block, Workspace(x.q), t)
            torch.add(t, 1, out=k).square_().mul_(t).reciprocal_()
            k.masked_fill_(t == 0, 0)
        else:
            torch.pow(tile, 3, out=k).div_(torch.sub(1, tile, out=t))
        k.mul_(block.of_pairs(g))
        # Padding has S = 0, where the upstream gradient may be infinite, as that of log S is.
        if x.padded:
            k.masked_fill_(tile == 0, 0)
        if count:
            place, distance = (field[start : start + count] for field in near)
            start += count
            k.view(-1).index_fill_(0, place, 0)
        gradients.add_far(block, k)
        if count:
            gradients.add_near(block, place, distance, block.of_pairs(g))
    return gradients.q, gradients.a
