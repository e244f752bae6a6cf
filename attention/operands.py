"""The two sides of a pairwise attention, made ready once a call for the tiles of `tiled.py`.

Shapes: q (B, Q, D), a (B, A, D). float64 is computed in float64, everything else in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Pairs with d² <= TAU (||q||² + ||a||²) are near. A power of two, so that scaling by it rounds nothing.
TAU = 1 / 8
# A common offset is taken out when its square exceeds this share of the mean ||a||².
OFFSET = 1 / 4


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products in the precision of their inputs, whatever autocast and the global switches say.

    The error bound above holds for float32 products; with bfloat16 or TF32 ones S is off by up to 0.2.
    """
    backend = torch.backends.cuda.matmul if device_type == "cuda" else torch.backends.mkldnn.matmul
    precision = backend.fp32_precision
    reduced = precision not in ("ieee", "none")
    if reduced:
        backend.fp32_precision = "ieee"
    try:
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                yield
        else:
            yield
    finally:
        if reduced:
            backend.fp32_precision = precision


def padding(rows: Tensor, lengths: Tensor) -> Tensor:
    """Boolean (B, L): which of the rows (B, L, D) lie past their sequence's length."""
    return torch.arange(rows.shape[1], device=rows.device) >= lengths[:, None]


class Operands:
    """Rows ready for tiles: as given (padding replaced by 0) for differences, centred for products.

    Attributes:
        q, a: (B, Q, D), (B, A, D), contiguous, float32 or float64.
        q_centred, a_centred: the same less a common offset, once `centre` has found one.
        q_near, a_near: (B, Q), (B, A), TAU times the squared norms: a pair is near up to the sum of its two.
        q_norms, a_norms: the same, infinite in the padding.
    """

    q: Tensor
    a: Tensor
    q_centred: Tensor
    a_centred: Tensor
    q_near: Tensor
    a_near: Tensor
    q_norms: Tensor
    a_norms: Tensor

    def __init__(self, q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None) -> None:
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        if q.dtype != compute:
            q, a = q.to(compute), a.to(compute)
        q, a = q.contiguous(), a.contiguous()
        self.q_padding = self.a_padding = None
        if q_lengths is not None:
            self.q_padding = padding(q, q_lengths)
            q = q.masked_fill(self.q_padding[..., None], 0)
        if a_lengths is not None:
            self.a_padding = padding(a, a_lengths)
            a = a.masked_fill(self.a_padding[..., None], 0)
        self.q, self.a = q, a
        self.sizes = q.shape[0], q.shape[1], a.shape[1]
        self.padded = q_lengths is not None or a_lengths is not None
        self.searched = False
        self._take(q, a)

    def _take(self, q: Tensor, a: Tensor) -> None:
        self.q_centred, self.a_centred = q, a
        self.q_near = torch.linalg.vector_norm(q, dim=-1).square_().mul_(TAU)
        self.a_near = torch.linalg.vector_norm(a, dim=-1).square_().mul_(TAU)
        self.q_norms, self.a_norms = self.q_near, self.a_near
        if self.q_padding is not None:
            self.q_norms = self.q_near.masked_fill(self.q_padding, torch.inf)
        if self.a_padding is not None:
            self.a_norms = self.a_near.masked_fill(self.a_padding, torch.inf)

    def centre(self) -> bool:
        """Take a large common offset out of the products; the first call that finds one returns True."""
        if self.searched:
            return False
        self.searched = True
        # The mean of a alone: where q has another offset its distances are large and nothing cancels.
        count: Tensor | int = self.a.shape[1]
        if self.a_padding is not None:
            count = (~self.a_padding).sum(1, keepdim=True).clamp_(min=1).to(self.a.dtype)
        mean = self.a.sum(1) / count  # (B, D)
        if not (mean.square() * count).sum() * TAU > OFFSET * self.a_near.sum():
            return False
        self._take(self.q - mean[:, None], self.a - mean[:, None])
        return True

    def tensors(self) -> tuple[Tensor, ...]:
        """What `restore` needs, for autograd to keep."""
        return (
            *(self.q, self.a, self.q_centred, self.a_centred),
            *(self.q_near, self.a_near, self.q_norms, self.a_norms),
        )

    @classmethod
    def restore(cls, tensors: Sequence[Tensor], padded: bool) -> Operands:
        x = cls.__new__(cls)
        x.q, x.a, x.q_centred, x.a_centred, x.q_near, x.a_near, x.q_norms, x.a_norms = tensors
        x.sizes = x.q.shape[0], x.q.shape[1], x.a.shape[1]
        x.padded, x.searched = padded, True
        return x
