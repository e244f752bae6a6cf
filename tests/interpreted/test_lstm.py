"""The LSTM kernels in Triton's interpreter, against float64 on the same inputs."""

import contextlib
import dataclasses
import itertools
import random

import pytest
import torch
import triton
import triton.language as tl
from interpreted.cooperative import Deadlock, cooperative
from lstm_contract import DTYPES, check_layer, largest_error, lengths_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence
from triton.runtime.errors import InterpreterError, OutOfResources

from gatematch.bench.launches import launched_with
from gatematch.kernels import config, lstm_persistent, lstm_resident, lstm_step
from gatematch.kernels import cooperative as launching
from gatematch.lstm import LSTM, LSTMCell, ops
from gatematch.lstm import layer as layers
from gatematch.lstm.reference import cell_update, lstm_cell_reference

torch.set_num_threads(1)
SIZES = (1, 3, 16, 64, 65, 128, 300)
BATCHES = (1, 3, 17, 64)
KERNELS = ("resident", "persistent", "step")


def steps(kernel):
    """Everything that a kernel is run under: the persistent one needs all its programs at once."""
    return cooperative(seed=random.randrange(1000)) if kernel == "persistent" else contextlib.nullcontext()


def served(kernel, H, dtype):
    return layers.serves(kernel, layers.Layer(H + -H % 16, dtype, "float32", torch.device("cpu")), True)


def cases():
    """Every kernel with every H and dtype, another B each time, and slowly with every H and B."""
    turn = itertools.count()
    for kernel, (d, dtype), (h, H) in itertools.product(KERNELS, enumerate(DTYPES), enumerate(SIZES)):
        if served(kernel, H, dtype):
            chosen = next(turn) % 3 if H <= 128 else 1
            quick = H < 128 or d == KERNELS.index(kernel)
            for b, B in enumerate(BATCHES):
                name = f"{kernel}-{str(dtype).removeprefix('torch.')}-H{H}-B{B}"
                if b == chosen and quick:
                    yield pytest.param(kernel, dtype, H, B, id=name)
                elif b == chosen or (b + h + d) % 3 == 0:
                    yield pytest.param(kernel, dtype, H, B, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(("kernel", "dtype", "H", "B"), list(cases()))
def test_values_and_gradients(kernel, dtype, H, B):
    with steps(kernel):
        check_layer(3, B, 5, H, dtype, impl=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_lengths(kernel, dtype):
    with steps(kernel):
        check_layer(4, 5, 7, 33, dtype, impl=kernel, with_lengths=False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("upstream", [("c",), ("y", "c"), ("h_n",), ("c_n",), ("y", "h_n", "c_n", "c")])
def test_gradients_that_come_from_some_results_only(kernel, with_lengths, upstream):
    with steps(kernel):
        check_layer(3, 4, 5, 20, torch.float32, impl=kernel, with_lengths=with_lengths, upstream=upstream)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "options",
    [
        {"L": 3},
        {"N": 1},
        {"N": 1, "P": 3, "L": 2},
        {"P": 5},
        {"P": 5, "with_lengths": False, "bias": False},
        {"bias": False, "N": 1},
        {"batch_first": True},
        {"T": 1},
        {"T": 1, "with_lengths": False},
        {"B": 1},
        {"B": 35, "T": 2},  # three blocks of rows
        {"P": 5, "dtype": torch.bfloat16},
        {"P": 5, "dtype": torch.float16, "L": 2},
    ],
    ids=str,
)
def test_what_else_a_layer_can_be(kernel, options):
    options = {"T": 3, "B": 4, "dtype": torch.float32, "with_lengths": True, **options}
    T, B, dtype = (options.pop(name) for name in ("T", "B", "dtype"))
    with steps(kernel):
        check_layer(T, B, 6, 18, dtype, impl=kernel, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("B", "I", "H"), [(1, 1, 1), (3, 5, 7), (17, 16, 64), (2, 33, 65)])
def test_cell(B, I, H, bias, dtype):
    cell = LSTMCell(I, H, bias, dtype=dtype, impl="triton")
    inputs = [torch.randn(B, width).to(dtype).requires_grad_() for width in (I, H, H)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact_weights = [p.detach().double().requires_grad_() for p in cell.parameters()]
    h, c = cell(inputs[0], tuple(inputs[1:]))
    want = lstm_cell_reference(exact_inputs[0], tuple(exact_inputs[1:]), *exact_weights)
    g = [torch.randn_like(h), torch.randn_like(c)]
    grads = torch.autograd.grad([h, c], [*inputs, *cell.parameters()], g)
    exact_grads = torch.autograd.grad(want, [*exact_inputs, *exact_weights], [x.double() for x in g])
    for got, true in zip((h, c, *grads), (*want, *exact_grads), strict=True):
        assert got.dtype == dtype
        size = max(1.0, float(true.detach().abs().max()))
        assert largest_error(got, true) <= 6 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("given", [True, False], ids=["a state", "no state"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("impl", ["triton", "step"])
def test_a_single_step_without_gradients_is_one_launch(impl, batch_first, given, monkeypatch):
    model = LSTM(5, 20, batch_first=batch_first, impl=impl)
    x = torch.randn(3, 1, 5) if batch_first else torch.randn(1, 3, 5)
    hx = (torch.randn(1, 3, 20), torch.randn(1, 3, 20)) if given else None
    calls = []
    forward = lstm_step.cell_forward
    monkeypatch.setattr(lstm_step, "cell_forward", lambda *a, **o: calls.append(a) or forward(*a, **o))
    with torch.no_grad():
        y, (h_n, c_n) = model(x, hx)
    assert len(calls) == 1 and (calls[0][5] is None) == (not given)
    want, states = model(x, hx)  # with gradients: the op of a cell
    model.impl = "torch"
    theirs, their_states = model(x, hx)
    for mine, recorded, peer in zip((y, h_n, c_n), (want, *states), (theirs, *their_states), strict=True):
        assert mine.shape == peer.shape and torch.equal(mine, recorded)
        torch.testing.assert_close(mine, peer)
    assert y.data_ptr() != h_n.data_ptr() and torch.equal(y.flatten(), h_n.flatten())


def test_cell_with_one_gradient():
    cell = LSTMCell(3, 5, impl="triton")
    x, h, c = torch.randn(2, 3), torch.randn(2, 5), torch.randn(2, 5, requires_grad=True)
    for place in (0, 1):
        (got,) = torch.autograd.grad(cell(x, (h, c))[place].sum(), c)
        (want,) = torch.autograd.grad(lstm_cell_reference(x, (h, c), *cell.parameters())[place].sum(), c)
        torch.testing.assert_close(got, want)


def emulated_tf32(x):
    """Rounded to nearest, ties away from zero, with 10 bits of fraction; the gradient passes."""
    bits = x.detach().float().view(torch.int32)
    rounded = ((bits + 0x1000) & -0x2000).view(torch.float32).to(x.dtype)
    return x + (rounded - x.detach())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("H", [16, 48, 64])
def test_tf32_is_that_of_the_tensor_cores(kernel, H):
    """No further from float64 than a loop in float64 whose products round both operands to TF32."""
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    T, B, I = 4, 5, 3
    model = LSTM(I, H, impl=kernel)
    x, h, c = torch.randn(T, B, I), torch.randn(1, B, H), torch.randn(1, B, H)
    params = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    weight = params["weight_hh_l0"]
    z = x.double() @ params["weight_ih_l0"].T + params["bias_ih_l0"] + params["bias_hh_l0"]

    def loop(rounded):
        h_t, c_t, ys = h[0].double(), c[0].double(), []
        for t in range(T):
            h_t, c_t = cell_update(z[t] + rounded(h_t) @ rounded(weight).T, c_t)
            ys.append(h_t)
        return torch.stack(ys)

    exact, emulated = loop(lambda x: x), loop(emulated_tf32)
    g = torch.randn_like(exact)
    with steps(kernel):
        y, _ = model(x, (h, c))
        (got,) = torch.autograd.grad(y, model.weight_hh_l0, g.float())
    (want,), (rough,) = torch.autograd.grad(exact, weight, g), torch.autograd.grad(emulated, weight, g)
    assert 1e-6 < largest_error(y, exact) <= 1.5 * largest_error(emulated, exact)
    # Hardly any operand is rounded to another number, as all would be if they were cut instead.
    assert (y[:, 0].double() - emulated[:, 0]).abs().median() < 1e-6
    # The emulated gradient takes the rounded forward but exact products backward.
    assert largest_error(got, want) <= 2.5 * largest_error(rough, want)


@pytest.mark.parametrize("return_cells", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_sequences(enforce_sorted, return_cells):
    lengths = torch.tensor([5, 4, 4, 1] if enforce_sorted else [4, 1, 5, 4])
    model = LSTM(3, 17, 2, bidirectional=True, dropout=0.5)
    x = torch.randn(5, 4, 3)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    hx = torch.randn(4, 4, 17), torch.randn(4, 4, 17)
    found = []
    for impl in ("step", "torch"):
        model.impl = impl
        torch.manual_seed(0)  # dropout is drawn for the packed rows
        y, states, *cells = model(packed, hx, return_cells=return_cells)
        total = y.data.square().sum() + sum(state.sin().sum() for state in states)
        grads = torch.autograd.grad(total, list(model.parameters()))
        found.append([y.data, *states, *(c.data for c in cells), *grads])
        assert torch.equal(y.batch_sizes, packed.batch_sizes) and len(cells) == return_cells
    torch.testing.assert_close(*found)


def test_lengths_that_are_wrong_are_cut_to_what_is_possible():
    weights = list(LSTM(3, 16).parameters())
    x, state = torch.randn(4, 3, 3), torch.randn(1, 3, 16)

    def run(lengths):
        return ops.layer.forward_op(x, state, state, lengths, weights, False, "step", False, False)[:3]

    torch.testing.assert_close(
        run(torch.tensor([-5, 10**9, 2])), run(torch.tensor([0, 4, 2])), rtol=0, atol=0
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_is_never_looked_at(kernel):
    model = LSTM(3, 16, bidirectional=True, impl=kernel)
    x, lengths = torch.randn(4, 3, 3), torch.tensor([4, 0, 2])
    other = x.clone()
    other[torch.arange(4)[:, None] >= lengths] = torch.inf
    grads = []
    for values in (x, other):
        values.requires_grad_()
        with steps(kernel):
            y, (h_n, c_n) = model(values, lengths=lengths)
            grads.append(
                [y, h_n, c_n, *torch.autograd.grad(y.sum() + h_n.sum(), [values, *model.parameters()])]
            )
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
    (
        y,
        h_n,
        *_,
    ) = grads[0]
    assert not y[2:, 2].any() and not y[:, 1].any() and not grads[0][3][:, 1].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_bits_under_every_interleaving(kernel):
    model = LSTM(3, 64 if kernel == "persistent" else 20, bidirectional=True, impl=kernel)
    x, lengths = torch.randn(3, 17, 3, requires_grad=True), lengths_of(3, 17)
    runs = []
    for seed in (None, 1, 2, 3) if kernel == "persistent" else (None, 1):
        with cooperative(seed=seed):
            y, (h_n, c_n) = model(x, lengths=lengths)
            total = y.square().sum() + h_n.sum() + c_n.sum()
            runs.append([y, h_n, c_n, *torch.autograd.grad(total, [x, *model.parameters()])])
    for run in runs[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(run, runs[0], strict=True))


@triton.jit
def wait_for_all_but_one(counter_ptr, arrivals):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals - 1:
        pass


@triton.jit
def wait_for_one_more(counter_ptr, arrivals):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals + 1:
        pass


def persistent_layer(seed, **limits):
    model, x = LSTM(3, 64, impl="persistent"), torch.randn(6, 17, 3)
    with cooperative(seed=seed, **limits):
        y, _ = model(x)
        grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    model.impl = "torch"
    want, _ = model(x)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(grads, torch.autograd.grad(want.square().sum(), list(model.parameters())))


@pytest.mark.parametrize("seed", range(5))
def test_the_barrier_holds(seed):
    persistent_layer(seed)


def test_a_barrier_off_by_one_is_caught(monkeypatch):
    monkeypatch.setattr(lstm_persistent, "wait_for", wait_for_all_but_one)
    failures = 0
    for seed in range(5):
        try:
            persistent_layer(seed)
        except AssertionError:
            failures += 1
    assert failures > 0


def test_a_barrier_that_is_never_satisfied_is_reported(monkeypatch):
    monkeypatch.setattr(lstm_persistent, "wait_for", wait_for_one_more)
    with pytest.raises(InterpreterError) as error:
        persistent_layer(1, limit=100)
    assert isinstance(error.value.__cause__, Deadlock)


@pytest.mark.parametrize(("processors", "together"), [(8, 2), (4, 1)])
def test_a_batch_larger_than_what_runs_at_once_takes_several_launches(processors, together, monkeypatch):
    grids = []
    monkeypatch.setattr(launching, "processors", lambda device: processors)
    slices = launching.slices

    def noted(*args):
        for launch in slices(*args):
            grids.append(launch)
            yield launch

    monkeypatch.setattr(launching, "slices", noted)
    with cooperative(seed=1):
        check_layer(2, 35, 3, 64, torch.float32, impl="persistent")
    assert len(grids) > 2 and {directions for *_, directions in grids} == {together}


@pytest.mark.parametrize(
    ("units", "rows", "chunk", "resident", "H"),
    [(32, 32, 32, 64, 128), (64, 16, 128, 128, 256), (32, 16, 64, 128, 192), (64, 16, 16, 0, 64)],
)
def test_every_way_to_cut_the_work(units, rows, chunk, resident, H):
    """Also where a configuration's units do not divide H: backward four programs at a time have to."""
    blocks = {"BLOCK_H": units, "BLOCK_B": rows, "BLOCK_K": chunk, "AHEAD": 1, "RESIDENT": resident}
    tile = config.Config(blocks, num_warps=8, num_stages=1)
    kernels = ("lstm_persistent_fwd", "lstm_persistent_bwd")
    with launched_with(kernels[0], tile), launched_with(kernels[1], tile), cooperative(seed=1):
        check_layer(2, rows + 3, 3, H, torch.float32, impl="persistent")


def test_without_gradients_nothing_is_kept_for_them(monkeypatch):
    saves = []
    compute = ops.layer.compute
    monkeypatch.setattr(ops.layer, "compute", lambda *args: saves.append(args[-2:]) or compute(*args))
    model, x = LSTM(3, 5, impl="step"), torch.randn(2, 2, 3)
    model(x)
    with torch.no_grad():
        model(x)
        model(x, return_cells=True)
    assert saves == [(False, True), (False, False), (True, False)]  # with_cells, save


def test_the_second_derivative_is_the_references():
    model, x = (
        LSTM(3, 5, bidirectional=True, proj_size=2, impl="step"),
        torch.randn(3, 2, 3, requires_grad=True),
    )
    lengths = torch.tensor([3, 1])

    def penalty():
        y, (h_n, c_n), c = model(x, lengths=lengths, return_cells=True)
        total = y.square().sum() + h_n.sin().sum() + c_n.sin().sum() + c.square().sum()
        (slope,) = torch.autograd.grad(total, x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x, *model.parameters()])

    ours = penalty()
    model.impl = "torch"
    want = penalty()
    torch.testing.assert_close(ours, want)


def test_the_second_derivative_of_the_cell_is_the_references():
    cell, x = LSTMCell(3, 5, impl="triton"), torch.randn(2, 3, requires_grad=True)

    def penalty():
        (slope,) = torch.autograd.grad(cell(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x, *cell.parameters()])

    ours = penalty()
    cell.impl = "torch"
    torch.testing.assert_close(ours, penalty())


def test_dropout_between_layers():
    model, x = LSTM(3, 16, 2, dropout=0.5, impl="step"), torch.randn(2, 3, 3)
    torch.manual_seed(0)
    y, _ = model(x)
    torch.manual_seed(0)
    assert torch.equal(model(x)[0], y) and not torch.equal(model(x)[0], y)
    model.impl = "torch"
    torch.manual_seed(0)
    torch.testing.assert_close(model(x, return_cells=True)[0], y)
    model.eval()
    model.impl = "step"
    assert torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(given):
    model, x = LSTM(3, 16, impl="step"), torch.randn(2, 3, 3).to(given)
    cell = LSTMCell(3, 16, impl="triton")
    with torch.autocast("cpu", torch.bfloat16):
        y, (h_n, c_n), c = model(x, return_cells=True)
        h, _ = cell(x[0])
    assert {tensor.dtype for tensor in (y, h_n, c_n, c, h)} == {torch.bfloat16}
    y.float().sum().backward()
    assert model.weight_ih_l0.grad.dtype == torch.float32
    want, _ = model.bfloat16()(x.bfloat16())
    assert torch.equal(y, want)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_dtypes_that_autocast_does_not_unite_never_reach_a_kernel(autocast):
    x, h = torch.randn(2, 3, 3), torch.randn(1, 3, 16)
    made = {"impl": "step"}, {"impl": "triton"}
    wide = LSTM(3, 16, dtype=torch.float64, **made[0]), LSTMCell(3, 16, dtype=torch.float64, **made[1])
    narrow = LSTM(3, 16, **made[0]), LSTMCell(3, 16, **made[1])
    calls = [
        lambda: wide[0](x),
        lambda: wide[1](x[0]),
        lambda: narrow[0](x[:1], (h.double(), h)),
        lambda: narrow[1](x[0], (h[0].double(), h[0])),
    ]
    if not autocast:
        calls.append(lambda: narrow[1].half()(x[0]))
    for call in calls:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            pytest.raises(TypeError, match=r"^(x|hx\[0\]): expected dtype torch\.\w+ as \w+, got torch"),
        ):
            call()


def test_no_rows_are_left_to_torch():
    model = LSTM(3, 16, impl="step")
    y, (h_n, c_n) = model(torch.randn(2, 0, 3))
    assert y.shape == (2, 0, 16) and h_n.shape == c_n.shape == (1, 0, 16)
    for inputs, hidden in ((0, 2), (3, 0)):
        h, c = LSTMCell(inputs, hidden, impl="step")(torch.randn(4, inputs))
        assert h.shape == c.shape == (4, hidden)


def test_strided_inputs():
    model = LSTM(3, 16, bidirectional=True, impl="step")
    x, h, c = (
        torch.randn(3, 4, 3, 2)[..., 0],
        torch.randn(2, 16, 4).mT,
        torch.randn(1, 1, 16).expand(2, 4, 16),
    )
    y, states = model(x, (h, c))
    want, want_states = model(x.contiguous(), (h.contiguous(), c.contiguous()))
    assert torch.equal(y, want) and all(map(torch.equal, states, want_states))
    (grad,) = torch.autograd.grad(y.sum(), model.weight_hh_l0)
    (same,) = torch.autograd.grad(want, model.weight_hh_l0, torch.ones_like(want))
    assert torch.equal(grad, same)


def opcheck_inputs(name):
    T, B, I, H, P = 3, 2, 4, 18, 3
    params = [p.detach() for p in LSTM(I, H, bidirectional=True, proj_size=P).parameters()]
    x, h, c = torch.randn(T, B, I), torch.randn(2, P, B).mT, torch.randn(1, 1, H).expand(2, B, H)
    call = (x, h, c, None, params, True, "step", True)
    y, _, c_n, cells, gates, m = ops.layer.forward_op(*call, True)
    wanted = [True, False, True, *[True, False, True, True, True] * 2]
    some = [True, False, True, True, True, True, False]
    cell = [p.detach() for p in LSTMCell(I, H).parameters()]
    step = (x[0], torch.randn(H, B).T, c[0], cell)
    _, _, cell_gates = ops.cell.forward_op(*step, True)
    return {
        "lstm_layer": (*call, True),
        "lstm_layer_backward": (*call[:5], y, cells, gates, m, y, None, c_n, cells, True, "step", wanted),
        "lstm_cell": (*step, True),
        "lstm_cell_backward": (*step, cell_gates, step[1], None, some),
    }[name]


@pytest.mark.parametrize("name", ["lstm_layer", "lstm_layer_backward", "lstm_cell", "lstm_cell_backward"])
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.gatematch, name).default, opcheck_inputs(name))


def test_compiled():
    model, cell = LSTM(3, 16, 2, bidirectional=True, proj_size=4, impl="step"), LSTMCell(3, 16, impl="triton")
    x, lengths = torch.randn(3, 2, 3, requires_grad=True), torch.tensor([3, 1])

    def function(x, lengths):
        y, (h_n, c_n), c = model(x, lengths=lengths, return_cells=True)
        return y, h_n, c_n, c, *cell(x[0])

    got = torch.compile(function, backend="aot_eager", fullgraph=True)(x, lengths)
    want = function(x, lengths)
    g = [torch.randn_like(tensor) for tensor in want]
    torch.testing.assert_close(got, want)
    inputs = [x, *model.parameters(), *cell.parameters()]
    torch.testing.assert_close(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g))


@pytest.mark.parametrize(
    ("hidden", "dtype", "kernel"),
    [
        (16, torch.float32, "resident"),
        (64, torch.bfloat16, "resident"),
        (80, torch.bfloat16, "persistent"),
        (256, torch.float32, "persistent"),
        (10_000, torch.float16, "step"),
    ],
)
def test_the_rule(hidden, dtype, kernel):
    layer = layers.Layer(hidden, dtype, "float32", torch.device("cpu"))
    assert layers.select(layer, False) == kernel


@pytest.mark.parametrize(
    ("arch", "half", "tf32", "exact"),
    [("sm_80", 128, 64, 32), ("sm_86", 64, 64, 32), ("sm_90", 128, 64, 64), ("gfx942", 64, 32, 32)],
)
def test_the_largest_layers_that_resident_serves(arch, half, tf32, exact):
    def largest(dtype, precision):
        return max(H for H in range(16, 257, 16) if lstm_resident.serves(H, dtype, precision, arch))

    assert largest(torch.float16, "float32") == largest(torch.bfloat16, "float32") == half
    assert largest(torch.float32, "tf32") == tf32
    assert largest(torch.float32, "float32") == exact


def test_resident_serves_on_where_persistent_cannot(monkeypatch):
    monkeypatch.setattr(lstm_persistent, "serves", lambda *layer: False)
    layers.serves.cache_clear()
    kernels = {
        H: layers.select(layers.Layer(H, torch.bfloat16, "float32", torch.device("cpu")), False)
        for H in (64, 128, 144)
    }
    layers.serves.cache_clear()
    assert kernels == {64: "resident", 128: "resident", 144: "step"}


def test_a_kernel_that_cannot_be_launched_is_replaced_once(monkeypatch, caplog):
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        raise OutOfResources(300, 227, "shared memory")

    monkeypatch.setattr(layers, "_refused", set())
    monkeypatch.setattr(lstm_resident, "forward", failing)
    model, x = LSTM(3, 16, impl="triton"), torch.randn(2, 3, 3)
    y, _ = model(x)
    model(x)
    assert calls == [1] and "step takes it" in caplog.text
    model.impl = "torch"
    torch.testing.assert_close(y, model(x)[0])
    model.impl = "resident"
    with pytest.raises(OutOfResources):
        model(x)


def test_errors_that_are_not_about_the_launch_are_not_hidden(monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(lstm_resident, "forward", failing)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        LSTM(3, 16, impl="triton")(torch.randn(2, 3, 3))


def test_a_named_kernel_that_cannot_serve_says_so():
    with pytest.raises(
        ValueError,
        match=r"got 'resident'; it cannot serve hidden_size 304 in torch\.float32",
    ):
        LSTM(3, 300, impl="resident")(torch.randn(2, 3, 3))
    x = torch.randn(2, 3, 3)
    with pytest.raises(
        ValueError,
        match=r"got 'triton'; it cannot serve this call: .* no forward-mode deriv",
    ):
        torch.func.jvp(LSTM(3, 16, impl="triton"), (x,), (x,))
    with pytest.raises(
        ValueError,
        match="got 'resident'; it cannot serve this call: the kernels for it are step",
    ):
        LSTMCell(3, 16, impl="resident")(torch.randn(2, 3))
    with pytest.raises(
        ValueError,
        match="got 'step'; it cannot serve this call: the kernels take float32",
    ):
        LSTM(3, 16, dtype=torch.float64, impl="step")(torch.randn(2, 3, 3, dtype=torch.float64))


def test_nan_stays_in_its_row():
    model = LSTM(3, 64, impl="persistent")
    x = torch.randn(3, 17, 3)
    x[1, 4] = torch.nan
    with cooperative(seed=1):
        y, (h_n, c_n) = model(x)
    rows = torch.arange(17) != 4
    assert not y[:, rows].isnan().any() and not c_n[:, rows].isnan().any()
    assert y[1:, 4].isnan().all() and not y[0, 4].isnan().any() and h_n[0, 4].isnan().all()


def test_the_state_of_a_row_without_steps_is_never_looked_at():
    model, x = LSTM(3, 16, bidirectional=True, proj_size=4, impl="step"), torch.randn(4, 3, 3)
    h, c, lengths = torch.randn(2, 3, 4), torch.randn(2, 3, 16), torch.tensor([4, 0, 2])
    grads = []
    for value in (0.0, torch.nan):
        h[:, 1] = c[:, 1] = value
        y, (h_n, c_n) = model(x, (h, c), lengths)
        grads.append(torch.autograd.grad(y.sum() + h_n[:, ::2].sum(), list(model.parameters())))
        assert torch.equal(h_n[:, 1], h[:, 1]) or (h_n[:, 1].isnan().all() and c_n[:, 1].isnan().all())
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int64, torch.uint16, torch.uint32, torch.uint64]
)
def test_lengths_of_any_integer_type(dtype):
    model, x, lengths = LSTM(3, 16, impl="step"), torch.randn(4, 3, 3), torch.tensor([4, 0, 2])
    assert torch.equal(model(x, lengths=lengths.to(dtype))[0], model(x, lengths=lengths.int())[0])


def test_cell_states_are_the_callers_own():
    model, x = LSTM(3, 16, impl="step"), torch.randn(4, 3, 3)
    y, _, c = model(x, return_cells=True)
    c.detach().zero_()
    y.sum().backward()


def test_tied_weights_under_a_compiler():
    model, x = LSTM(16, 16, impl="step"), torch.randn(3, 2, 16)
    model.weight_ih_l0 = model.weight_hh_l0
    cell, h = LSTMCell(16, 16, impl="triton"), torch.randn(2, 16)
    inputs = [*model.parameters(), *cell.parameters()]

    def total():
        return model(x)[0].square().sum() + sum(state.square().sum() for state in cell(h, (h, h)))

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(), inputs), torch.autograd.grad(total(), inputs))


def test_one_compilation_serves_all_lengths():
    model, cell = LSTM(3, 16, impl="step"), LSTMCell(3, 16, impl="triton")
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def function(x, lengths):
        return model(x, lengths=lengths)[0].sum() + cell(x[0])[0].sum()

    for T, B in ((5, 2), (6, 4), (7, 8), (11, 9)):
        function(torch.randn(T, B, 3), torch.randint(0, T + 1, (B,))).backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("module", [LSTM, LSTMCell])
def test_transforms_in_what_is_compiled_never_reach_the_kernels(module, trainable):
    """There they may give zeros: what asks for the kernels raises, or leaves the graph and is right."""
    model = module(3, 16, impl="triton").requires_grad_(trainable)
    x = torch.randn(2, 4, 3) if module is LSTM else torch.randn(4, 3)

    def output(x):
        return model(x)[0].square().sum()

    transforms = {
        "grad": lambda x: torch.func.grad(output)(x),
        "jvp": lambda x: torch.func.jvp(output, (x,), (torch.ones_like(x),))[1],
        "vmap": lambda x: torch.func.vmap(output)(x[None]),
    }
    for name, transform in transforms.items():
        with pytest.raises(Exception, match=r"know nothing of torch\.func"):
            torch.compile(transform, backend="aot_eager", fullgraph=True)(x)
        torch._dynamo.reset()
        broken = torch.compile(transform, backend="aot_eager")
        if name == "jvp":
            with pytest.raises(ValueError, match="have no forward-mode derivative"):
                broken(x)
        else:
            torch.testing.assert_close(broken(x), transform(x))
        torch._dynamo.reset()


def test_second_derivatives_are_exact_under_autocast():
    model, x = LSTM(3, 16, impl="step"), torch.randn(3, 2, 3, requires_grad=True)

    def slope():
        return torch.autograd.grad(model(x)[0].square().sum(), x, create_graph=True)[0]

    want = slope()
    y = model(x)[0].square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(y, x, create_graph=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("dtype", "resident"),
    [
        (torch.float32, 0),
        (torch.float32, 64),
        (torch.float32, 128),
        (torch.float16, 64),
        (torch.bfloat16, 128),
    ],
)
def test_weights_that_do_not_fit_are_read_again(dtype, resident, monkeypatch):
    """Some columns of W stay, chunk by chunk, one of them ahead of the product; the others are streamed."""
    choose = config.choose

    def small(kernel, *args):
        tile = choose(kernel, *args)
        columns = 4 * resident if kernel.endswith("bwd") else resident
        if dtype == torch.float32:
            columns *= 2  # it is halved for two parts
        blocks = {**tile.blocks, "BLOCK_K": 64, "AHEAD": 1, "RESIDENT": columns}
        return dataclasses.replace(tile, blocks=blocks)

    monkeypatch.setattr(config, "choose", small)
    with cooperative(seed=random.randrange(1000)):
        check_layer(2, 5, 4, 175, dtype, impl="persistent")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lengths", [[0] * 17, [3] * 16 + [0], [0] * 16 + [3]])
def test_blocks_of_rows_without_a_step(kernel, lengths):
    model, lengths = LSTM(3, 16, bidirectional=True, impl=kernel), torch.tensor(lengths)
    h, c = (torch.randn(2, 17, 16, requires_grad=True) for _ in range(2))
    with steps(kernel):
        y, (h_n, c_n) = model(torch.randn(3, 17, 3), (h, c), lengths)
        grads = torch.autograd.grad([h_n, c_n, y], [h, c], [torch.ones_like(x) for x in (h_n, c_n, y)])
    idle = lengths == 0
    assert torch.equal(h_n[:, idle], h[:, idle]) and torch.equal(c_n[:, idle], c[:, idle])
    assert not y[:, idle].any() and all((grad[:, idle] == 1).all() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_is_not_cut_into_parts(dtype, monkeypatch):
    choose = config.choose

    def whole(kernel, *args):
        tile = choose(kernel, *args)
        parts = {"PARTS": 1, "BLOCK_K": 64} if kernel == "lstm_step_bwd" else {}
        return dataclasses.replace(tile, blocks={**tile.blocks, **parts})

    monkeypatch.setattr(config, "choose", whole)
    check_layer(3, 5, 4, 33, dtype, impl="step")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("H", [16, 64])
def test_tf32_rounds_both_operands_backward(kernel, H):
    gates, c, weight = torch.rand(1, 1, 5, 4 * H), torch.randn(1, 1, 5, H), torch.randn(4 * H, H)
    state, g = torch.randn(1, 5, H), torch.randn(1, 5, H)
    with steps(kernel):
        backward = layers._module(kernel).backward
        dz, dh_0, _ = backward(gates, c, [weight], state, None, None, g, g, None, precision="tf32")
    want = emulated_tf32(dz[0, 0]).double() @ emulated_tf32(weight).double()
    cut = dz[0, 0].double() @ weight.double()
    assert largest_error(dh_0[0], want) < 1e-5 * want.abs().max() < largest_error(cut, want)
