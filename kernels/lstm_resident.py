"""The LSTM's recurrence of a small hidden state: every program works alone, with all recurrent weights.

Equations, time and tiles: see recurrence.py. A program owns BLOCK_B rows of the batch and keeps W_hh on the
chip for the whole sequence. It waits for no other program, and h (dz) does not leave the chip between steps:

    zᵀ [4·HP, BLOCK_B] = W [4·HP, HP] hᵀ [HP, BLOCK_B]                   (forward: one product a step)
    dhᵀ [HP, BLOCK_B] = Wᵀ [HP, 4·HP] dzᵀ [4·HP, BLOCK_B]                (backward: the same, mirrored)

What a step needs from memory is loaded one step ahead. H is a multiple of 16: without wide loads and stores
the loops would be twice as long.

**Saved for backward.** As in lstm_persistent.py: the gates, stored over z, and c_t in float32.

No atomics: the same bits in every run.

Shapes: z, gates, dz (N, T, B, 4H), W_hh (4H, H), y (T, B, N·H), cells (N, T, B, H), states (N, B, H); HP is H
rounded up to a power of two.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import product_precision
from .numerics import as_multiplied
from .recurrence import (
    ends,
    first_rows,
    load_gates,
    split_gates,
    store_gates,
    taken_apart,
    uniform,
    update,
    update_gradient,
)


@triton.jit
def join_gates(i, f, g, o, HP: tl.constexpr, BLOCK_B: tl.constexpr):
    """The four tiles as one, gate by gate: split_gates undone."""
    return tl.join(tl.join(i, g), tl.join(f, o)).permute(2, 3, 0, 1).reshape(4 * HP, BLOCK_B)


@triton.jit(do_not_specialize=["N", "T", "B"])
def lstm_resident_fwd(
    z_ptr, w_ptr, w_reverse_ptr, h_0_ptr, c_0_ptr, lengths_ptr, y_ptr, h_n_ptr, c_n_ptr, cells_ptr, steps_ptr,
    N, T, B, H,
    PREC: tl.constexpr, HP: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """All steps of BLOCK_B rows in one direction."""
    dtype = y_ptr.dtype.element_ty
    d = tl.program_id(1)
    u = tl.arange(0, HP)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    if d != 0:
        w_ptr = w_reverse_ptr

    # Row r is gate r // HP of unit r % HP.
    r = tl.arange(0, 4 * HP)
    w_at = ((r // HP) * H + r % HP)[:, None] * H + u[None, :]
    w = as_multiplied(tl.load(w_ptr + w_at, (r % HP < H)[:, None] & (u < H)[None, :], other=0.0), PREC)

    end = ends(lengths_ptr, b, T, B)
    steps = T
    if lengths_ptr is not None:
        steps = uniform(tl.max(end, 0), steps_ptr + d * tl.num_programs(0) + tl.program_id(0))
    row, step = first_rows(d, end, b, T, B)
    inside = (u < H)[:, None] & (b < B)[None, :]
    state = (d * B + b)[None, :].to(tl.int64) * H + u[:, None]
    z_ptr += d.to(tl.int64) * T * B * 4 * H
    z_at = row[None, :] * 4 * H + u[:, None]
    y_at = row[None, :] * N * H + d * H + u[:, None]
    if cells_ptr is not None:
        cells_ptr += d.to(tl.int64) * T * B * H
        cells_at = row[None, :] * H + u[:, None]

    h = tl.load(h_0_ptr + state, inside, other=0.0)
    c = tl.load(c_0_ptr + state, inside, other=0.0).to(tl.float32)
    live = inside & (end > 0)[None, :]
    x_i, x_f, x_g, x_o = load_gates(z_ptr, z_at, H, live)
    for s in tl.range(0, steps, num_stages=1):
        z = tl.dot(w, as_multiplied(h, PREC), input_precision=PREC)
        z_i, z_f, z_g, z_o = split_gates(z, HP, BLOCK_B)
        i, f, g, o, c_next, h_next = update(z_i + x_i, z_f + x_f, z_g + x_g, z_o + x_o, c)
        h = tl.where(live, h_next.to(dtype), h)
        c = tl.where(live, c_next, c)
        tl.store(y_ptr + y_at, h, live)
        if cells_ptr is not None:
            store_gates(z_ptr, z_at, H, live, i, f, g, o)
            tl.store(cells_ptr + cells_at, c, live)
            cells_ptr += step * H
        z_ptr += step * 4 * H
        y_ptr += step * N * H
        live = inside & (s + 1 < end)[None, :]
        x_i, x_f, x_g, x_o = load_gates(z_ptr, z_at, H, live)
    tl.store(h_n_ptr + state, h, inside)
    tl.store(c_n_ptr + state, c.to(dtype), inside)


@triton.jit(do_not_specialize=["N", "T", "B"])
def lstm_resident_bwd(
    gates_ptr, cells_ptr, w_ptr, w_reverse_ptr, c_0_ptr, lengths_ptr,
    g_y_ptr, g_h_n_ptr, g_c_n_ptr, g_cells_ptr, dz_ptr, dh_0_ptr, dc_0_ptr, steps_ptr,
    N, T, B, H,
    PREC: tl.constexpr, HP: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """All steps, the last first, of BLOCK_B rows in one direction."""
    dtype = dz_ptr.dtype.element_ty
    d = tl.program_id(1)
    u = tl.arange(0, HP)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    if d != 0:
        w_ptr = w_reverse_ptr

    # Column k of dz is gate k // HP of unit k % HP.
    k = tl.arange(0, 4 * HP)
    w_at = ((k // HP) * H + k % HP)[None, :] * H + u[:, None]
    w = as_multiplied(tl.load(w_ptr + w_at, (k % HP < H)[None, :] & (u < H)[:, None], other=0.0), PREC)

    end = ends(lengths_ptr, b, T, B)
    steps = T
    if lengths_ptr is not None:
        steps = uniform(tl.max(end, 0), steps_ptr + d * tl.num_programs(0) + tl.program_id(0))
    row, step = first_rows(d, end, b, T, B)
    inside = (u < H)[:, None] & (b < B)[None, :]
    state = (d * B + b)[None, :].to(tl.int64) * H + u[:, None]
    z_at = row[None, :] * 4 * H + u[:, None]
    y_at = row[None, :] * N * H + d * H + u[:, None]
    cells_at = row[None, :] * H + u[:, None]
    # Pointers are to the step at hand, the last one to begin with.
    last = d.to(tl.int64) * T * B + (steps - 1) * step
    gates_ptr += last * 4 * H
    dz_ptr += last * 4 * H
    cells_ptr += last * H
    live = inside & ((steps > 0) & (steps - 1 < end))[None, :]
    g_y = tl.zeros((HP, BLOCK_B), dtype)
    if g_y_ptr is not None:
        g_y_ptr += (steps - 1) * step * N * H
        g_y = tl.load(g_y_ptr + y_at, live, other=0.0)
    g_cells = tl.zeros((HP, BLOCK_B), dtype)
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
    for passed in tl.range(0, steps, num_stages=1):
        s = steps - 1 - passed
        before = tl.where(s > 0, before, c_0)
        dz_i, dz_f, dz_g, dz_o, dc_next = update_gradient(i, f, g, o, c, before, dh + g_y, dc + g_cells)
        dc = tl.where(live, dc_next, dc)
        dz_i = tl.where(live, dz_i, 0.0).to(dtype)
        dz_f = tl.where(live, dz_f, 0.0).to(dtype)
        dz_g = tl.where(live, dz_g, 0.0).to(dtype)
        dz_o = tl.where(live, dz_o, 0.0).to(dtype)
        store_gates(dz_ptr, z_at, H, live, dz_i, dz_f, dz_g, dz_o)
        # What the step before needs, while this one is multiplied.
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
        dz = join_gates(dz_i, dz_f, dz_g, dz_o, HP, BLOCK_B)
        total = tl.dot(w, as_multiplied(dz, PREC), input_precision=PREC)
        dh = tl.where(live, taken_apart(total, HP, BLOCK_B), dh)
        live = next_live
    tl.store(dh_0_ptr + state, dh.to(dtype), inside)
    tl.store(dc_0_ptr + state, dc.to(dtype), inside)


# Shared memory that a program may take, in bytes; 99 KB on NVIDIA's others, 64 KB on AMD's.
_SHARED = {
    "sm_80": 163 * 1024,
    "sm_87": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_103": 227 * 1024,
    "gfx950": 160 * 1024,
}


def height(hidden_size: int) -> int:
    """H rounded up to the height of a tile."""
    return max(triton.next_power_of_2(hidden_size), 16)


def serves(hidden_size: int, dtype: torch.dtype, precision: str, arch: str) -> bool:
    """Whether W_hh fits into shared memory and the kernels run without spilling registers.

    16 bit: H up to 128. float32: to 64; in full precision, which takes W_hh twice, in high and in low parts,
    beyond 32 only on sm_90.
    """
    HP, parts, most = height(hidden_size), 1, 128
    if dtype == torch.float32:
        parts = 2 if product_precision(dtype, precision, arch) == "tf32x3" else 1
        most = 64 if parts == 1 or arch == "sm_90" else 32
    tile = 4 * HP * 16  # of all gates: one the product's operand, one on its way between layouts
    needed = (4 * HP * HP + 2 * tile) * dtype.itemsize * parts
    return hidden_size <= most and needed <= _SHARED.get(arch, (64 if arch.startswith("gfx") else 99) * 1024)


def forward(
    z: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    lengths: Tensor | None,
    *,
    precision: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, h_n, c_n and, if `save`, cells; z becomes the gates then. See recurrence.py for the shapes."""
    N, T, B, H = z.shape[0], z.shape[1], z.shape[2], z.shape[3] // 4
    HP = height(H)
    arch = config.architecture(z.device)
    tile = config.choose("lstm_resident_fwd", arch, z.dtype, {"H": HP, "B": B})
    make = z.new_empty if lengths is None else z.new_zeros
    y = make(T, B, N * H)
    h_n, c_n = torch.empty_like(h_0), torch.empty_like(c_0)
    cells = make(N, T, B, H, dtype=torch.float32) if save else None
    grid = -(-B // tile.blocks["BLOCK_B"]), N
    steps = z.new_empty(grid[0] * N, dtype=torch.int32)
    with torch.cuda.device_of(z):
        lstm_resident_fwd[grid](
            z, weights[0], weights[-1], h_0, c_0, lengths, y, h_n, c_n, cells, steps,
            N, T, B, H, HP=HP, PREC=product_precision(z.dtype, precision, arch), **tile.options,
        )  # fmt: skip
    return y, h_n, c_n, cells


def backward(
    gates: Tensor,
    cells: Tensor,
    weights: Sequence[Tensor],
    c_0: Tensor,
    lengths: Tensor | None,
    g_y: Tensor | None,
    g_h_n: Tensor,
    g_c_n: Tensor,
    g_cells: Tensor | None,
    *,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz, dh_0 and dc_0, from what the forward saved and the gradients of its results."""
    N, T, B, H = gates.shape[0], gates.shape[1], gates.shape[2], gates.shape[3] // 4
    HP = height(H)
    arch = config.architecture(gates.device)
    tile = config.choose("lstm_resident_bwd", arch, gates.dtype, {"H": HP, "B": B})
    dz = torch.empty_like(gates) if lengths is None else torch.zeros_like(gates)
    dh_0, dc_0 = torch.empty_like(c_0), torch.empty_like(c_0)
    grid = -(-B // tile.blocks["BLOCK_B"]), N
    steps = gates.new_empty(grid[0] * N, dtype=torch.int32)
    with torch.cuda.device_of(gates):
        lstm_resident_bwd[grid](
            gates, cells, weights[0], weights[-1], c_0, lengths, g_y, g_h_n, g_c_n, g_cells,
            dz, dh_0, dc_0, steps,
            N, T, B, H, HP=HP, PREC=product_precision(gates.dtype, precision, arch), **tile.options,
        )  # fmt: skip
    return dz, dh_0, dc_0
