"""Grid barrier and product of cooperative launches, for lstm_persistent.py.

Each program keeps its weights on the chip and multiplies what all programs have stored by them.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from . import config
from .numerics import as_multiplied
from .recurrence import processors, slices

_HAS_POLL = tl.constexpr(hasattr(tl, "atomic_poll"))


@triton.jit
def arrive(counter_ptr):
    """Tell the others that all stores so far are done."""
    tl.debug_barrier()  # by every warp, before one of them releases them
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(counter_ptr, arrivals):
    """Wait until so many have arrived."""
    if _HAS_POLL:
        tl.atomic_poll(counter_ptr, arrivals, sem="acquire", scope="gpu")
    else:
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
            pass


@triton.jit
def resident_weights(w_ptr, at, step, PREC: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr):
    """The chunks of W that stay; columns are `step` apart."""
    w = ()
    for j in tl.static_range(CHUNKS):
        w += (as_multiplied(tl.load(w_ptr + at + j * BLOCK_K * step), PREC),)
    return w


@triton.jit
def product(
    w, w_ptr, w_at, step, x_ptr, x_at, K,
    PREC: tl.constexpr, ROWS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    RESIDENT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """W [ROWS, COLUMNS] xᵀ of what others have stored, x [BLOCK_B, COLUMNS]; zeros from K on.

    AHEAD: chunks of BLOCK_K columns that are on their way before the product with the first.
    """
    CHUNKS: tl.constexpr = RESIDENT // BLOCK_K
    chunks = ()
    for j in tl.static_range(AHEAD):
        chunks += (tl.load(x_ptr + x_at + j * BLOCK_K, cache_modifier=".cg"),)
    z = tl.zeros((ROWS, BLOCK_B), tl.float32)
    for j in tl.static_range(CHUNKS):
        if j + AHEAD < CHUNKS:
            chunks += (tl.load(x_ptr + x_at + (j + AHEAD) * BLOCK_K, cache_modifier=".cg"),)
        z = tl.dot(w[j], tl.trans(chunks[j]), z, input_precision=PREC)
    if RESIDENT < COLUMNS:
        for k0 in tl.range(RESIDENT, K, BLOCK_K, num_stages=3):
            streamed = as_multiplied(tl.load(w_ptr + w_at + k0 * step), PREC)
            chunk = tl.load(x_ptr + x_at + k0, cache_modifier=".cg")
            z = tl.dot(streamed, tl.trans(chunk), z, input_precision=PREC)
    return z


def height(tile: config.Config, HP: int, backward: bool) -> int:
    """BLOCK_H, or less of it where programs, backward four at a time, would not divide HP."""
    return min(tile.blocks["BLOCK_H"], (HP & -HP) // (4 if backward else 1))


def fitted(
    tile: config.Config, HP: int, precision: str, arch: str, backward: bool = False
) -> dict[str, int | bool]:
    """The options of a launch, with units and chunks of columns that divide HP."""
    BLOCK_H, BLOCK_B, warps = height(tile, HP, backward), tile.blocks["BLOCK_B"], tile.num_warps
    chunk, ahead, resident = (tile.blocks[name] for name in ("BLOCK_K", "AHEAD", "RESIDENT"))
    if precision == "tf32x3":
        # Its operands are there twice, rounded and what that left: half of the units, or else of the columns.
        BLOCK_B = min(BLOCK_B, 32)
        if BLOCK_H > 16:
            BLOCK_H //= 2
        else:
            chunk, resident = chunk // 2, resident // 2
        if arch.startswith(("sm_10", "sm_11")):
            # The compiler would keep W in registers and copy it to tensor memory in each step.
            resident = 0
    chunk = min(chunk, HP & -HP)
    if precision == "tf32x3" and resident < HP:
        # Both parts of what is read again pass through registers: short chunks, more of them on their way,
        # and backward, which needs more, one fewer that stays.
        chunk, ahead = min(chunk, 32), ahead * max(chunk // 32, 1)
        if backward and BLOCK_B > 16:
            resident = max(resident - chunk, 0)
    resident = min(resident, HP) // chunk * chunk
    # Where a product adds to another one, wgmma is not taken unless each warp has 16 rows of its own.
    if not resident == chunk == HP:
        warps = min(warps, max(BLOCK_H // 4, 4))
    return {
        **tile.options,
        "num_warps": warps,
        "BLOCK_H": BLOCK_H,
        "BLOCK_B": BLOCK_B,
        "BLOCK_K": chunk,
        "RESIDENT": resident,
        "AHEAD": min(ahead, resident // chunk),
        "launch_cooperative_grid": True,
    }


def launches(
    options: Mapping[str, int], like: Tensor, N: int, T: int, B: int, HP: int, columns: int
) -> Iterator[tuple[tuple[int, int, int], Tensor, Tensor, int, int]]:
    """Grid, exchange, counters, first block and first direction of each launch."""
    BLOCK_B, programs = options["BLOCK_B"], HP // options["BLOCK_H"]
    blocks = -(-B // BLOCK_B)
    for first_block, at_once, first_direction, together in slices(
        blocks, N, programs, processors(like.device)
    ):
        exchange = like.new_empty(2, together, at_once, BLOCK_B, columns)
        counters = torch.zeros(together, at_once, T + 2 + programs, dtype=torch.int32, device=like.device)
        yield (programs, at_once, together), exchange, counters, first_block, first_direction


def padded_weights(weights: Sequence[Tensor], HP: int) -> tuple[Tensor, Tensor]:
    """The weights of both directions, or twice those of the only one, with H rounded up to HP by zeros."""
    H = weights[0].shape[1]
    if H % 16:
        raise ValueError(f"the persistent kernels need a hidden size that is a multiple of 16; got {H}")
    if H < HP:
        weights = [pad(w.unflatten(0, (4, H)), (0, HP - H, 0, HP - H)) for w in weights]
    return weights[0], weights[-1]
