"""Pairwise attention tile by tile: one matrix product a tile, exact near zero, little kept.

    S = 1 / (1 + d),    d²[i, j] = ||q_i||² + ||a_j||² - 2 q_i·a_j

The expansion cancels when q_i and a_j are close: it carries a rounding error of c ε (||q_i||² + ||a_j||²),
and half of all d² near 0 even come out negative. So every **near** pair, d² <= TAU (||q_i||² + ||a_j||²),
is recomputed from the difference q_i - a_j itself; the cost follows the number of near pairs. For the
others the error left in S is at most c ε / (8 TAU): with c <= 11, as measured for D up to 4096, and
TAU = 1/8 that is 7e-7 in float32.
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
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .operands import TAU, Operands

# Elements of one tile: its buffers stay in the second-level cache.
TILE = 1 << 18
# Side of a tile of the streaming ops: square tiles read least of q and a.
SIDE = 512
# With a larger share of words of eight pairs below a tile's common threshold, look for an offset, or closer.
CROWD = 1 / 4
# From this S on, 1 - S has lost too many digits for a gradient: such tiles compute d again.
CLOSE = 16 / 17
# Near pairs are kept for the backward pass up to this share of all pairs, and searched again beyond it.
KEPT = 1 / 8

Block = tuple[slice, slice, slice]


class Near(NamedTuple):
    """The near pairs of one tile: place in the tile, row in q (B*Q, D), row in a (B*A, D), distance."""

    place: Tensor
    q_row: Tensor
    a_row: Tensor
    distance: Tensor


def blocks(sizes: tuple[int, int, int], rows: int, cols: int) -> Iterator[Block]:
    """Cut (B, Q, A) into tiles of rows x cols pairs; several short sentences share one."""
    B, Q, A = sizes
    if B * Q * A == 0:
        return
    batch = max(1, TILE // (Q * A)) if rows >= Q and cols >= A else 1
    for b in range(0, B, batch):
        for i in range(0, Q, rows):
            for j in range(0, A, cols):
                yield slice(b, min(b + batch, B)), slice(i, min(i + rows, Q)), slice(j, min(j + cols, A))


def shape(block: Block) -> tuple[int, ...]:
    return tuple(side.stop - side.start for side in block)


def whole_rows(sizes: tuple[int, int, int]) -> Iterator[Block]:
    """Tiles that are each one piece of S, computed in place."""
    return blocks(sizes, max(64, TILE // max(1, sizes[2])), sizes[2])


def squares(sizes: tuple[int, int, int]) -> Iterator[Block]:
    return blocks(sizes, SIDE, SIDE)


class Workspace:
    """Buffers of one tile, kept for a whole call: fresh memory for every tile costs more than its work."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape[0] < size:
            # Whole words of eight, for the flags of near_pairs.
            buffer = self.like.new_empty(-(-size // 8) * 8, dtype=dtype or self.like.dtype)
            self.buffers[name] = buffer
        return buffer[:size].view(shape)


def differences(x: Operands, q_row: Tensor, a_row: Tensor) -> Tensor:
    """q - a (n, D) for n pairs given by their rows in (B*Q, D) and (B*A, D)."""
    D = x.q.shape[2]
    return x.q.view(-1, D).index_select(0, q_row).sub_(x.a.view(-1, D).index_select(0, a_row))


def distances(x: Operands, block: Block, work: Workspace, out: Tensor) -> Near | None:
    """Fill `out` with the distances of one tile; returns its near pairs."""
    b, i, j = block
    torch.add(x.q_norms[b, i, None], x.a_norms[b, None, j], out=out)
    out.baddbmm_(x.q_centred[b, i], x.a_centred[b, j].mT, beta=1 / TAU, alpha=-2)
    bound = x.q_near[b, i].max().item() + x.a_near[b, j].max().item()
    near = None
    # One look at the smallest d² spares most tiles of unrelated rows the search.
    if not out.amin().item() > bound:
        # A few pairs that are not near do no harm: the tile's largest threshold serves for all of them,
        # unless it lets many through. A NaN, from norms that overflow, asks for the difference too.
        mark = work.take("mark", out.shape, torch.bool)
        words = marked_words(torch.le(out, bound, out=mark), work) if math.isfinite(bound) else None
        if words is None or words.shape[0] * 8 > CROWD * out.numel():
            if x.centre():
                return distances(x, block, work, out)
            threshold = torch.add(
                x.q_near[b, i, None], x.a_near[b, None, j], out=work.take("threshold", out.shape)
            )
            words = marked_words(torch.gt(out, threshold, out=mark).logical_not_(), work)
        near = near_pairs(x, block, words, work)
    out.sqrt_()
    if near is not None:
        out.view(-1)[near.place] = near.distance
    return near


def marked_words(mark: Tensor, work: Workspace) -> Tensor:
    """Where the flags in the workspace's buffer "mark", of which `mark` is the used part, are not all False.

    Eight flags at a time, since most words hold none: several times faster than mark.nonzero().
    """
    flags = work.buffers["mark"][: -(-mark.numel() // 8) * 8]
    flags[mark.numel() :] = False
    return flags.view(torch.int64).nonzero().squeeze(1)


def near_pairs(x: Operands, block: Block, words: Tensor, work: Workspace) -> Near | None:
    """The pairs of a tile marked in these words, with their distances from the differences."""
    if words.shape[0] == 0:
        return None
    inner = work.buffers["mark"].view(-1, 8)[words].nonzero()
    place = words[inner[:, 0]].mul_(8).add_(inner[:, 1])
    b, i, j = block
    (_, Q, A), (_, rows, cols) = x.sizes, shape(block)
    line = place // cols  # batch in the tile * rows + row in the tile
    batch = line // rows
    q_row = line + (batch * (Q - rows) + (b.start * Q + i.start))
    a_row = place - line * cols + (batch * A + (b.start * A + j.start))
    return Near(place, q_row, a_row, torch.linalg.vector_norm(differences(x, q_row, a_row), dim=-1))


def attention(x: Operands) -> tuple[Tensor, list[Near | None]]:
    """S (B, Q, A), and the near pairs of each of its tiles, their places counted from the start of S."""
    S = x.q.new_empty(x.sizes)
    work = Workspace(x.q)
    found = []
    for block in whole_rows(x.sizes):
        tile = S[block]
        near = distances(x, block, work, tile)
        found.append(near and near._replace(place=near.place + tile.storage_offset()))
        torch.reciprocal(tile.add_(1), out=tile)
    return S, found


def score_tiles(x: Operands) -> Iterator[tuple[Block, Tensor]]:
    """S one tile at a time, each gone with the next."""
    work = Workspace(x.q)
    for block in squares(x.sizes):
        tile = work.take("scores", shape(block))
        distances(x, block, work, tile)
        torch.reciprocal(tile.add_(1), out=tile)
        yield block, tile


def attend(x: Operands, v: Tensor, normalized: bool) -> tuple[Tensor, Tensor | None]:
    """``S @ v`` (B, Q, V), and the row sums (B, Q) that it was divided by if `normalized` (0 / 0 is 0)."""
    B, Q, _ = x.sizes
    O = x.q.new_zeros(B, Q, v.shape[2])
    r = x.q.new_zeros(B, Q) if normalized else None
    for (b, i, j), S in score_tiles(x):
        O[b, i].baddbmm_(S, v[b, j])
        if r is not None:
            r[b, i] += S.sum(2)
    if r is not None:
        r.masked_fill_(r == 0, 1)
        O /= r[..., None]
    return O, r


def sums(x: Operands) -> tuple[Tensor, Tensor]:
    """Row sums (B, Q) and column sums (B, A) of S."""
    B, Q, A = x.sizes
    r, c = x.q.new_zeros(B, Q), x.q.new_zeros(B, A)
    for (b, i, j), S in score_tiles(x):
        r[b, i] += S.sum(2)
        c[b, j] += S.sum(1)
    return r, c


class Gradients:
    """dL/dq and dL/da, gathered from tiles in which no row or column is left out."""

    def __init__(self, x: Operands) -> None:
        self.x = x
        # The first product of each overwrites it.
        make = torch.empty_like if math.prod(x.sizes) else torch.zeros_like
        self.q, self.a = make(x.q), make(x.a)

    def add_far(self, block: Block, k: Tensor) -> None:
        b, i, j = block
        q, a = self.x.q_centred[b, i], self.x.a_centred[b, j]
        grad_q = self.q[b, i].baddbmm_(k, a, beta=int(j.start > 0))
        grad_q.addcmul_(q, k.sum(2, keepdim=True), value=-1)
        grad_a = self.a[b, j].baddbmm_(k.mT, q, beta=int(i.start > 0))
        grad_a.addcmul_(a, k.sum(1)[..., None], value=-1)

    def add_near(self, q_row: Tensor, a_row: Tensor, d: Tensor, g: Tensor) -> None:
        D = self.q.shape[2]
        k = g / (d * (1 + d).square())
        step = differences(self.x, q_row, a_row).mul_(k[:, None])
        self.q.view(-1, D).index_add_(0, q_row, step, alpha=-1)
        self.a.view(-1, D).index_add_(0, a_row, step)


def backward(
    x: Operands, tiles: Iterator[Block], upstream: Callable[[Block, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """dL/dq and dL/da from g = dL/dS, which `upstream` gives for a block and its S."""
    gradients = Gradients(x)
    work = Workspace(x.q)
    for block in tiles:
        d = work.take("distances", shape(block))
        near = distances(x, block, work, d)
        t = torch.add(d, 1, out=work.take("t", d.shape))
        g = upstream(block, torch.reciprocal(t, out=work.take("scores", d.shape))).expand(d.shape)
        k = torch.div(g, t.square_().mul_(d), out=t)
        # Padding has S = 0, where the upstream gradient may be infinite, as that of log S is.
        k.masked_fill_(d.isinf(), 0)
        if near is not None:
            k.view(-1)[near.place] = 0
        gradients.add_far(block, k)
        if near is not None:
            apart = (near.distance > 0).nonzero().squeeze(1)
            gradients.add_near(
                near.q_row[apart], near.a_row[apart], near.distance[apart], g.reshape(-1)[near.place[apart]]
            )
    return gradients.q, gradients.a


def backward_from_scores(
    x: Operands, g: Tensor, S: Tensor, place: Tensor, distance: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor]:
    """dL/dq and dL/da, reading the distances from S.

    The near pairs, `counts` of them in each tile in turn, are given by their places in S and distances.
    """
    gradients = Gradients(x)
    work = Workspace(x.q)
    start = 0
    for block, count in zip(whole_rows(x.sizes), counts, strict=True):
        tile = S[block]
        near = place[start : start + count] - tile.storage_offset()
        start += count
        t = torch.sub(1, tile, out=work.take("t", tile.shape))
        if count:
            t.view(-1)[near] = 1
        k = work.take("k", tile.shape)
        if t.amin().item() > 1 - CLOSE:
            torch.mul(tile, tile, out=k).mul_(tile).div_(t)
        else:
            distances(x, block, work, t)
            torch.add(t, 1, out=k).square_().mul_(t).reciprocal_()
        k.mul_(g[block])
        # Padding has S = 0, where the upstream gradient may be infinite, as that of log S is.
        if x.padded:
            k.masked_fill_(tile == 0, 0)
        if count:
            k.view(-1)[near] = 0
        gradients.add_far(block, k)
    apart = (distance > 0).nonzero().squeeze(1)
    if apart.shape[0]:
        _, Q, A = x.sizes
        place = place[apart]
        q_row = place // A
        a_row = place - q_row * A + (q_row // Q) * A
        gradients.add_near(q_row, a_row, distance[apart], g.reshape(-1)[place])
    return gradients.q, gradients.a
