"""What a time step of the LSTM's recurrence should cost on one GPU: a model, nothing is measured.

Its rates are in `Device`, to be replaced by measured ones. The us of a step, on the busiest SM:

    resident, persistent   max(exchange + max(product, shared, weights) + elementwise + barrier, hbm)
    step                   launch + max(max(product, shared, exchange + weights) + elementwise + barrier, hbm)

Shared memory feeds the product while it runs, so these two overlap, as does what is streamed of W. The h of
the last step must be there before the product begins: serial, but for `step`, which streams it as it does W.
What is read and written for one step alone (z, gates, cells, y) is fetched ahead, beside everything. A batch
too large for one run takes several runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil


@dataclass(frozen=True)
class Device:
    """Rates of one GPU: of the datasheet, or assumed."""

    name: str = "H200"
    sms: int = 132  # datasheet, SXM
    clock_ghz: float = 1.98  # the highest boost clock; the tensor rates below are at about 1.83
    bfloat16_tflops: float = 989.0  # datasheet, dense; float16 the same
    tf32_tflops: float = 494.5  # datasheet, dense; a third of it is more than the 67 of float32's own units
    hbm_tb_s: float = 4.8  # datasheet
    shared_kib: float = 227.0  # CUDA programming guide, compute capability 9.0: what one program may take
    shared_bytes_clock: float = 128.0  # CUDA programming guide: 32 banks of 4 bytes, per SM
    mufu_clock: float = 16.0  # CUDA programming guide: exp and reciprocal, per SM
    l2_tb_s: float = 5.5  # assumed, all SMs together
    l2_bytes_clock: float = 64.0  # assumed, per SM
    l2_weights_mb: float = 40.0  # assumed: how much of the 50 MB of L2 W can keep from step to step
    weights_kib: float = 190.0  # assumed: how much of shared memory W may take in `persistent`
    grid_barrier_us: float = 1.2  # assumed: from storing h to holding the others' h
    four_barrier_us: float = 0.6  # assumed: the same between the four programs that share a sum backward
    block_barrier_clocks: float = 30.0  # assumed
    graph_launch_us: float = 2.5  # assumed: in a CUDA graph, from a kernel's end to the next one at work
    launch_us: float = 6.0  # assumed: the same from the host
    library: float = 0.7  # assumed: what a library's GEMM reaches of the tensor rate

    def clocks(self, number: float) -> float:
        return number / self.clock_ghz / 1e3

    def product_us(self, flops: float, dtype: str, sms: int = 1) -> float:
        """`flops` of the equations, in `sms` SMs."""
        tflops = self.bfloat16_tflops if dtype == "bfloat16" else self.tf32_tflops / PASSES[dtype]
        return flops / (tflops * 1e6 * sms / self.sms)


H200 = Device()

DTYPES = ("bfloat16", "tf32", "float32")
BYTES = {"bfloat16": 2, "tf32": 4, "float32": 4}
# float32: three TF32 passes, W and h in shared memory twice, rounded to TF32 and the remainder.
PASSES = {"bfloat16": 1, "tf32": 1, "float32": 3}
HELD = {"bfloat16": 2, "tf32": 4, "float32": 8}

KERNELS = ("resident", "persistent", "step")
RESIDENT_H = {"bfloat16": 128, "tf32": 64, "float32": 64}
RESIDENT_FIRST, PERSISTENT_H = 64, 2048  # to which H the rule takes them
BLOCK_H = (16, 32, 64)
BLOCK_B = (16, 32, 64)
# Read from the compiled code of the kernels' prototypes (sm_90); no size changes them much.
MUFU = {"forward": 10, "backward": 2}  # exp and reciprocal per unit and row; gates are saved, tanh(c) is not
BLOCK_BARRIERS = {"forward": 7, "backward": 9}
# Of a backward product that is split along K, as fewer than 64 units do not fill wgmma; not in `persistent`.
PARTIAL_SUMS = 8

STEPS = 512  # for the wavefront: its two layers take STEPS + 1
LAYERS = 2


@dataclass(frozen=True)
class Cell:
    """One direction of one layer, or a wavefront of several, where each has its own programs."""

    H: int
    B: int
    dtype: str = "bfloat16"
    direction: str = "forward"
    layers: int = 1

    @property
    def case(self) -> str:
        return f"roofline/{self.dtype}/{self.direction}/H{self.H} B{self.B}"

    @property
    def products(self) -> tuple[int, ...]:
        """Of width H, for each layer: its own h, and in all but the first the output of the layer below."""
        return (1,) + (2,) * (self.layers - 1)

    @property
    def flops(self) -> int:
        return 8 * self.H * self.H * self.B * sum(self.products)

    @property
    def weights_bytes(self) -> int:
        return 4 * self.H * self.H * BYTES[self.dtype] * sum(self.products)


@dataclass(frozen=True)
class Cost:
    """A time step of one kernel. Bytes are of the whole GPU; times already count the runs."""

    block_h: int
    block_b: int
    programs: int  # of one run
    runs: int
    weights_shared_bytes: int  # read from shared memory, once for each pass
    weights_l2_bytes: int
    weights_hbm_bytes: int
    exchange_bytes: int  # h, or in backward dz and partial sums, written once and read by all that need it
    state_bytes: int  # z, gates, cells, y: from and to HBM
    product_us: float
    shared_us: float
    weights_us: float
    exchange_us: float
    hbm_us: float
    elementwise_us: float
    barrier_us: float
    launch_us: float
    us: float

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        parts = ("product", "shared", "weights", "exchange", "hbm", "elementwise", "barrier", "launch")
        return max(parts, key=lambda part: getattr(self, f"{part}_us"))


def price(
    device: Device, cell: Cell, kernel: str, block_h: int, block_b: int, programs: int, runs: int = 1
) -> Cost:
    """What `runs` runs, one after the other, of programs of `block_h` units and `block_b` rows cost."""
    size, held, passes = BYTES[cell.dtype], HELD[cell.dtype], PASSES[cell.dtype]
    backward, step = cell.direction == "backward", kernel == "step"
    width = 4 if backward else 1  # of what is exchanged: dz is four times as wide as h
    # Backward a program of `persistent` sums over one gate, for its own units and those of three others.
    shares = backward and kernel == "persistent"
    M, K = (block_h, 4 * cell.H) if backward and not shares else (4 * block_h, cell.H)
    rows = min(cell.B, block_b)
    busy = ceil(programs / device.sms)  # programs of the busiest SM
    # Sums pass through shared memory, from the product's layout to that of the rest.
    sums = (PARTIAL_SUMS if M < 64 else 1) * M * block_b * 4
    if step:
        room = 0
    elif kernel == "persistent":
        room = int(min(device.weights_kib * 1024, device.shared_kib * 1024 - sums) / held)
    else:
        room = M * K

    # Of the busiest program, which in a wavefront is one of an upper layer.
    most = max(cell.products)
    weights = most * M * K
    streamed = max(weights - room, 0)
    # wgmma takes 64 rows of W and reads the other operand anew for each.
    operands = (weights + max(1, M // 64) * most * K * block_b) * size * passes
    written = (most * K * block_b + streamed) * held
    shared = device.clocks(busy * (operands + written + 2 * sums) / device.shared_bytes_clock)
    product = device.product_us(busy * 2 * weights * block_b, cell.dtype)

    # Of all programs together.
    each = programs // cell.layers
    total = sum(cell.products)
    streams = sum(max(n * M * K - room, 0) for n in cell.products) * size
    weights_l2 = each * streams
    from_hbm = ceil(cell.H / block_h) * streams if cell.weights_bytes > device.l2_weights_mb * 1e6 else 0
    stream = max(
        device.clocks(busy * streamed * size / device.l2_bytes_clock),
        weights_l2 / device.l2_tb_s / 1e6,
        from_hbm / device.hbm_tb_s / 1e6,
    )
    alone = kernel == "resident"
    partial = 4 * block_h * rows * 4 if shares else 0  # that a program writes, and as many that it reads
    exchange_bytes = 0 if alone else rows * size * (each * total * K + programs * width * block_h)
    exchange_bytes += 2 * programs * partial
    reads = 0 if alone else busy * (most * K * rows * size + partial)
    exchange = max(device.clocks(reads / device.l2_bytes_clock), exchange_bytes / device.l2_tb_s / 1e6)

    # Forward: z, y and for training gates and cells; backward: gates, cells, the gradient of y, dz.
    state = ceil(cell.layers * cell.H * cell.B * (9 * size + 4) / runs)
    hbm = (state + from_hbm) / device.hbm_tb_s / 1e6
    elementwise = device.clocks(busy * block_h * block_b * MUFU[cell.direction] / device.mufu_clock)
    barrier = device.clocks(BLOCK_BARRIERS[cell.direction] * device.block_barrier_clocks)
    if kernel == "persistent":
        barrier += device.grid_barrier_us + (device.four_barrier_us if shares else 0.0)
    launch = device.graph_launch_us if step else 0.0

    if step:
        work = max(product, shared, exchange + stream)
    else:
        work = exchange + max(product, shared, stream)
    us = launch + max(work + elementwise + barrier, hbm)
    return Cost(
        block_h=block_h,
        block_b=block_b,
        programs=programs,
        runs=runs,
        weights_shared_bytes=runs * each * total * M * K * size * passes,
        weights_l2_bytes=runs * weights_l2,
        weights_hbm_bytes=runs * from_hbm,
        exchange_bytes=runs * exchange_bytes,
        state_bytes=runs * state,
        product_us=runs * product,
        shared_us=runs * shared,
        weights_us=runs * stream,
        exchange_us=runs * exchange,
        hbm_us=runs * hbm,
        elementwise_us=runs * elementwise,
        barrier_us=runs * barrier,
        launch_us=runs * launch,
        us=runs * us,
    )


def _runs(tiles: int, at_once: int) -> tuple[int, int]:
    """Runs that `tiles` of the batch take, and the tiles of each."""
    runs = ceil(tiles / at_once)
    return runs, ceil(tiles / runs)


def resident(device: Device, cell: Cell) -> Cost | None:
    """16 rows and all of W in a program; no other program is waited for."""
    held = 4 * cell.H * cell.H * HELD[cell.dtype] + 4 * cell.H * 16 * HELD[cell.dtype]
    if RESIDENT_H[cell.dtype] < cell.H or held > device.shared_kib * 1024:
        return None
    runs, programs = _runs(ceil(cell.B / 16), device.sms)
    return price(device, cell, "resident", cell.H, 16, programs, runs)


def persistent(device: Device, cell: Cell) -> Cost | None:
    """A slice of W in each program for all steps, as much of it as fits; one grid barrier a step."""
    costs = []
    for block_h in BLOCK_H:
        slices = cell.layers * ceil(cell.H / block_h)
        if slices > device.sms:
            continue
        for block_b in BLOCK_B:
            runs, tiles = _runs(ceil(cell.B / block_b), device.sms // slices)
            costs.append(price(device, cell, "persistent", block_h, block_b, slices * tiles, runs))
    return min(costs, key=lambda cost: cost.us, default=None)


def step(device: Device, cell: Cell) -> Cost:
    """A launch each step: W comes anew from L2, or from HBM where it does not stay in L2."""
    costs = [
        price(device, cell, "step", block_h, block_b, ceil(cell.H / block_h) * ceil(cell.B / block_b))
        for block_h in BLOCK_H
        for block_b in (*BLOCK_B, 128)
    ]
    return min(costs, key=lambda cost: cost.us)


def costs(device: Device, cell: Cell) -> dict[str, Cost]:
    """Every kernel that can serve the cell, the cheapest first."""
    offers = {
        "resident": resident(device, cell),
        "persistent": persistent(device, cell),
        "step": step(device, cell),
    }
    return dict(sorted(((k, c) for k, c in offers.items() if c is not None), key=lambda item: item[1].us))


def served(cell: Cell) -> str:
    """The kernel that gatematch.lstm takes for such a layer, by the rule of lstm/selection.py."""
    if cell.H <= RESIDENT_FIRST:
        return "resident"
    return "persistent" if cell.H <= PERSISTENT_H else "step"


def wavefront(device: Device, cell: Cell) -> tuple[float, float] | None:
    """us of a time step of two layers: one after the other, each by its best kernel, with a library's input
    product between; and as a wavefront, where one persistent kernel holds both W_hh and the upper W_ih."""
    size = BYTES[cell.dtype]
    together = persistent(device, replace(cell, layers=LAYERS))
    if together is None:
        return None
    # Of the input product: y is read and z written, or in backward dz read and the gradient of y written.
    between = max(
        device.product_us(cell.flops, cell.dtype, device.sms) / device.library,
        5 * cell.H * cell.B * size / device.hbm_tb_s / 1e6,
    )
    apart = LAYERS * next(iter(costs(device, cell).values())).us + (LAYERS - 1) * between
    return apart, together.us * (STEPS + LAYERS - 1) / STEPS


def step_wins_from(device: Device, cell: Cell, largest: int = 4096) -> int | None:
    """From which H on, in multiples of 64 up to `largest`, `step` is cheaper than `persistent`, if any."""
    first = None
    for H in range(largest, 0, -64):
        here = replace(cell, H=H)
        rival = persistent(device, here)
        if rival is not None and step(device, here).us >= rival.us:
            break
        first = H
    return first
