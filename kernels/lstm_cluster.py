"""The LSTM's recurrence over a whole sequence by thread-block clusters (Hopper, sm_90), forward, in Gluon.

    z_t = x_t W_ihᵀ + b_ih + b_hh + h_{t-1} W_hhᵀ        (all but the last term is given)
    i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o);  g = tanh(z_g)
    c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)            (time and lengths: see recurrence.py)

One cluster of up to 16 thread blocks (CTAs) takes all steps of BLOCK_B rows of the batch in one direction.
Its CTAs share W_hh out among their shared memories, by hidden units, and keep it there: a step reads z and h
alone. It is one product for all gates, transposed so that the few rows of the batch are wgmma's short side:

    zᵀ [4·HP, BLOCK_B] = W_hh [4·HP, HP] hᵀ [HP, BLOCK_B],    HP = H up to a power of two, zeros in between

The rows of W_hh are in such an order (`weight_row`) that the thread that gets a unit's i gets its f, g and o.
A CTA writes the h of its own units to global memory and after the cluster's hardware barrier reads that of
all from L2. There are two places for that, in turn: what is written in step s + 1 lies over what was read in
step s, and all have read that before they arrive at the barrier of step s. The outputs are written behind the
barrier's fence, which would wait for them. No atomics: the same bits in every run.

Compiled and inspected only: Gluon has no interpreter, so nobody has seen a number that this kernel made. It
runs only where it is asked for by name, until a GPU has shown that its numbers are right.

Shapes: z, gates (N, T, B, 4H), W_hh (4H, H), y (T, B, N·H), cells (N, T, B, H), states (N, B, H),
lengths (B,); N directions, 1 or 2.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from . import config
from .launch import packed, width
from .numerics import as_multiplied
from .recurrence import ends, first_rows, load_gates, store_gates, update

# The largest H whose W_hh fits: 128 KiB in each CTA.
_MOST = {torch.float32: 256, torch.float16: 512, torch.bfloat16: 512}


# Layouts are made in functions of their own: in a kernel's body the lists in them would not do.


@gluon.constexpr_function
def over_ctas(ctas, dim):
    """How a matrix is spread over a cluster: split along `dim`, or all of it in every CTA if that is None."""
    return [[step * (dim == 0), step * (dim == 1)] for step in (1, 2, 4, 8) if step < ctas]


@gluon.constexpr_function
def rows_layout(dtype, ctas, warps, dim):
    """Of matrices read from global memory: 16 bytes a thread, 8 threads along a row."""
    vector = 128 // dtype.primitive_bitwidth
    return gl.BlockedLayout([1, vector], [4, 8], [warps, 1], [1, 0], cga_layout=over_ctas(ctas, dim))


@gluon.constexpr_function
def shared_layout(rows, columns, dtype, ctas, dim):
    """Of an operand of wgmma in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype, cga_layout=over_ctas(ctas, dim))


@gluon.constexpr_function
def product_layout(columns, dtype, ctas, warps):
    """Of the product: 16 rows a warp at a time."""
    shape = [16, columns, 256 // dtype.primitive_bitwidth]
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], shape, cga_layout=over_ctas(ctas, 0))


@gluon.jit
def weight_row(row, WARPS: gl.constexpr):
    """The gate and the unit of a row of the product.

    Each warp gets 16 rows of every 16·WARPS, and the same thread rows r and r + 8 of them. So i and f of 8
    units are 16 rows, and g and o are the 16 rows that the warp gets next.
    """
    of_8 = row // 8
    gate = of_8 // (2 * WARPS) % 2 * 2 + of_8 % 2
    unit = (of_8 // (4 * WARPS) * WARPS + of_8 // 2 % WARPS) * 8 + row % 8
    return gate, unit


@gluon.jit
def by_unit(z, HP: gl.constexpr, BLOCK_B: gl.constexpr, WARPS: gl.constexpr):
    """The product [4·HP, BLOCK_B] as [HP, BLOCK_B, 2, 2]: of each unit [[i, g], [f, o]]."""
    z = z.reshape([HP // (8 * WARPS), 2, WARPS, 2, 8, BLOCK_B])
    return z.permute([0, 2, 4, 5, 3, 1]).reshape([HP, BLOCK_B, 2, 2])


@gluon.jit
def split_units(z, HP: gl.constexpr, BLOCK_B: gl.constexpr, WARPS: gl.constexpr):
    """The product as the four tiles of i, f, g and o, each [HP, BLOCK_B]: every thread keeps what it has."""
    first, second = by_unit(z, HP, BLOCK_B, WARPS).split()
    i, f = first.split()
    g, o = second.split()
    return i, f, g, o


@gluon.jit
def arrive():
    """Come to the cluster's barrier: what was written before can be read by those that pass it."""
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; mov.u32 $0, 0;", "=r,~{memory}", [], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait():
    """Pass the cluster's barrier, when all of its threads have come to it."""
    gl.inline_asm_elementwise(
        "barrier.cluster.wait.acquire.aligned; mov.u32 $0, 0;", "=r,~{memory}", [], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def largest(x):
    """The maximum of a vector, by an instruction whose result is one for the whole warp.

    Only in a loop up to such a number does the assembler keep the addresses of wgmma's operands in uniform
    registers; elsewhere there are too few.
    """
    return gl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, -1;", "=r,r", [gl.max(x, 0)], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def nothing(step):
    """0, but the compiler does not know: it may be another number in every step.

    Added to an index of shared memory it keeps the addresses of all wgmma's operands, up to 128, from being
    computed before the loop, for which there are too few registers.
    """
    return gl.inline_asm_elementwise(
        "shr.s32 $0, $1, 31;", "=r,r", [step], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit(do_not_specialize=["T", "B", "H"])
def lstm_cluster_fwd(
    z_ptr, w_ptr, w_reverse_ptr, h_0_ptr, c_0_ptr, lengths_ptr,
    exchange_ptr, y_ptr, h_n_ptr, c_n_ptr, cells_ptr,
    T, B, H,
    VEC: gl.constexpr, HP: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """All steps of BLOCK_B rows in one direction. Where cells are to be written, gates are written over z.

    H: in units of VEC elements. exchange (2, N, rows up to whole tiles, HP): h as it is multiplied, of a step
    and of the next. Both operands are in parts of BLOCK_K columns: all of W_hh does not fit into registers.
    """
    CTAS: gl.constexpr = gl.num_ctas()
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = w_ptr.dtype.element_ty
    PARTS: gl.constexpr = HP // BLOCK_K
    w_layout: gl.constexpr = rows_layout(DTYPE, CTAS, WARPS, 0)
    h_layout: gl.constexpr = rows_layout(DTYPE, CTAS, WARPS, None)
    w_shared: gl.constexpr = shared_layout(4 * HP, BLOCK_K, DTYPE, CTAS, 0)
    h_shared: gl.constexpr = shared_layout(BLOCK_B, BLOCK_K, DTYPE, CTAS, None)
    tile = gl.program_id(0)
    n = gl.program_id(1)
    N = gl.num_programs(1)
    H *= VEC

    if n == 1:
        w_ptr = w_reverse_ptr
    w_parts = gl.allocate_shared_memory(DTYPE, [PARTS, 4 * HP, BLOCK_K], w_shared)
    h_parts = ()  # each allocated for itself: of one tensor, no two parts would be written without a barrier
    for _ in gl.static_range(PARTS):
        h_parts += (gl.allocate_shared_memory(DTYPE, [1, BLOCK_B, BLOCK_K], h_shared),)
    gate, of_row = weight_row(gl.arange(0, 4 * HP, gl.SliceLayout(1, w_layout)), WARPS)
    k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, w_layout))
    w_at = w_ptr + (gate * H + of_row)[:, None] * H + k[None, :]
    for part in range(PARTS):
        k0 = part * BLOCK_K
        w = gl.load(w_at + k0, (of_row < H)[:, None] & (k < H - k0)[None, :], other=0.0)
        w_parts.index(part).store(as_multiplied(w, "tf32"))

    zeros = gl.zeros([4 * HP, BLOCK_B], gl.float32, product_layout(BLOCK_B, DTYPE, CTAS, WARPS))
    tiles = split_units(zeros, HP, BLOCK_B, WARPS)
    layout: gl.constexpr = tiles[0].type.layout
    unit = gl.arange(0, HP, gl.SliceLayout(1, layout))[:, None]
    row = gl.arange(0, BLOCK_B, gl.SliceLayout(0, layout))
    b = tile * BLOCK_B + row
    end = ends(lengths_ptr, b, T, B)
    if lengths_ptr is None:
        steps = T
    else:
        steps = largest(end)
    first, ahead = first_rows(n, end, b, T, B)
    at = first * H  # where the row is in cells; 4 times that in z, N times in y
    ahead *= H
    before = n.to(gl.int64) * T * B * H  # of the other direction
    z_ptr += before * 4
    y_ptr += n * H

    inside = (b < B)[None, :] & (unit < H)
    state_at = (n.to(gl.int64) * B + b)[None, :] * H + unit
    h = gl.load(h_0_ptr + state_at, inside, other=0.0)
    c = gl.load(c_0_ptr + state_at, inside, other=0.0).to(gl.float32)

    rows = gl.num_programs(0).to(gl.int64) * BLOCK_B
    turn = N * rows * HP  # from one buffer to the other
    exchange_ptr += (n * rows + tile * BLOCK_B) * HP
    put_at = row[None, :] * HP + unit
    take_row = gl.arange(0, BLOCK_B, gl.SliceLayout(1, h_layout))
    take_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, h_layout))
    take_at = take_row[:, None] * HP + take_k[None, :]
    # No row or unit is read that was not written: those outside are 0.
    gl.store(exchange_ptr + put_at, as_multiplied(h, "tf32"))
    arrive()
    wait()

    for s in range(steps):
        none = nothing(s)
        live = (s < end)[None, :]
        mask = live & (unit < H)
        z_i, z_f, z_g, z_o = load_gates(z_ptr, (at * 4)[None, :] + unit, H, mask)
        taken = ()
        for j in gl.static_range(PARTS):
            # .cg: not from L1, which may hold what was here two steps ago.
            from_ptr = exchange_ptr + (s & 1) * turn + j * BLOCK_K
            taken += (gl.load(from_ptr + take_at, cache_modifier=".cg"),)
        for j in gl.static_range(PARTS):
            h_parts[j].index(none).store(taken[j])
        hopper.fence_async_shared()
        sums = zeros
        for j in gl.static_range(PARTS):
            columns = h_parts[j].index(none).permute([1, 0])
            sums = hopper.warpgroup_mma(w_parts.index(none + j), columns, sums, is_async=True)
        sums = hopper.warpgroup_mma_wait(0, deps=[sums])
        i, f, g, o = split_units(sums, HP, BLOCK_B, WARPS)
        z_i = i + z_i.to(gl.float32)
        z_f = f + z_f.to(gl.float32)
        z_g = g + z_g.to(gl.float32)
        z_o = o + z_o.to(gl.float32)
        i, f, g, o, next_c, next_h = update(z_i, z_f, z_g, z_o, c)
        c = gl.where(live, next_c, c)
        h = gl.where(live, next_h.to(DTYPE), h)
        # Units past H stay 0 for the others, whatever h_0 holds: 0 times infinity would make NaN of them.
        put = gl.where(unit < H, h, 0.0)
        gl.store(exchange_ptr + ((s + 1) & 1) * turn + put_at, as_multiplied(put, "tf32"))
        arrive()
        # These writes are no concern of the barrier: they may take until the fence of the next one.
        gl.store(y_ptr + (at * N)[None, :] + unit, h, mask)
        if cells_ptr is not None:
            store_gates(z_ptr, (at * 4)[None, :] + unit, H, mask, i, f, g, o)
            gl.store(cells_ptr + before + at[None, :] + unit, c, mask)
        at += ahead
        wait()

    gl.store(h_n_ptr + state_at, h, inside)
    gl.store(c_n_ptr + state_at, c.to(DTYPE), inside)


def serves(H: int, dtype: torch.dtype, precision: str, arch: str) -> bool:
    """Whether there is a kernel for such a layer: on Hopper, if a cluster can hold W_hh."""
    in_hardware = dtype != torch.float32 or precision == "tf32"
    return arch == "sm_90" and in_hardware and 1 <= H <= _MOST.get(dtype, 0)


def forward(
    z: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    lengths: Tensor | None,
    *,
    precision: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, h_n, c_n and, with `save`, the cells; the gates are then written over z.

    Raises:
        ValueError: if the kernel does not serve such a layer.
    """
    N, T, B, H = *z.shape[:3], z.shape[3] // 4
    arch = config.architecture(z.device)
    if not serves(H, z.dtype, precision, arch):
        raise ValueError(
            "a cluster on sm_90 takes hidden_size up to 512 in float16 or bfloat16 and up to 256 in float32 "
            f"with precision 'tf32'; got {H} in {z.dtype} with precision {precision!r} on {arch}"
        )
    HP = max(64, triton.next_power_of_2(H))
    tile = config.choose("lstm_cluster_fwd", arch, z.dtype, {"H": HP, "B": B})
    block_b, ctas = tile.blocks["BLOCK_B"], tile.blocks["CTAS"]
    tiles = triton.cdiv(B, block_b)
    empty = z.new_empty if lengths is None else z.new_zeros
    y = empty(T, B, N * H)
    cells = empty(N, T, B, H, dtype=torch.float32) if save else None
    h_n, c_n = torch.empty_like(h_0), torch.empty_like(c_0)
    if B * N == 0:
        return y, h_n, c_n, cells
    exchange = z.new_empty(2, N, tiles * block_b, HP)
    vec = width(z.element_size(), H)
    block_k = min(HP, 256 // z.element_size())
    with torch.cuda.device_of(z):
        lstm_cluster_fwd[(tiles, N)](
            z, weights[0], weights[-1], h_0, c_0, packed(lengths), exchange, y, h_n, c_n, cells,
            T, B, H // vec,
            VEC=vec, HP=HP, BLOCK_B=block_b, BLOCK_K=block_k, num_warps=tile.num_warps, num_ctas=ctas,
        )  # fmt: skip
    return y, h_n, c_n, cells
