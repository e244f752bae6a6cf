"""Cutting the (B, Q, A) pairs of a pairwise attention into tiles."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Elements of one tile: large enough to make its calls cheap, and its buffers stay in the cores' own caches.
TILE = 1 << 19
# Side of a tile of the streaming ops: square tiles read least of q and a.
SIDE = 512


class Block(NamedTuple):
    """The pairs of one tile: slices of the batch, of the rows of q and of those of a."""

    b: slice
    i: slice
    j: slice
    # Whether these are all pairs: then nothing is cut, since a view costs as much as a small operation.
    whole: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        b, i, j, _ = self
        return b.stop - b.start, i.stop - i.start, j.stop - j.start

    def of_q(self, rows: Tensor) -> Tensor:
        return rows if self.whole else rows[self.b, self.i]

    def of_a(self, rows: Tensor) -> Tensor:
        return rows if self.whole else rows[self.b, self.j]

    def of_pairs(self, pairs: Tensor) -> Tensor:
        return pairs if self.whole else pairs[self.b, self.i, self.j]


def blocks(sizes: tuple[int, int, int], rows: int, cols: int) -> list[Block]:
    """Cut (B, Q, A) into tiles of rows x cols pairs, the largest first; several short sentences share one."""
    B, Q, A = sizes
    pairs = B * Q * A
    rows, cols = min(rows, Q), min(cols, A)
    if pairs <= TILE and rows == Q and cols == A:
        return [Block(slice(0, B), slice(0, Q), slice(0, A), True)] if pairs else []
    batch = max(1, TILE // (Q * A)) if rows == Q and cols == A else 1
    return [
        Block(slice(b, min(b + batch, B)), slice(i, min(i + rows, Q)), slice(j, min(j + cols, A)), False)
        for b in range(0, B, batch)
        for i in range(0, Q, rows)
        for j in range(0, A, cols)
    ]


def whole_rows(sizes: tuple[int, int, int]) -> list[Block]:
    """Tiles that are each one piece of S, computed in place."""
    return blocks(sizes, max(64, TILE // max(1, sizes[2])), sizes[2])


def squares(sizes: tuple[int, int, int]) -> list[Block]:
    return blocks(sizes, SIDE, SIDE)
