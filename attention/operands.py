"""The two sides of a pairwise attention, made ready once a call for the tiles of `tiled.py`.

Shapes: q (B, Q, D), a (B, A, D). float64 is computed in float64, everything else in float32.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from .blocks import Block

# A common offset is taken out when its square exceeds this share of the mean ||a||².
OFFSET = 1 / 4
# Rows of each a whose mean stands for the offset: the mean of all would cost more and bring little.
SAMPLE = 8
# From so many elements of a on, a look at two rows costs at most about 2% of a single tile.
LOOK = 1 << 19
# Squares between 1 / LARGE and LARGE neither over- nor underflow, nor does d³ of a gradient.
LARGE = {dtype: math.sqrt(torch.finfo(dtype).max) for dtype in (torch.float32, torch.float64)}
# Elements of the room for centred rows.
CENTRED = 1 << 21
# Up to so many features, every pair's difference costs less than a product and its many near pairs.
DIRECT = 4


class Scratch(threading.local):
    """Room for two tensors, kept by each thread between calls.

    Fresh memory of some megabytes comes from the system page by page, cleared, which takes several times
    longer than to compute what is put there.
    """

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self.buffers: dict[torch.dtype, Tensor] = {}

    def two(self, first: tuple[int, ...], second: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors of these shapes, like `like`, whose memory the next call hands out again."""
        size, end = math.prod(first), math.prod(first) + math.prod(second)
        # Another device's memory may still be read by work that is queued there.
        if not like.is_cpu or end > self.elements:
            return like.new_empty(first), like.new_empty(second)
        buffer = self.buffers.get(like.dtype)
        if buffer is None:
            with torch.inference_mode(False):
                buffer = self.buffers[like.dtype] = torch.empty(self.elements, dtype=like.dtype, device="cpu")
        return buffer[:size].view(first), buffer[size:end].view(second)


_centred = Scratch(CENTRED)


def padding(rows: Tensor, lengths: Tensor) -> Tensor:
    """Boolean (B, L): which of the rows (B, L, D) lie past their sequence's length."""
    return torch.arange(rows.shape[1], device=rows.device) >= lengths[:, None].long()


class Operands:
    """Rows ready for tiles: as given (padding replaced by 0) for differences, centred for products.

    Attributes:
        q, a: (B, Q, D), (B, A, D), contiguous, float32 or float64.
        q_centred, a_centred: the same less a common offset, once `centre` has found one.
        q_squares, a_squares: (B, Q, 1), (B, A, 1), squared norms of the centred rows, once `measure` has run.
        q_norms, a_norms: the same, infinite in the padding.
        sizes: (B, Q, A).
        padded: whether lengths were given.
        offset: (B, 1, D), the one that `centre` has found, or None.
        direct: whether every distance is taken from the difference.
        large: `LARGE` of the dtype.
        extreme: whether a tile has had squares beyond it, or none above 1 / large.
    """

    q_squares: Tensor
    a_squares: Tensor
    q_norms: Tensor
    a_norms: Tensor

    def __init__(self, q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None) -> None:
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        if q.dtype != compute:
            q, a = q.to(compute), a.to(compute)
        q, a = q.contiguous(), a.contiguous()
        self.q_padding = self.a_padding = None
        if q_lengths is not None:
            self.q_padding = padding(q, q_lengths)[..., None]
            q = q.masked_fill(self.q_padding, 0)
        if a_lengths is not None:
            self.a_padding = padding(a, a_lengths)[..., None]
            a = a.masked_fill(self.a_padding, 0)
        self.q, self.a = self.q_centred, self.a_centred = q, a
        B, Q, _ = q.shape
        self.sizes = B, Q, a.shape[1]
        self.padded = q_lengths is not None or a_lengths is not None
        self.measured = self.extreme = False
        self.offset: Tensor | None = None
        self.large = LARGE[compute]
        # Differences have no use for another centre.
        self.searched = self.direct = q.shape[2] <= DIRECT

    def measure(self) -> None:
        """Left to the first tile that needs it: most backward passes do without."""
        self.measured = True
        self.q_norms = self.q_squares = torch.linalg.vector_norm(self.q_centred, dim=2, keepdim=True).square()
        self.a_norms = self.a_squares = torch.linalg.vector_norm(self.a_centred, dim=2, keepdim=True).square()
        if self.q_padding is not None:
            self.q_norms = self.q_squares.masked_fill(self.q_padding, torch.inf)
        if self.a_padding is not None:
            self.a_norms = self.a_squares.masked_fill(self.a_padding, torch.inf)

    def fill_padding(self, block: Block, pairs: Tensor, value: float) -> None:
        """Give the pairs of a tile that lie past the lengths this value."""
        if self.q_padding is not None:
            pairs.masked_fill_(block.of_q(self.q_padding), value)
        if self.a_padding is not None:
            pairs.masked_fill_(block.of_a(self.a_padding).mT, value)

    def looks_offset(self) -> bool:
        """Whether the first two rows point the same way, as they do on a common offset."""
        if self.searched or self.a.shape[1] == 1:
            return False
        rows = self.a[0, :2]
        own, other = rows.mv(rows[0]).tolist()
        return bool(other > OFFSET * own)

    def centre(self) -> bool:
        """Take a large common offset out of the products; the first call that finds one returns True."""
        if self.searched:
            return False
        self.searched = True
        # The mean of a alone: where q has another offset its distances are large and nothing cancels.
        step = max(1, self.a.shape[1] // SAMPLE)
        rows = self.a[:, ::step]
        count: Tensor | int = rows.shape[1]
        if self.a_padding is not None:
            count = (~self.a_padding[:, ::step]).sum(1, keepdim=True).clamp_(min=1).to(self.a.dtype)
        mean = rows.sum(1, keepdim=True) / count
        # Of all rows at once, which lie apart, it takes twice as long.
        size = torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=2))
        if not (mean.square() * count).sum() > OFFSET * size.square():
            return False
        self.take_out(mean)
        return True

    def take_out(self, offset: Tensor) -> None:
        """Centre the rows; offset (B, 1, D)."""
        self.searched, self.offset, self.measured = True, offset, False
        q, a = _centred.two(self.q.shape, self.a.shape, self.q)
        self.q_centred = torch.sub(self.q, offset, out=q)
        self.a_centred = torch.sub(self.a, offset, out=a)
