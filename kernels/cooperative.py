"""Programs of one launch that run all at once and wait for each other, for lstm_persistent.py."""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from . import config
from .recurrence import processors, slices

_HAS_POLL = tl.constexpr(hasattr(tl, "atomic_poll"))


@triton.jit
def arrive(counter_ptr):
    """Tell the others that all stores so far are done."""
    tl.debug_barrier()  # by every warp, before one of them releases them
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(counter_ptr, PROGRAMS: tl.constexpr):
    """Wait until all have arrived."""
    if _HAS_POLL:
        tl.atomic_poll(counter_ptr, PROGRAMS, sem="acquire", scope="gpu")
    else:
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < PROGRAMS:
            pass


def launches(
    tile: config.Config, like: Tensor, N: int, T: int, B: int, HP: int, columns: int
) -> Iterator[tuple[tuple[int, int, int], Tensor, Tensor, int, int]]:
    """Grid, exchange, counters, first block and first direction of each launch."""
    BLOCK_B, programs = tile.blocks["BLOCK_B"], HP // tile.blocks["BLOCK_H"]
    if programs * tile.blocks["BLOCK_H"] != HP:
        raise RuntimeError(f"BLOCK_H must divide {HP}; got {tile.blocks['BLOCK_H']}")
    blocks = triton.cdiv(B, BLOCK_B)
    for first_block, at_once, first_direction, together in slices(
        blocks, N, programs, processors(like.device)
    ):
        exchange = like.new_empty(2, together, at_once, BLOCK_B, columns)
        counters = torch.zeros(together, at_once, T + 2, dtype=torch.int32, device=like.device)
        yield (programs, at_once, together), exchange, counters, first_block, first_direction


def fitted(tile: config.Config, columns: int, precision: str) -> dict[str, int | bool]:
    """The options of a launch, with chunks that divide the columns of the product."""
    chunk = min(tile.blocks["BLOCK_K"], columns & -columns)
    resident = tile.blocks["RESIDENT"]
    if precision == "tf32x3":
        resident //= 2  # its operands are there twice, rounded and what that left
    resident = min(resident, columns) // chunk * chunk
    ahead = min(tile.blocks["AHEAD"], resident // chunk)
    fitted = {"BLOCK_K": chunk, "RESIDENT": resident, "AHEAD": ahead}
    return {**tile.options, **fitted, "launch_cooperative_grid": True}


def padded_weights(weights: Sequence[Tensor], HP: int) -> tuple[Tensor, Tensor]:
    """The weights of both directions, or twice those of the only one, with H rounded up to HP by zeros."""
    H = weights[0].shape[1]
    if H % 16:
        raise ValueError(f"the persistent kernels need a hidden size that is a multiple of 16; got {H}")
    if H < HP:
        weights = [pad(w.unflatten(0, (4, H)), (0, HP - H, 0, HP - H)) for w in weights]
    return weights[0], weights[-1]
