"""What the recurrent kernels share: which step of a row is where, the gates of one product, the cell update.

One step of one layer and direction, gates in the order i, f, g, o:

    z_t = x_t W_ihᵀ + b_ih + b_hh + h_{t-1} W_hhᵀ = [z_i, z_f, z_g, z_o]
    i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)        g = tanh(z_g)
    c_t = f c_{t-1} + i g                                     h_t = o tanh(c_t)

and backward, with dh and dc the gradients of h_t and of c_t by way of the next step:

    d     = dc + dh o (1 - tanh²(c_t))
    dz_i  = d g i (1 - i)         dz_f = d c_{t-1} f (1 - f)
    dz_g  = d i (1 - g²)          dz_o = dh tanh(c_t) o (1 - o)
    dc   <- d f                   dh  <- dz_t W_hh

**Time.** A row takes the steps s = 0 to end - 1, where end is its length. The forward direction is at time s
then, the reverse direction at end - 1 - s: every row begins with h_0 and c_0 at s = 0, whatever its length,
and a block of rows works until the longest of them ends. Nothing is sorted, and no length is read on the
host.

**Tiles** are [BLOCK_H, BLOCK_B], hidden units by rows of the batch: the product is zᵀ = W hᵀ, with the
weights as the operand that stays.

Shapes: z, gates (N, T, B, 4H), y (T, B, N·H), cells (N, T, B, H), states (N, B, H); N directions, 1 or 2.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .launch import multiprocessors
from .numerics import sigmoid, tanh


def padded(hidden_size: int) -> int:
    """H rounded up to what tiles are cut from; few sizes, so that few kernels are compiled."""
    multiple = 64 if hidden_size <= 512 else 128 if hidden_size <= 1024 else 256
    return -(-hidden_size // multiple) * multiple


def processors(device: torch.device) -> int:
    """How many programs surely run at once: one on each multiprocessor. In the interpreter all do."""
    return 2**31 if device.type == "cpu" else multiprocessors(device)


@triton.jit
def ends(lengths_ptr, b, T, B):
    """The number of steps of the rows b, 0 for those past the batch: [len(b)]."""
    if lengths_ptr is None:
        return tl.where(b < B, T, 0)
    else:
        length = tl.load(lengths_ptr + b, b < B, other=0)
        return tl.minimum(tl.maximum(length, 0), T).to(tl.int32)


@triton.jit
def first_rows(d, end, b, T, B):
    """Where step 0 of the rows b is among a direction's T·B rows, and how far on each further step is."""
    first = tl.where(d == 0, 0, end - 1)
    return first.to(tl.int64) * B + b, tl.where(d == 0, B, -B).to(tl.int64)


@triton.jit
def uniform(value, slot_ptr):
    """A number that all threads have, as one that the compiler knows to be the same in all.

    It comes back from memory: in a loop whose bound is computed by a reduction, the compiler keeps every
    address of the resident weights in a register of its own, more than there are.
    """
    tl.store(slot_ptr, value)
    tl.debug_barrier()
    return tl.load(slot_ptr, volatile=True)


@triton.jit
def split_gates(z, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """[4·BLOCK_H, BLOCK_B], gate by gate, as the four tiles of i, f, g and o."""
    if_, go = z.reshape(2, 2, BLOCK_H, BLOCK_B).permute(2, 3, 1, 0).split()
    i, f = if_.split()
    g, o = go.split()
    return i, f, g, o


@triton.jit
def taken_apart(x, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """x itself, split into its even and its odd units and joined again.

    A product leaves neighbouring units in different threads. To split them the compiler must move x to the
    layout of memory, once; it would move all that is loaded and stored to the layout of the product instead.
    """
    even, odd = x.reshape(BLOCK_H // 2, 2, BLOCK_B).permute(0, 2, 1).split()
    return tl.join(even, odd).permute(0, 2, 1).reshape(BLOCK_H, BLOCK_B)


@triton.jit
def load_gates(ptr, at, H, mask):
    """The tiles of i, f, g and o whose unit 0 of gate i is `at`."""
    i = tl.load(ptr + at, mask, other=0.0)
    f = tl.load(ptr + at + H, mask, other=0.0)
    g = tl.load(ptr + at + 2 * H, mask, other=0.0)
    o = tl.load(ptr + at + 3 * H, mask, other=0.0)
    return i, f, g, o


@triton.jit
def store_gates(ptr, at, H, mask, i, f, g, o):
    tl.store(ptr + at, i.to(ptr.dtype.element_ty), mask)
    tl.store(ptr + at + H, f.to(ptr.dtype.element_ty), mask)
    tl.store(ptr + at + 2 * H, g.to(ptr.dtype.element_ty), mask)
    tl.store(ptr + at + 3 * H, o.to(ptr.dtype.element_ty), mask)


@triton.jit
def update(z_i, z_f, z_g, z_o, c):
    """The activated gates, the next c and the next h, in float32."""
    i = sigmoid(z_i)
    f = sigmoid(z_f)
    g = tanh(z_g)
    o = sigmoid(z_o)
    c = f * c + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def update_gradient(i, f, g, o, c, before, dh, dc):
    """dz of the four gates, and dc of the step before, from c of this step and `before` it."""
    i = i.to(tl.float32)
    f = f.to(tl.float32)
    g = g.to(tl.float32)
    o = o.to(tl.float32)
    t = tanh(c)
    d = dc + dh * o * (1.0 - t * t)
    dz_i = d * g * i * (1.0 - i)
    dz_f = d * before * f * (1.0 - f)
    dz_g = d * i * (1.0 - g * g)
    dz_o = dh * t * o * (1.0 - o)
    return dz_i, dz_f, dz_g, dz_o, d * f


def slices(blocks: int, directions: int, programs: int, most: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut blocks of rows and directions, `programs` for each, so that no launch has more than `most`.

    Yields the first block, how many, the first direction, how many.
    """
    if programs > most:
        raise RuntimeError(f"{programs} programs must run at once, and there is room for {most}")
    together = directions if directions * programs <= most else 1
    at_once = most // (together * programs)
    for direction in range(0, directions, together):
        for block in range(0, blocks, at_once):
            yield block, min(at_once, blocks - block), direction, together
