"""The LSTM's recurrence with one launch per time step, for any size; and the single step of an LSTMCell.

Equations, time and tiles: see recurrence.py. A program computes BLOCK_H hidden units, all four gates of them,
of BLOCK_B rows of the batch in one direction:

    zᵀ [4·BLOCK_H, BLOCK_B] = z_tᵀ + W_hh slice [4·BLOCK_H, H] hᵀ [H, BLOCK_B]           (forward)
    zᵀ [4·BLOCK_H, BLOCK_B] = W_ih slice xᵀ + W_hh slice hᵀ + b_ih + b_hh                (forward of a cell)
    dh [BLOCK_B, BLOCK_H] = dz_{t+1} [BLOCK_B, 4H] W_hh slice [4H, BLOCK_H]              (backward)

Both operands are read in chunks of BLOCK_K, the next ones on their way during each product; the weights come
from L2 or memory in every step. h is read from y, where the step before has stored it, and dz of the step
after from dz: no program writes what another one of its launch reads, and nothing is exchanged or copied.
Only c and dc are kept beside, in float32. What the product does not need is loaded before it, used after it.

The host launches T steps (T + 1 in backward, the last one for the initial state) whatever the lengths, with
little to do for each (`launch_steps`), and never waits; a program whose rows have all ended returns at once.
No atomics: the same bits in every run.

**Saved for backward.** The activated gates, over z, and c_t in float32, as in lstm_persistent.py; of a cell,
the gates.

Shapes: z, gates, dz (N, T, B, 4H), W_hh (4H, H), y (T, B, N·H), cells (N, T, B, H), states (N, B, H); for a
cell x (B, I), W_ih (4H, I), biases (4H,), gates and dz (B, 4H), states (B, H).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .launch import launch, launch_steps, product_precision, width
from .numerics import as_multiplied
from .recurrence import ends, first_rows, load_gates, split_gates, store_gates, update, update_gradient


@triton.jit
def add_product(z, w_row, in_w, x_row, in_x, K, PREC: tl.constexpr, BLOCK_K: tl.constexpr):
    """z + W xᵀ, from pointers to the rows of W and of x, which have K columns."""
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        w = tl.load(w_row[:, None] + k[None, :], in_w[:, None] & (k < K)[None, :], other=0.0)
        x = tl.load(x_row[:, None] + k[None, :], in_x[:, None] & (k < K)[None, :], other=0.0)
        z = tl.dot(as_multiplied(w, PREC), tl.trans(as_multiplied(x, PREC)), z, input_precision=PREC)
    return z


@triton.jit(do_not_specialize=["s", "N", "T", "B", "H", "I"])
def lstm_step_fwd(
    z_ptr, x_ptr, w_ih_ptr, b_ih_ptr, b_hh_ptr, w_ptr, w_reverse_ptr, h_ptr, c_0_ptr, lengths_ptr,
    c_ptr, y_ptr, h_n_ptr, c_n_ptr, gates_ptr, cells_ptr,
    s, N, T, B, H, I,
    VEC_H: tl.constexpr, VEC_I: tl.constexpr, PREC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Step s of BLOCK_H units of BLOCK_B rows in one direction.

    h_ptr: h_0 in step 0, then y; h and c are 0 before the first step where they are not given. Either z is
    given, or x, w_ih and perhaps the biases are, and there is one step. H and I: in units of VEC_H and VEC_I.
    """
    H *= VEC_H
    I *= VEC_I
    dtype = y_ptr.dtype.element_ty
    d = tl.program_id(2)
    u0 = tl.program_id(1) * BLOCK_H
    u = u0 + tl.arange(0, BLOCK_H)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    end = ends(lengths_ptr, b, T, B)
    if s >= tl.max(end, 0):
        return
    first, step = first_rows(d, end, b, T, B)
    row = first + s * step
    going = s < end
    live = (u < H)[:, None] & going[None, :]
    state = (d * B + b)[None, :].to(tl.int64) * H + u[:, None]

    # Row r of the slice is gate r // BLOCK_H of unit r % BLOCK_H.
    r = tl.arange(0, 4 * BLOCK_H)
    w_row = (r // BLOCK_H) * H + u0 + r % BLOCK_H
    in_w = u0 + r % BLOCK_H < H
    c = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
    if c_0_ptr is not None:
        c = tl.load(c_0_ptr + state, live & (s == 0), other=0.0).to(tl.float32)
    if c_ptr is not None:
        c = tl.where(s == 0, c, tl.load(c_ptr + state, live & (s > 0), other=0.0))
    z = tl.zeros((4 * BLOCK_H, BLOCK_B), tl.float32)
    if z_ptr is not None:
        z_ptr += d.to(tl.int64) * T * B * 4 * H
        in_z = in_w[:, None] & going[None, :]
        added = tl.load(z_ptr + row[None, :] * 4 * H + w_row[:, None], in_z, other=0.0)
    if b_ih_ptr is not None:
        bias = tl.load(b_ih_ptr + w_row, in_w, other=0.0).to(tl.float32)
        bias += tl.load(b_hh_ptr + w_row, in_w, other=0.0).to(tl.float32)
    if x_ptr is not None:
        z = add_product(
            z, w_ih_ptr + w_row.to(tl.int64) * I, in_w, x_ptr + b.to(tl.int64) * I, going, I, PREC, BLOCK_K
        )
    if h_ptr is not None:
        w_ptr = tl.where(d == 0, w_ptr, w_reverse_ptr)
        h_row = h_ptr + tl.where(s == 0, (d * B + b).to(tl.int64), (row - step) * N + d) * H
        z = add_product(z, w_ptr + w_row.to(tl.int64) * H, in_w, h_row, going, H, PREC, BLOCK_K)
    if z_ptr is not None:
        z += added
    if b_ih_ptr is not None:
        z += bias[:, None]

    z_i, z_f, z_g, z_o = split_gates(z, BLOCK_H, BLOCK_B)
    i, f, g, o, c, h = update(z_i, z_f, z_g, z_o, c)
    last = live & (s + 1 == end)[None, :]
    tl.store(y_ptr + row[None, :] * N * H + d * H + u[:, None], h.to(dtype), live)
    if h_n_ptr is not None:
        tl.store(h_n_ptr + state, h.to(dtype), last)
    tl.store(c_n_ptr + state, c.to(dtype), last)
    if c_ptr is not None:
        tl.store(c_ptr + state, c, live)
    if gates_ptr is not None:
        gates_ptr += d.to(tl.int64) * T * B * 4 * H
        store_gates(gates_ptr, row[None, :] * 4 * H + u[:, None], H, live, i, f, g, o)
    if cells_ptr is not None:
        cells_ptr += d.to(tl.int64) * T * B * H
        tl.store(cells_ptr + row[None, :] * H + u[:, None], c, live)


@triton.jit(do_not_specialize=["s", "N", "T", "B", "H"])
def lstm_step_bwd(
    gates_ptr, cells_ptr, w_ptr, w_reverse_ptr, c_0_ptr, lengths_ptr,
    g_y_ptr, g_h_n_ptr, g_c_n_ptr, g_cells_ptr, dz_ptr, dc_ptr, dh_0_ptr, dc_0_ptr,
    s, N, T, B, H,
    VEC_H: tl.constexpr, PREC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Step s of BLOCK_H units of BLOCK_B rows in one direction; s = -1 gives the gradients of h_0 and c_0.

    Without w there is one step, without cells c is computed again. H is in units of VEC_H. PARTS: into how
    many the sum over a chunk is cut, as in lstm_persistent.py.
    """
    H *= VEC_H
    d = tl.program_id(2)
    u = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    end = ends(lengths_ptr, b, T, B)
    steps = tl.max(end, 0)
    if s >= steps:
        return
    first, step = first_rows(d, end, b, T, B)
    row = first + s * step
    inside = (u < H)[:, None] & (b < B)[None, :]
    live = inside & ((s >= 0) & (s < end))[None, :]
    goes_on = s + 1 < end  # there is a later step, which has left dz and dc
    later = inside & goes_on[None, :]
    state = (d * B + b)[None, :].to(tl.int64) * H + u[:, None]
    z_at = row[None, :] * 4 * H + u[:, None]
    cells_at = row[None, :] * H + u[:, None]
    gates_ptr += d.to(tl.int64) * T * B * 4 * H
    dz_ptr += d.to(tl.int64) * T * B * 4 * H

    dh = tl.load(g_h_n_ptr + state, inside & ~later, other=0.0).to(tl.float32)
    dc = tl.load(g_c_n_ptr + state, inside & ~later, other=0.0).to(tl.float32)
    i, f, g, o = load_gates(gates_ptr, z_at, H, live)
    before = tl.load(c_0_ptr + state, live & (s == 0), other=0.0).to(tl.float32)
    if cells_ptr is not None:
        cells_ptr += d.to(tl.int64) * T * B * H
        c = tl.load(cells_ptr + cells_at, live, other=0.0).to(tl.float32)
        left = tl.load(cells_ptr + cells_at - step * H, live & (s > 0), other=0.0).to(tl.float32)
        before = tl.where(s > 0, left, before)
    else:
        c = f.to(tl.float32) * before + i.to(tl.float32) * g.to(tl.float32)
    if g_y_ptr is not None:
        from_y = tl.load(g_y_ptr + row[None, :] * N * H + d * H + u[:, None], live, other=0.0)
    if g_cells_ptr is not None:
        from_cells = tl.load(g_cells_ptr + d.to(tl.int64) * T * B * H + cells_at, live, other=0.0)

    if w_ptr is not None:
        dc = tl.where(later, tl.load(dc_ptr + state, later, other=0.0), dc)
        w_ptr = tl.where(d == 0, w_ptr, w_reverse_ptr)
        dz_row = dz_ptr + (row + step) * 4 * H
        columns = tl.where(s + 1 < steps, 4 * H, 0)  # no product before the last step of all rows
        if PARTS == 1:
            total = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
            for k0 in range(0, columns, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                in_w = (k < 4 * H)[:, None] & (u < H)[None, :]
                in_dz = goes_on[:, None] & (k < 4 * H)[None, :]
                w = tl.load(w_ptr + k[:, None].to(tl.int64) * H + u[None, :], in_w, other=0.0)
                dz = tl.load(dz_row[:, None] + k[None, :], in_dz, other=0.0)
                total = tl.dot(as_multiplied(dz, PREC), as_multiplied(w, PREC), total, input_precision=PREC)
        else:
            PART: tl.constexpr = BLOCK_K // PARTS
            parts = tl.zeros((PARTS, BLOCK_B, BLOCK_H), tl.float32)
            for k0 in range(0, columns, BLOCK_K):
                k = k0 + tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
                in_w = (k < 4 * H)[:, :, None] & (u < H)[None, None, :]
                in_dz = goes_on[None, :, None] & (k < 4 * H)[:, None, :]
                w = tl.load(w_ptr + k[:, :, None].to(tl.int64) * H + u[None, None, :], in_w, other=0.0)
                dz = tl.load(dz_row[None, :, None] + k[:, None, :], in_dz, other=0.0)
                parts = tl.dot(as_multiplied(dz, PREC), as_multiplied(w, PREC), parts, input_precision=PREC)
            total = tl.sum(parts, 0)
        dh = tl.where(later, tl.trans(total), dh)
    if dh_0_ptr is not None:
        tl.store(dh_0_ptr + state, dh.to(dh_0_ptr.dtype.element_ty), inside & (s < 0))
        tl.store(dc_0_ptr + state, dc.to(dc_0_ptr.dtype.element_ty), inside & (s < 0))
    if g_y_ptr is not None:
        dh += from_y
    if g_cells_ptr is not None:
        dc += from_cells
    dz_i, dz_f, dz_g, dz_o, dc = update_gradient(i, f, g, o, c, before, dh, dc)
    store_gates(dz_ptr, z_at, H, live, dz_i, dz_f, dz_g, dz_o)
    tl.store(dc_ptr + state, dc.to(dc_ptr.dtype.element_ty), live)


def _grid(tile: config.Config, N: int, B: int, H: int) -> tuple[int, int, int]:
    return -(-B // tile.blocks["BLOCK_B"]), -(-H // tile.blocks["BLOCK_H"]), N


def _options(tile: config.Config, *vec: int) -> dict[str, int]:
    """The options of a forward launch. Rows at odd places are loaded value by value, each with an address in
    registers: fewer at a time."""
    BLOCK_K = tile.blocks["BLOCK_K"]
    return {**tile.options, "BLOCK_K": max(BLOCK_K // 4, 16) if min(vec) == 1 else BLOCK_K}


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
    N, T, B, columns = z.shape
    H = columns // 4
    arch = config.architecture(z.device)
    tile = config.choose("lstm_step_fwd", arch, z.dtype, {"H": H, "B": B})
    make = z.new_empty if lengths is None else z.new_zeros
    y = make(T, B, N * H)
    # A row of length 0 takes no step: its state stays.
    h_n, c_n = (torch.empty_like(x) if lengths is None else x.clone() for x in (h_0, c_0))
    cells = make(N, T, B, H, dtype=torch.float32) if save else None
    c = torch.empty_like(c_0, dtype=torch.float32)
    vec = width(z.element_size(), H)

    def arguments(s: int) -> tuple[Any, ...]:
        return (
            z, None, None, None, None, weights[0], weights[-1], y if s else h_0, c_0, lengths,
            c, y, h_n, c_n, z if save else None, cells,
            s, N, T, B, H // vec, 0,
        )  # fmt: skip

    with torch.cuda.device_of(z):
        launch_steps(
            lstm_step_fwd, _grid(tile, N, B, H), range(T), arguments,
            VEC_H=vec, VEC_I=1, PREC=product_precision(z.dtype, precision, arch), **_options(tile, vec),
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
    N, T, B, columns = gates.shape
    H = columns // 4
    arch = config.architecture(gates.device)
    tile = config.choose("lstm_step_bwd", arch, gates.dtype, {"H": H, "B": B})
    dz = torch.empty_like(gates) if lengths is None else torch.zeros_like(gates)
    dh_0, dc_0 = torch.empty_like(c_0), torch.empty_like(c_0)
    dc = torch.empty_like(c_0, dtype=torch.float32)
    vec = width(gates.element_size(), H)

    def arguments(s: int) -> tuple[Any, ...]:
        return (
            gates, cells, weights[0], weights[-1], c_0, lengths, g_y, g_h_n, g_c_n, g_cells,
            dz, dc, dh_0, dc_0,
            s, N, T, B, H // vec,
        )  # fmt: skip

    with torch.cuda.device_of(gates):
        launch_steps(
            lstm_step_bwd, _grid(tile, N, B, H), range(T - 1, -2, -1), arguments,
            VEC_H=vec, PREC=product_precision(gates.dtype, precision, arch), **tile.options,
        )  # fmt: skip
    return dz, dh_0, dc_0


def cell_forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    *,
    precision: str,
    save: bool,
    h_n: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """h and c after one step, from 0 without h and c, and, if `save`, its gates (B, 4H). h is stored in h_n,
    too. All contiguous; both biases or none, both states or none."""
    (B, I), H = x.shape, weight_hh.shape[1]
    arch = config.architecture(x.device)
    tile = config.choose("lstm_step_fwd", arch, x.dtype, {"H": H, "B": B})
    h_next, c_next = x.new_empty(B, H), x.new_empty(B, H)
    gates = x.new_empty(B, 4 * H) if save else None
    vec_h, vec_i = width(x.element_size(), H), width(x.element_size(), I)
    arguments = (
        None, x, weight_ih, bias_ih, bias_hh, weight_hh, weight_hh, h, c, None,
        None, h_next, h_n, c_next, gates, None,
        0, 1, 1, B, H // vec_h, I // vec_i,
    )  # fmt: skip
    with torch.cuda.device_of(x):
        launch(
            lstm_step_fwd, _grid(tile, 1, B, H), arguments,
            VEC_H=vec_h, VEC_I=vec_i, PREC=product_precision(x.dtype, precision, arch),
            **_options(tile, vec_h, vec_i),
        )  # fmt: skip
    return h_next, c_next, gates


def cell_gradient(gates: Tensor, c_before: Tensor, g_h: Tensor, g_c: Tensor) -> tuple[Tensor, Tensor]:
    """dz (B, 4H) and the gradient of c_before (B, H)."""
    B, H = c_before.shape
    arch = config.architecture(gates.device)
    tile = config.choose("lstm_step_bwd", arch, gates.dtype, {"H": H, "B": B})
    dz, dc = torch.empty_like(gates), torch.empty_like(c_before)
    vec = width(gates.element_size(), H)
    with torch.cuda.device_of(gates):
        lstm_step_bwd[_grid(tile, 1, B, H)](
            gates, None, None, None, c_before, None, None, g_h, g_c, None, dz, dc, None, None,
            0, 1, 1, B, H // vec,
            VEC_H=vec, PREC="tf32", **tile.options,
        )  # fmt: skip
    return dz, dc
