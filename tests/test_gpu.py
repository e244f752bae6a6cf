"""The CPU's contract on a CUDA device, and that of the kernels: the same numbers, right against float64."""

import threading
from collections import deque
from itertools import product

import pytest
import torch
import transform_ops
import transforms
import triton
import triton.language as tl
from lstm_contract import check_layer, largest_error, product_error
from lstm_contract import lengths_of as lstm_lengths
from pairwise_contract import (
    DTYPES,
    RELATIVE,
    check_attend,
    check_attention,
    check_sums,
    lengths_of,
    rows_at_distances,
)
from waiting import join, wait

from gatematch.attention import pairwise_attend, pairwise_attention, pairwise_sums
from gatematch.attention import reference as exact
from gatematch.kernels import pairwise
from gatematch.kernels.pairwise_prepare import tile_product
from gatematch.lstm import LSTM, LSTMCell
from gatematch.lstm import layer as layers
from gatematch.lstm.reference import lstm_cell_reference

pytestmark = pytest.mark.gpu
LSTM_KERNELS = ("resident", "persistent", "step")


@pytest.fixture
def rnn_precision():
    """Sets the precision of float32 products in recurrent layers, for one test."""
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision

    def choose(precision):
        rnn.fp32_precision = precision

    yield choose
    rnn.fp32_precision = before


def skip_unless_served(kernel, H, dtype, precision="float32"):
    layer = layers.Layer(H + -H % 16, dtype, precision, torch.device("cuda", torch.cuda.current_device()))
    if not layers.serves(kernel, layer, False):
        pytest.skip(f"{kernel} does not serve H = {H} in {dtype}")


# Compiling takes most of the time: one D without lengths.
@pytest.mark.parametrize(
    ("D", "with_lengths"), [*((D, True) for D in (1, 7, 50, 300, 768, 4096)), (50, False)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_exact_at_every_distance(dtype, D, with_lengths):
    q, a = rows_at_distances(D, dtype, device="cuda")
    v = torch.randn(2, a.shape[1], 65, device="cuda").to(dtype)
    lengths = (None, None)
    if with_lengths:
        lengths = lengths_of(q, a)
        lengths_of(v)
    check_attention(q, a, lengths)
    check_sums(q, a, lengths)
    for normalize in (None, "rows"):
        check_attend(q, a, v, lengths, normalize)


@pytest.mark.parametrize("offset", [10.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_common_offset_changes_nothing(dtype, offset):
    check_attention(*rows_at_distances(50, dtype, offset, "cuda"))


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("D", [50, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prepared_rows_are_exact_at_every_distance(dtype, D, offset, monkeypatch):
    monkeypatch.setattr(pairwise, "PREPARED", 1)
    q, a = rows_at_distances(D, dtype, offset, "cuda")
    check_attention(q, a, lengths_of(q, a))


@pytest.mark.parametrize("dtype", DTYPES)
def test_text_of_many_tiles(dtype):
    words = torch.randn(2000, 300, device="cuda").to(dtype)
    q, a = (words[torch.randint(2000, (1, L), device="cuda")] for L in (300, 2257))
    check_attention(q, a)
    check_attend(q, a, torch.randn(1, 2257, 300, device="cuda").to(dtype), normalize="rows")
    # Few sequences: the reference holds all differences in float64.
    q, a = (words[torch.randint(2000, (8, L), device="cuda")] for L in (300, 257))
    check_sums(q, a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_many_rows_on_a_common_offset(dtype):
    q, a = (torch.randn(1, L, 50, device="cuda") + 100 for L in (100, 4096))
    check_attention(q.to(dtype), a.to(dtype))


def test_lengths_that_are_wrong_are_cut_to_what_is_possible():
    q, a = torch.randn(2, 9, 20, device="cuda"), torch.randn(2, 7, 20, device="cuda")
    S = pairwise_attention(q, a, torch.tensor([-3, 10**9], device="cuda"))
    assert not S[0].any() and torch.equal(S[1], pairwise_attention(q, a)[1])


@pytest.mark.parametrize("sides", [(torch.int64, None), (None, torch.int32), (torch.int32, torch.int64)])
def test_lengths_of_one_side_and_of_two_dtypes(sides):
    q, a = rows_at_distances(20, torch.float32, device="cuda")
    q, a = q.repeat(1, 5, 1), a.repeat(1, 4, 1)
    lengths = [None if of is None else torch.tensor([3, x.shape[1] - 1], device="cuda", dtype=of)
               for of, x in zip(sides, (q, a), strict=True)]  # fmt: skip
    check_attention(q, a, lengths)


def test_kernels_give_the_same_bits_in_every_run():
    words = torch.randn(500, 128, device="cuda")
    inputs = [words[torch.randint(500, (2, 2000), device="cuda")].requires_grad_() for _ in range(3)]
    runs = []
    for _ in range(3):
        S, O = pairwise_attention(*inputs[:2]), pairwise_attend(*inputs)
        sums = pairwise_sums(*inputs[:2])
        total = S.square().sum() + O.square().sum() + sum(x.square().sum() for x in sums)
        runs.append([S, O, *sums, *torch.autograd.grad(total, inputs)])
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], run, strict=True))


@triton.jit
def tile_products(x_ptr, y_ptr, out_ptr, features, PREC: tl.constexpr, BLOCK_N: tl.constexpr):
    j0 = tl.program_id(0) * BLOCK_N
    product, _ = tile_product((), x_ptr, y_ptr + j0 * features, features, PREC, 0, 128, BLOCK_N, 64)
    at = tl.arange(0, 128)[:, None] * 128 + j0 + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_ptr + at, product)


def check_widths(dtype, device):
    x, y = (torch.randn(128, 320, device=device).to(dtype) for _ in "xy")
    out = torch.empty(3, 128, 128, device=device)
    for of_width, width in zip(out, (16, 32, 64), strict=True):
        tile_products[(128 // width,)](x, y, of_width, 320, PREC="tf32", BLOCK_N=width, num_warps=8)
    torch.testing.assert_close(out[0], x.float() @ y.float().mT, rtol=1e-2, atol=0.1)
    assert torch.equal(out[0], out[1]) and torch.equal(out[1], out[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_width_of_a_tile_changes_no_bit_of_its_products(dtype):
    """Both walks of the streamed kernels decide which pairs are near, from tiles of other widths."""
    for _ in range(50):
        check_widths(dtype, "cuda")


def test_more_scores_than_32_bits_count():
    q = torch.randn(1, 50_000, 16, device="cuda", dtype=torch.bfloat16)
    a = q[:, :45_000]
    S = pairwise_attention(q, a)
    assert S.numel() > 2**31
    rows = torch.tensor([0, 1, 49_999], device="cuda")
    want = exact.pairwise_attention_reference(q[:, rows].double(), a.double())
    assert ((S[:, rows].double() - want).abs() <= 2.0**-8 * want + 1e-5).all()


def test_streaming_memory_does_not_grow_with_the_pairs():
    L = 16384
    q, a, v = (torch.randn(1, L, 128, device="cuda", requires_grad=True) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pairwise_attend(q, a, v, "rows").sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 0.1 * 4 * L * L


@pytest.mark.parametrize("D", [1, 7, 50, 300])
def test_torch_path_is_exact(D):
    words = torch.randn(20, D, device="cuda")
    q, a = words[torch.randint(0, 20, (3, 65))], words[torch.randint(0, 20, (3, 63))]
    q = (q + 1e-3 * torch.randn_like(q) * torch.randint(0, 2, (3, 65, 1), device="cuda")).requires_grad_()
    q_lengths = torch.tensor([65, 1, 30], device="cuda")
    want = exact.pairwise_attention_reference(q.double(), a.double(), q_lengths)
    S = pairwise_attention(q, a, q_lengths, impl="torch")
    assert (S.double() - want).abs().max() < 1e-6
    g = torch.randn_like(S)
    (grad,), (true,) = torch.autograd.grad(S, q, g), torch.autograd.grad(want, q, g.double())
    torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-4)


# Compiling takes most of the time: every size once, and every batch at one size.
SIZES = [(H, 17, True) for H in (1, 3, 16, 64, 65, 128, 300, 512, 1024, 2048)]
SIZES += [(64, B, with_lengths) for B in (1, 3, 64, 300) for with_lengths in (False, True)]
SIZES += [(300, 300, False)]


@pytest.mark.parametrize(("H", "B", "with_lengths"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", LSTM_KERNELS)
def test_lstm_kernels_follow_float64(kernel, dtype, H, B, with_lengths, rnn_precision):
    rnn_precision("ieee")
    skip_unless_served(kernel, H, dtype)
    check_layer(20, B, 33, H, dtype, impl=kernel, with_lengths=with_lengths, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype):
    from numerics_contract import check_activations  # which needs Triton

    check_activations(dtype, "cuda")


@pytest.mark.parametrize("kernel", LSTM_KERNELS)
@pytest.mark.parametrize("H", [16, 64, 128, 256, 512, 1024])
def test_lstm_in_tf32_is_as_exact_as_cudnn(kernel, H, rnn_precision):
    rnn_precision("tf32")
    skip_unless_served(kernel, H, torch.float32, "tf32")
    model, x = LSTM(64, H, impl=kernel).cuda(), torch.randn(50, 16, 64, device="cuda")
    y, _ = model(x)
    model.impl = "torch"
    theirs, _ = model(x)
    exact, _ = model.double()(x.double())
    # cuDNN may multiply in float32. In TF32 operands are rounded by 2**-12 on average, weights up to 1 / √H.
    assert largest_error(y, exact) <= max(2 * largest_error(theirs, exact), 2.0**-7 / H**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "I", "H"), [(1, 1, 1), (17, 33, 65), (64, 512, 1024)])
def test_lstm_cell(B, I, H, dtype, rnn_precision):
    rnn_precision("ieee")
    cell = LSTMCell(I, H, dtype=dtype, device="cuda", impl="triton")
    x, h, c = (torch.randn(B, width, device="cuda").to(dtype).requires_grad_() for width in (I, H, H))
    got = cell(x, (h, c))
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, h, c, *cell.parameters())]
    want = lstm_cell_reference(exact[0], (exact[1], exact[2]), *exact[3:])
    g = [torch.randn_like(tensor) for tensor in got]
    grads = torch.autograd.grad(got, [x, h, c, *cell.parameters()], g)
    exact_grads = torch.autograd.grad(want, exact, [tensor.double() for tensor in g])
    # In float32 dx and dh are library products of 4·H terms.
    product = product_error(B, 4 * H, I, "cuda") if dtype == torch.float32 and H > 1 else 0.0
    for ours, true in zip((*got, *grads), (*want, *exact_grads), strict=True):
        size = max(1.0, float(true.detach().abs().max()))
        assert largest_error(ours, true) <= max(8 * torch.finfo(dtype).eps, 2 * product) * size


def train(model, x, **options):
    """What a layer returns, and the gradients of its inputs: queued on the current stream, not waited for."""
    y, (h_n, c_n) = model(x, **options)
    total = y.float().square().sum() + h_n.float().sum() + c_n.float().sum()
    grads = torch.autograd.grad(total, [x, *model.parameters()])
    return [y.detach(), h_n.detach(), c_n.detach(), *grads]


@pytest.mark.parametrize("kernel", LSTM_KERNELS)
def test_lstm_gives_the_same_bits_in_every_run(kernel):
    skip_unless_served(kernel, 128, torch.bfloat16)
    model = LSTM(64, 128, bidirectional=True, dtype=torch.bfloat16, impl=kernel).cuda()
    x = torch.randn(40, 50, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    lengths = lstm_lengths(40, 50, "cuda")
    first = None
    for _ in range(1000):
        run = train(model, x, lengths=lengths)
        first = first or run
        assert all(torch.equal(ours, same) for ours, same in zip(run, first, strict=True))


def difference(got, want):
    """The largest of all results, as a share of the result's largest value: a tensor, not waited for either.

    A library may add up in another order beside other work; what a barrier lets pass is off by far more.
    """
    shares = [(x - y).abs().max() / y.abs().max() for x, y in zip(got, want, strict=True)]
    return torch.stack(shares).float().max()


def persistent_layer(T, B, H, inputs=1):
    """A layer, inputs, and what it makes of each of them while the GPU does nothing else."""
    skip_unless_served("persistent", H, torch.float32)
    model = LSTM(64, H, impl="persistent").cuda()
    xs = [torch.randn(T, B, 64, device="cuda", requires_grad=True) for _ in range(inputs)]
    want = [train(model, x) for x in xs]
    wait("a layer by itself", torch.cuda.current_stream().record_event())
    return model, xs, want


def large_products(stream):
    """A function that keeps the stream busy with products that take every multiprocessor, if called often."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(x)
    stream.wait_stream(torch.cuda.current_stream())
    queued = deque()

    def more():
        while queued and queued[0].query():
            queued.popleft()
        with torch.cuda.stream(stream):
            while len(queued) < 16:
                torch.mm(x, x, out=out)
                queued.append(stream.record_event())

    return more


@pytest.mark.parametrize("H", [256, 1024, 2048])
def test_lstm_beside_large_products_on_another_stream(H, rnn_precision):
    rnn_precision("ieee")
    model, (x,), (want,) = persistent_layer(100, 16, H)
    stream = torch.cuda.Stream()
    keep_busy = large_products(stream)
    found = []
    for _ in range(10):
        keep_busy()
        found.append(difference(train(model, x), want))
    wait("a layer beside large products", torch.cuda.current_stream().record_event(), meanwhile=keep_busy)
    wait("large products", stream.record_event())
    assert all(share <= RELATIVE[torch.float32] for share in found), found


# Both take 64 of 132 multiprocessors, nearly all of them, more than there are.
@pytest.mark.parametrize(("T", "B", "H"), [(1000, 32, 256), (500, 16, 1024), (300, 16, 2048)])
def test_lstms_on_two_streams_at_once(T, B, H, rnn_precision):
    rnn_precision("ieee")
    model, xs, want = persistent_layer(T, B, H, inputs=2)
    streams = [torch.cuda.Stream() for _ in xs]
    found = []
    for turn in range(11):
        for x, alone, stream in zip(xs, want, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(difference(train(model, x), alone))
            if turn == 0:  # its memory is there now: nothing that follows waits for the device
                wait("a layer on another stream", stream.record_event())
    wait("a layer beside another", *(stream.record_event() for stream in streams))
    assert all(share <= RELATIVE[torch.float32] for share in found), found


def test_lstms_in_two_threads_at_once(rnn_precision):
    rnn_precision("ieee")
    model, xs, want = persistent_layer(500, 16, 1024, inputs=2)
    found, ended = [], []

    def work(x, alone):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found.extend([difference(train(model, x), alone) for _ in range(10)])
        ended.append(stream.record_event())

    threads = [
        threading.Thread(target=work, args=inputs, daemon=True) for inputs in zip(xs, want, strict=True)
    ]
    for thread in threads:
        thread.start()
    join("a thread that queues layers", threads)
    assert len(ended) == 2  # none has raised
    wait("a layer beside another thread's", *ended)
    assert all(share <= RELATIVE[torch.float32] for share in found), found


@pytest.mark.parametrize("kernel", LSTM_KERNELS)
def test_lstm_can_be_captured_in_a_graph(kernel):
    H = 64 if kernel == "resident" else 256
    skip_unless_served(kernel, H, torch.float16)
    model = LSTM(64, H, dtype=torch.float16, impl=kernel).cuda()
    x = torch.randn(30, 16, 64, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        want = model(x)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)[0]
        for _ in range(3):
            x.normal_()
            graph.replay()
            want = model(x)[0]
            assert torch.equal(y, want)


@pytest.mark.parametrize("kernel", LSTM_KERNELS)
def test_lstm_and_its_gradients_can_be_captured_in_a_graph(kernel):
    H = 64 if kernel == "resident" else 256
    skip_unless_served(kernel, H, torch.float16)
    model = LSTM(64, H, dtype=torch.float16, impl=kernel).cuda()
    x = torch.randn(30, 16, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    here, warm = torch.cuda.current_stream(), torch.cuda.Stream()
    warm.wait_stream(here)
    with torch.cuda.stream(warm):
        for _ in range(3):
            train(model, x)
    wait("a layer before the capture", warm.record_event())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = train(model, x)
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
        graph.replay()
        wait("a replay", here.record_event())
        assert difference(got, train(model, x)) <= RELATIVE[torch.float16]


def test_lstm_does_not_wait_for_the_device(rnn_precision):
    model = LSTM(64, 256, 2, bidirectional=True, proj_size=32, impl="triton").cuda()
    x, lengths = torch.randn(30, 16, 64, device="cuda"), lstm_lengths(30, 16, "cuda")
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.arange(30, 14, -1))

    def calls():
        y, _, c = model(x, lengths=lengths, return_cells=True)
        (y.sum() + c.sum() + model(packed)[0].data.sum()).backward()

    calls()  # what is to be compiled is
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"L": 3}, {"P": 40}, {"P": 40, "with_lengths": False, "L": 2}], ids=str)
def test_what_else_an_lstm_can_be(options, dtype, rnn_precision):
    rnn_precision("ieee")
    check_layer(20, 17, 33, 300, dtype, impl="triton", device="cuda", **options)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lstm_with_lengths_follows_float64(bidirectional):
    model = LSTM(65, 63, 2, bidirectional=bidirectional).cuda()
    x = torch.randn(20, 5, 65, device="cuda")
    lengths = torch.tensor([20, 1, 7, 0, 13], device="cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y, (h_n, c_n), c = model(x, lengths=lengths, return_cells=True)
        fused = model(x, lengths=lengths)[0]
    want, states, cells = model.double()(x.double(), lengths=lengths, return_cells=True)
    for got, true in ((y, want), (fused, want), (h_n, states[0]), (c_n, states[1]), (c, cells)):
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "heading"), list(product(transform_ops.ops("triton"), transforms.TABLES["kernels"]))
)
def test_transforms_are_those_of_the_table(op, heading, rnn_precision):
    rnn_precision("ieee")
    with torch.device("cuda"):
        found = transforms.judge(
            transform_ops.ops("triton")[op], heading, transforms.TABLES["kernels"][heading]
        )
    assert found == transforms.committed("kernels")[op, heading]


@pytest.mark.parametrize("variant", ["barrier", "exchange"])
def test_a_barrier_is_timed(variant):
    pytest.importorskip("rich")
    from gatematch.bench import barrier

    device = torch.device("cuda", torch.cuda.current_device())
    for programs in (1, 32, torch.cuda.get_device_properties(device).multi_processor_count):
        setting = barrier.Setting(variant, programs, 4)
        launch, found = barrier.prepared(setting, 100, device)
        launch()
        wait(setting.case, torch.cuda.current_stream().record_event())
        assert torch.equal(found.cpu(), barrier.expected(setting, 100))
        row = barrier.time_setting(setting, 100, 5, device)
        assert row["samples"] == 5 and row["case"] == setting.case


@pytest.mark.parametrize("D", [9, 768])
def test_what_an_expansion_leaves_explains_what_is_seen(D):
    pytest.importorskip("rich")
    from gatematch.bench import expansion

    for path in expansion.paths():
        row = expansion.measure(path, D, 16, torch.device("cuda", torch.cuda.current_device()))
        assert 0 < row["c"] < float("inf") and row["far"] > row["near"] > 0
        rounding = 0.0 if path.dtype == torch.float32 else path.bound - expansion.BOUND
        # The root and two quotients are rounded too.
        assert row["error"] <= row["left"] + rounding + 5e-7
