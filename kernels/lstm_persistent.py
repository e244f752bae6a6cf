"""The LSTM's recurrence in one launch, the recurrent weights spread over the chip and staying there.

Equations, time and tiles: see recurrence.py. A program owns BLOCK_H hidden units, all four gates of them, of
BLOCK_B rows of the batch, and keeps its 4·BLOCK_H rows of W_hh in shared memory for the whole sequence:

    zᵀ [4·BLOCK_H, BLOCK_B] = W_slice [4·BLOCK_H, H] hᵀ [H, BLOCK_B]          (forward: one product a step)

The programs of one block of rows and direction exchange h_t through L2, in two buffers used in turn, and wait
for each other once a step at a counter, of which each step has its own. A program that has passed the counter
of a step knows that all others have read the buffer of the step before: it may be written again. The launch
is cooperative and has at most one program per multiprocessor, so that all of them run at once; a larger batch
takes several launches. What no other program needs (y, what is saved, the next z) is stored and loaded
between arriving at a counter and waiting there.

Of a W_slice that does not fit, the columns past RESIDENT are read again in every step.

**Backward** dh of a unit is a sum over the units of all four gates. To read all of dz would move four times
as much as h does forward, so the sum is cut by gates. Four neighbouring programs take one gate each, for the
units of all four, exchange their partial sums and add them up in the order of the gates:

    partial dhᵀ [4·BLOCK_H, BLOCK_B] = W_gateᵀ [4·BLOCK_H, H] dz_gateᵀ [H, BLOCK_B]

That is a product like the forward one. The four wait for each other at a counter of their own, which goes on
counting. The partial sums need one buffer: before a program writes there again it passes the next step's
counter of all, where the others arrive with what they have read.

**Saved for backward.** The activated gates, which overwrite z, no longer needed, and c_t in float32:
4H values in storage dtype and H in float32 a row, read once in backward. Computing them again instead would
read z and h and take another product of the size of the recurrence.

No floating-point atomics: the same bits in every run.

Shapes: z, gates, dz (N, T, B, 4H), W_hh (4H, H), y (T, B, N·H), cells (N, T, B, H), states (N, B, H),
exchange (2, N, blocks of rows, BLOCK_B, HP or 4·HP) for HP, H rounded up, partial sums (N, blocks, programs,
BLOCK_B, 4·BLOCK_H), counters (N, blocks, T + 2 + programs) for HP/BLOCK_H programs.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .cooperative import (
    arrive,
    fitted,
    height,
    launches,
    padded_weights,
    product,
    resident_weights,
    wait_for,
)
from .launch import product_precision
from .numerics import as_multiplied
from .recurrence import (
    ends,
    first_rows,
    load_gates,
    padded,
    split_gates,
    store_gates,
    uniform,
    update,
    update_gradient,
)

# With what they list; sm_87, sm_103 and sm_110 have the shared memory and instructions of the one before.
_COMPILED = {"sm_80", "sm_87", "sm_90", "sm_100", "sm_103", "sm_110"}


@triton.jit(do_not_specialize=["first_block", "first_direction", "N", "T", "B"])
def lstm_persistent_fwd(
    z_ptr, w_ptr, w_reverse_ptr, h_0_ptr, c_0_ptr, lengths_ptr, y_ptr, h_n_ptr, c_n_ptr, cells_ptr,
    exchange_ptr, counters_ptr,
    first_block, first_direction, N, T, B, H,
    PREC: tl.constexpr, HP: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    RESIDENT: tl.constexpr,
):  # fmt: skip
    """All steps of BLOCK_H units of BLOCK_B rows in one direction."""
    PROGRAMS: tl.constexpr = HP // BLOCK_H
    dtype = y_ptr.dtype.element_ty
    d = tl.program_id(2) + first_direction
    u0 = tl.program_id(0) * BLOCK_H
    u = u0 + tl.arange(0, BLOCK_H)
    bi = tl.arange(0, BLOCK_B)
    b = (tl.program_id(1) + first_block) * BLOCK_B + bi
    k = tl.arange(0, BLOCK_K)
    if d != 0:
        w_ptr = w_reverse_ptr

    # Row r of the slice is gate r // BLOCK_H of unit r % BLOCK_H.
    r = tl.arange(0, 4 * BLOCK_H)
    w_at = ((r // BLOCK_H) * HP + u0 + r % BLOCK_H)[:, None] * HP + k[None, :]
    w = resident_weights(w_ptr, w_at, 1, PREC, BLOCK_K, RESIDENT // BLOCK_K)

    end = ends(lengths_ptr, b, T, B)
    row, step = first_rows(d, end, b, T, B)
    inside = (u < H)[:, None] & (b < B)[None, :]
    state = (d * B + b)[None, :].to(tl.int64) * H + u[:, None]
    z_ptr += d.to(tl.int64) * T * B * 4 * H
    z_at = row[None, :] * 4 * H + u[:, None]
    y_at = row[None, :] * N * H + d * H + u[:, None]
    if cells_ptr is not None:
        cells_ptr += d.to(tl.int64) * T * B * H
        cells_at = row[None, :] * H + u[:, None]

    group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    buffer = tl.num_programs(2) * tl.num_programs(1) * BLOCK_B * HP
    exchange_ptr += group * BLOCK_B * HP
    own = bi[None, :] * HP + u[:, None]
    others = bi[:, None] * HP + k[None, :]
    counters_ptr += group.to(tl.int64) * (T + 2 + PROGRAMS)
    steps = T
    if lengths_ptr is not None:
        steps = uniform(tl.max(end, 0), counters_ptr + T + 1)

    h = tl.load(h_0_ptr + state, inside, other=0.0)
    c = tl.load(c_0_ptr + state, inside, other=0.0).to(tl.float32)
    tl.store(exchange_ptr + own, as_multiplied(h, PREC))
    arrive(counters_ptr)
    live = inside & (end > 0)[None, :]
    x_i, x_f, x_g, x_o = load_gates(z_ptr, z_at, H, live)
    wait_for(counters_ptr, PROGRAMS)
    for s in tl.range(0, steps, num_stages=1):
        h_ptr = exchange_ptr + (s % 2) * buffer
        z = product(
            w, w_ptr, w_at, 1, h_ptr, others, H, PREC, 4 * BLOCK_H, BLOCK_B, BLOCK_K, AHEAD, RESIDENT, HP
        )
        z_i, z_f, z_g, z_o = split_gates(z, BLOCK_H, BLOCK_B)
        i, f, g, o, c_next, h_next = update(z_i + x_i, z_f + x_f, z_g + x_g, z_o + x_o, c)
        h = tl.where(live, h_next.to(dtype), h)
        c = tl.where(live, c_next, c)
        tl.store(exchange_ptr + ((s + 1) % 2) * buffer + own, as_multiplied(h, PREC))
        arrive(counters_ptr + s + 1)
        tl.store(y_ptr + y_at, h, live)
        if cells_ptr is not None:
            store_gates(z_ptr, z_at, H, live, i, f, g, o)
            tl.store(cells_ptr + cells_at, c, live)
            cells_ptr += step * H
        z_ptr += step * 4 * H
        y_ptr += step * N * H
        live = inside & (s + 1 < end)[None, :]
        x_i, x_f, x_g, x_o = load_gates(z_ptr, z_at, H, live)
        wait_for(counters_ptr + s + 1, PROGRAMS)
    tl.store(h_n_ptr + state, h, inside)
    tl.store(c_n_ptr + state, c.to(dtype), inside)


@triton.jit(do_not_specialize=["first_block", "first_direction", "N", "T", "B"])
def lstm_persistent_bwd(
    gates_ptr, cells_ptr, w_ptr, w_reverse_ptr, c_0_ptr, lengths_ptr,
    g_y_ptr, g_h_n_ptr, g_c_n_ptr, g_cells_ptr, dz_ptr, dh_0_ptr, dc_0_ptr,
    exchange_ptr, partial_ptr, counters_ptr,
    first_block, first_direction, N, T, B, H,
    PREC: tl.constexpr, HP: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    RESIDENT: tl.constexpr,
):  # fmt: skip
    """All steps, the last first, of BLOCK_H units of BLOCK_B rows in one direction."""
    PROGRAMS: tl.constexpr = HP // BLOCK_H
    dtype = dz_ptr.dtype.element_ty
    d = tl.program_id(2) + first_direction
    # Of four programs, and which of them and which gate: the units v of the four, and its own u.
    four, gate = tl.program_id(0) // 4, tl.program_id(0) % 4
    v = four * 4 * BLOCK_H + tl.arange(0, 4 * BLOCK_H)
    u = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    bi = tl.arange(0, BLOCK_B)
    b = (tl.program_id(1) + first_block) * BLOCK_B + bi
    if d != 0:
        w_ptr = w_reverse_ptr

    end = ends(lengths_ptr, b, T, B)
    row, step = first_rows(d, end, b, T, B)
    inside = (u < H)[:, None] & (b < B)[None, :]
    state = (d * B + b)[None, :].to(tl.int64) * H + u[:, None]
    z_at = row[None, :] * 4 * H + u[:, None]
    y_at = row[None, :] * N * H + d * H + u[:, None]
    cells_at = row[None, :] * H + u[:, None]

    group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    buffer = tl.num_programs(2) * tl.num_programs(1) * BLOCK_B * 4 * HP
    exchange_ptr += group * BLOCK_B * 4 * HP
    own = bi[None, :] * 4 * HP + u[:, None]
    k = tl.arange(0, BLOCK_K)
    others = bi[:, None] * 4 * HP + (gate * HP + k)[None, :]
    partial_ptr += (group * PROGRAMS + 4 * four) * BLOCK_B * 4 * BLOCK_H
    given = gate * BLOCK_B * 4 * BLOCK_H + bi[None, :] * 4 * BLOCK_H + tl.arange(0, 4 * BLOCK_H)[:, None]
    taken = bi[None, :] * 4 * BLOCK_H + (gate * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    counters_ptr += group.to(tl.int64) * (T + 2 + PROGRAMS)
    fours_ptr = counters_ptr + T + 2 + 4 * four
    steps = T
    if lengths_ptr is not None:
        steps = uniform(tl.max(end, 0), counters_ptr + T + 1)

    # Pointers are to the step at hand, the last one to begin with.
    last = d.to(tl.int64) * T * B + (steps - 1) * step
    gates_ptr += last * 4 * H
    dz_ptr += last * 4 * H
    cells_ptr += last * H
    live = inside & ((steps > 0) & (steps - 1 < end))[None, :]
    g_y = tl.zeros((BLOCK_H, BLOCK_B), dtype)
    if g_y_ptr is not None:
        g_y_ptr += (steps - 1) * step * N * H
        g_y = tl.load(g_y_ptr + y_at, live, other=0.0)
    g_cells = tl.zeros((BLOCK_H, BLOCK_B), dtype)
    if g_cells_ptr is not None:
        g_cells_ptr += last * H
        g_cells = tl.load(g_cells_ptr + cells_at, live, other=0.0)
    i, f, g, o = load_gates(gates_ptr, z_at, H, live)
    c = tl.load(cells_ptr + cells_at, live, other=0.0)
    before_live = inside & ((steps > 1) & (steps - 2 < end))[None, :]
    before = tl.load(cells_ptr - step * H + cells_at, before_live, other=0.0)
    c_0 = tl.load(c_0_ptr + state, inside, other=0.0).to(tl.float32)
    dh = tl.load(g_h_n_ptr + state, inside, other=0.0).to(tl.float32)
    dc = tl.load(g_c_n_ptr + state, inside, other=0.0).to(tl.float32)

    w_at = (gate * HP + k)[None, :] * HP + v[:, None]
    w = resident_weights(w_ptr, w_at, HP, PREC, BLOCK_K, RESIDENT // BLOCK_K)

    for passed in tl.range(0, steps, num_stages=1):
        s = steps - 1 - passed
        before = tl.where(s > 0, before, c_0)
        dz_i, dz_f, dz_g, dz_o, dc_next = update_gradient(i, f, g, o, c, before, dh + g_y, dc + g_cells)
        dc = tl.where(live, dc_next, dc)
        dz_i = tl.where(live, dz_i, 0.0).to(dtype)
        dz_f = tl.where(live, dz_f, 0.0).to(dtype)
        dz_g = tl.where(live, dz_g, 0.0).to(dtype)
        dz_o = tl.where(live, dz_o, 0.0).to(dtype)
        q_ptr = exchange_ptr + (s % 2) * buffer
        tl.store(q_ptr + own, as_multiplied(dz_i, PREC))
        tl.store(q_ptr + own + HP, as_multiplied(dz_f, PREC))
        tl.store(q_ptr + own + 2 * HP, as_multiplied(dz_g, PREC))
        tl.store(q_ptr + own + 3 * HP, as_multiplied(dz_o, PREC))
        arrive(counters_ptr + s)
        store_gates(dz_ptr, z_at, H, live, dz_i, dz_f, dz_g, dz_o)
        # What the step before needs, while the others arrive.
        dz_ptr -= step * 4 * H
        gates_ptr -= step * 4 * H
        cells_ptr -= step * H
        i, f, g, o = load_gates(gates_ptr, z_at, H, before_live)
        if g_y_ptr is not None:
            g_y_ptr -= step * N * H
            g_y = tl.load(g_y_ptr + y_at, before_live, other=0.0)
        if g_cells_ptr is not None:
            g_cells_ptr -= step * H
            g_cells = tl.load(g_cells_ptr + cells_at, before_live, other=0.0)
        c = before
        next_live = before_live
        before_live = inside & ((s > 1) & (s - 2 < end))[None, :]
        before = tl.load(cells_ptr - step * H + cells_at, before_live, other=0.0)
        wait_for(counters_ptr + s, PROGRAMS)
        partial = product(
            w, w_ptr, w_at, HP, q_ptr, others, H, PREC, 4 * BLOCK_H, BLOCK_B, BLOCK_K, AHEAD, RESIDENT, HP
        )
        tl.store(partial_ptr + given, partial)
        arrive(fours_ptr)
        wait_for(fours_ptr, 4 * (passed + 1))
        total = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        for j in tl.static_range(4):
            at = partial_ptr + j * BLOCK_B * 4 * BLOCK_H + taken
            total += tl.load(at, cache_modifier=".cg")
        dh = tl.where(live, total, dh)
        live = next_live
    tl.store(dh_0_ptr + state, dh.to(dtype), inside)
    tl.store(dc_0_ptr + state, dc.to(dtype), inside)


def serves(
    hidden_size: int, dtype: torch.dtype, precision: str, arch: str, processors: int, backward: bool
) -> bool:
    """Whether all programs of a block of rows run at once on so many multiprocessors, and without spilling.

    The configurations are compiled for up to H = 2048 on the architectures that have a list. NVIDIA's others
    have 99 KB of shared memory for a program: 64 KB of W_hh, which in full precision is there twice.
    """
    if arch.startswith("gfx"):  # no launch is cooperative there
        return False
    HP, limit = padded(hidden_size), 2048
    if arch not in _COMPILED:
        exact = product_precision(dtype, precision, arch) == "tf32x3"
        limit = 128 if exact else 1024 // dtype.itemsize
    name = "lstm_persistent_bwd" if backward else "lstm_persistent_fwd"
    tile = config.choose(name, arch, dtype, {"H": HP, "B": 1})
    return limit >= HP and HP // height(tile, HP, backward) <= processors


def forward(
    z: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor, lengths: Tensor | None,
    *, precision: str, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """y, h_n, c_n and, if `save`, cells; z becomes the gates then. See recurrence.py for the shapes."""
    N, T, B, width = z.shape
    H = width // 4
    HP = padded(H)
    arch = config.architecture(z.device)
    tile = config.choose("lstm_persistent_fwd", arch, z.dtype, {"H": HP, "B": N * B})
    make = z.new_empty if lengths is None else z.new_zeros
    y = make(T, B, N * H)
    h_n, c_n = torch.empty_like(h_0), torch.empty_like(c_0)
    cells = make(N, T, B, H, dtype=torch.float32) if save else None
    PREC = product_precision(z.dtype, precision, arch)
    options = fitted(tile, HP, PREC, arch)
    w = padded_weights(weights, HP)
    with torch.cuda.device_of(z):
        for grid, exchange, counters, *first in launches(options, z, N, T, B, HP, HP):
            lstm_persistent_fwd[grid](
                z, *w, h_0, c_0, lengths, y, h_n, c_n, cells, exchange, counters,
                *first, N, T, B, H, HP=HP, PREC=PREC, **options,
            )  # fmt: skip
    return y, h_n, c_n, cells


def backward(
    gates: Tensor, cells: Tensor, weights: Sequence[Tensor], c_0: Tensor, lengths: Tensor | None,
    g_y: Tensor | None, g_h_n: Tensor, g_c_n: Tensor, g_cells: Tensor | None,
    *, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dz, dh_0 and dc_0, from what the forward saved and the gradients of its results."""
    N, T, B, width = gates.shape
    H = width // 4
    HP = padded(H)
    arch = config.architecture(gates.device)
    tile = config.choose("lstm_persistent_bwd", arch, gates.dtype, {"H": HP, "B": N * B})
    dz = torch.empty_like(gates) if lengths is None else torch.zeros_like(gates)
    dh_0, dc_0 = torch.empty_like(c_0), torch.empty_like(c_0)
    PREC = product_precision(gates.dtype, precision, arch)
    options = fitted(tile, HP, PREC, arch, backward=True)
    w = padded_weights(weights, HP)
    with torch.cuda.device_of(gates):
        for grid, exchange, counters, *first in launches(options, gates, N, T, B, HP, 4 * HP):
            partial = exchange.new_empty(exchange[0].numel(), dtype=torch.float32)
            lstm_persistent_bwd[grid](
                gates, cells, *w, c_0, lengths, g_y, g_h_n, g_c_n, g_cells, dz, dh_0, dc_0,
                exchange, partial, counters, *first, N, T, B, H, HP=HP, PREC=PREC, **options,
            )  # fmt: skip
    return dz, dh_0, dc_0
