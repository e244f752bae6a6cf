"""What the backward of S (pairwise_bwd.py) reads of a tile of pairs.

Shapes: W (B, Q, A up to a multiple of ALIGNED), g (B, Q, A).
"""

import triton
import triton.language as tl
from torch import Tensor

from .pairwise_split import ALIGNED


@triton.jit
def of_pairs(i, j, stride, TRANSPOSED: tl.constexpr):
    """Where the pairs (i, j) of x and y are in a matrix with rows of x, or of y if TRANSPOSED."""
    if TRANSPOSED:
        return j * stride + i
    else:
        return i * stride + j


@triton.jit
def load_pairs(
    at, i_left, j_left, step, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A tile [BLOCK_M, BLOCK_N] of such a matrix in float32."""
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    mask = (i < i_left)[:, None] & (j < j_left)[None, :]
    return tl.load(at + of_pairs(i[:, None], j[None, :], step, TRANSPOSED), mask, other=0.0).to(tl.float32)


@triton.jit
def far_slopes(w, g):
    """k of far pairs, 0 for near ones."""
    return g * tl.maximum(w, 0.0, propagate_nan=tl.PropagateNan.ALL)


def kept_strides(W: Tensor) -> list[int]:
    """The strides of batches and rows of W, in units of ALIGNED."""
    return [stride // ALIGNED.value for stride in W.stride()[:2]]
