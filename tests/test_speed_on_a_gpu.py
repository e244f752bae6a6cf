"""What `speed` does on a GPU, with a made-up device: the cases, the ways of timing, floors and classes."""

import contextlib
import multiprocessing
import os
import re
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
from gatematch.bench import (
    cases,
    check,
    floors,
    lstm_problems,
    pairwise_problems,
    speed,
    speed_report,
    timing,
)
from gatematch.bench.problems import Case, Part, Problem, Work
from gatematch.kernels import config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
RATES = {
    "bytes": 4.8e12,
    "bfloat16_flops": 989e12,
    "float16_flops": 989e12,
    "tf32_flops": 494.5e12,
    "float32_flops": 67e12,
    "specials": 3.9e12,
}


def small(case):
    """The same kind of case in sizes for a CPU."""
    shape = {letter: min(size, 12) for letter, size in case.shape.items()}
    return Case(case.name, shape, case.data, case.dtype, case.options, case.precision, case.timings)


# What is written in exact arithmetic by torch, of which one is a peer in every row.
RIGHT = ("cdist, exact mode", "torch.nn.LSTM", "torch's pieces")
KINDS = {
    (case.name, case.data, case.numbers): small(case)
    for case in cases.GPU_CASES
    if case.dtype != torch.float16 and "cell" not in case.options
}


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_every_kind_of_case_can_be_built_and_is_right(kind, request):
    case = KINDS[kind]
    if case.name.startswith("lstm/") and case.dtype == torch.bfloat16:
        request.getfixturevalue("bfloat16_lstm")
    for row in speed.run_speed([case], CPU, seconds=0.0, compiled=False):
        assert row["ours"]["status"] == "timed", row
        assert row["ours"]["median"] > 0
        assert row["dtype"] == case.numbers
        known = {"wrong", "timed", "skipped: left out", "skipped: its differences would take over 512 MiB"}
        assert {peer["status"] for peer in row["peers"].values()} <= known
        assert next(row["peers"][name] for name in RIGHT if name in row["peers"])["status"] == "timed"


def test_what_most_depends_on_comes_first():
    labels = [f"{case.label} {case.shape} {case.options}" for case in cases.GPU_CASES]
    assert len(labels) == len(set(labels))
    order = ["bfloat16", "tf32", "float32", "float16"]
    formats = [case.numbers for case in cases.GPU_CASES]
    assert set(formats) == set(order) and formats == sorted(formats, key=order.index)
    assert cases.cases_of(GPU) is cases.GPU_CASES and cases.cases_of(CPU) is cases.CASES
    assert {way for case in cases.GPU_CASES for way in case.timings} == {"warm", "cold", "graph"}


def test_the_part_that_is_compared_has_the_ends():
    for B, Q, most in ((3, 7, 1000), (3, 7, 8), (1, 9, 4), (5, 1, 2), (2, 10**6, 16)):
        part = Part.of(B, Q, most, CPU)
        for size, chosen in ((B, part.batches), (Q, part.rows)):
            assert chosen[0] == 0 and (chosen[-1] == size - 1 or len(chosen) == 1)
            assert len(chosen.unique()) == len(chosen)
        assert len(part.batches) * len(part.rows) <= max(most, 2)
    part = Part.of(3, 5, 4, CPU)
    x = torch.randn(3, 5, 2)
    assert torch.equal(part(x), x[[0, 2]][:, [0, 4]])
    alone = part.alone(x)
    assert torch.equal(part(alone), part(x)) and not alone[1].any() and not alone[:, 1:4].any()


def test_a_backward_that_counts_in_32_bits_is_not_called():
    large = SimpleNamespace(is_cuda=True, requires_grad=True, shape=(64, 512, 300))
    with pytest.raises(RuntimeError, match="counts differences in 32 bits"):
        pairwise_problems.cdist_exact(large, large)


def test_a_part_gives_the_gradients_of_all_that_it_depends_on():
    case = Case("pairwise/attend", {"B": 3, "Q": 9, "A": 5, "D": 4, "V": 2}, options={"op": "attend"})
    problem = pairwise_problems.pairwise_problem(case, CPU, False)
    problem.part = Part.of(3, 9, 4, CPU)
    assert len(problem.part.rows) == 2
    q, a, v = problem.ours_wrt
    problem.exact_wrt = [
        x.detach().double().requires_grad_() for x in (problem.part(q), a[[0, 2]], v[[0, 2]])
    ]
    problem.wrt_parts = (problem.part, *[lambda x: x[[0, 2]]] * 2)
    upstream = torch.randn(3, 9, 2)
    exact = pairwise_problems.of_scores("attend", None, pairwise_problems.cdist_exact)
    want = speed.run(
        lambda: exact(*problem.exact_wrt),
        problem.exact_wrt,
        problem.part(upstream).double(),
        "forward+backward",
    )
    for given, right in ((problem.part.alone(upstream), True), (upstream, False)):
        got = speed.run(problem.ours, problem.ours_wrt, given, "forward+backward")
        error, gradient_error = speed.errors(problem, got, want)
        assert error < 1e-5 and (gradient_error < 1e-5) == right


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same():
    q, a, v = (torch.randn(2, n, 16) for n in (8, 16, 16))
    ours = pairwise_problems.pairwise_attend(q, a, v, "rows")
    torch.testing.assert_close(pairwise_problems.flex(q, a, v), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"lengths": True}, {"num_layers": 2, "bidirectional": True}])
def test_rows_of_an_lstm_are_compared_alone(options, monkeypatch):
    case = Case("lstm/made", {"T": 8, "B": 9, "I": 4, "H": 4}, options=options)
    whole = cases.build(case, CPU, False)
    assert whole.part is None
    monkeypatch.setattr(lstm_problems, "_CHECKED", 8 * 8 * 4 * 8 * (4 if "num_layers" in options else 1) * 3)
    torch.manual_seed(0)
    problem = cases.build(case, CPU, False)
    assert problem.part.rows.tolist() == [0, 4, 8] and problem.exact().shape[:2] == (8, 3)
    (forward,), (both,) = (
        speed.time_problem(case, problem, mode, CPU, 0.0) for mode in ("forward", "forward+backward")
    )
    assert forward["ours"]["error"] < 1e-5 and both["ours"]["gradient_error"] < 1e-5
    upstream = torch.randn_like(problem.ours())
    want = speed.run(problem.exact, problem.exact_wrt, problem.part(upstream).double(), "forward+backward")
    # The gradients of the weights are those of the other rows, too, unless these are left out.
    got = speed.run(problem.ours, problem.ours_wrt, upstream, "forward+backward")
    assert speed.errors(problem, got, want)[1] > 1e-2


# Compiling ahead


@pytest.fixture
def ahead():
    pytest.importorskip("triton")
    from gatematch.bench import ahead

    return ahead


def test_every_case_is_compiled_ahead_once():
    def kind(case):
        return str(
            (case.name, case.numbers, {**case.shape, "T": min(case.shape.get("T", 1), 16)}, case.options)
        )

    distinct = speed.in_turns(cases.GPU_CASES)
    kinds = [kind(case) for case in distinct]
    assert len(set(kinds)) == len(kinds) and set(kinds) == set(map(kind, cases.GPU_CASES))
    layers = [(case.name, case.numbers, case.shape.get("H", case.shape.get("D"))) for case in distinct]
    assert len(set(layers[: len(set(layers))])) == len(set(layers)), "those of one layer are not side by side"


def test_the_kernels_of_few_steps_are_those_of_many():
    pytest.importorskip("triton")
    from gatematch.bench.kernels import compiled
    from gatematch.bench.launches import LAUNCHES, Sample

    def found(steps):
        sample = Sample(torch.bfloat16, {"H": 64, "B": 16}, batch=16, steps=steps)
        return [
            binary.hash
            for binary in compiled("lstm_resident_fwd", "sm_90", LAUNCHES["lstm_resident_fwd"](sample))
        ]

    assert found(16) == found(512)


@pytest.fixture
def on_no_device(ahead, monkeypatch):
    for name in ("device", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: contextlib.nullcontext())
    monkeypatch.setattr(ahead.torch, "set_num_threads", lambda number: None)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "2")


@pytest.fixture
def forked(ahead, on_no_device, monkeypatch):
    fork = multiprocessing.get_context("fork")  # processes that know the stubs
    monkeypatch.setattr(ahead, "multiprocessing", SimpleNamespace(get_context=lambda kind: fork))
    monkeypatch.setattr(ahead, "PROCESSES", 3)


def test_processes_take_turns(ahead, forked, tmp_path):
    def call(part):
        (tmp_path / str(part)).touch(exist_ok=False)
        if part == "fails":
            raise torch.OutOfMemoryError("CUDA out of memory")

    said = ahead.compile_ahead(["a", "fails", "b", "c", "d"], call, GPU)
    assert re.fullmatch(r"compiled ahead: 5 of 5, by 3 processes in \d+ s", said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d", "fails"]


def test_one_that_hangs_or_dies_holds_up_nobody_for_long(ahead, forked):
    def call(part):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if part == "dies":
            os._exit(3)
        time.sleep(600)

    began = time.monotonic()
    said = ahead.compile_ahead(["dies", "hangs", "hangs", "hangs"], call, GPU, 0.5)
    assert said.startswith("compiled ahead: 0 of 4, by 3 processes")
    assert time.monotonic() - began < 30 and not multiprocessing.active_children()


def test_a_process_that_has_lost_the_device_takes_no_more(ahead, on_no_device, monkeypatch):
    def lost(device):
        if len(called) == 2:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    called, taken, done = [], turns(0), turns(0)
    ahead.take_turns("abcd", called.append, GPU, taken, done)
    assert called == ["a", "b"] and (taken.value, done.value) == (2, 1)


def turns(number):
    return SimpleNamespace(value=number, get_lock=contextlib.nullcontext)


def test_what_is_called_of_a_case(monkeypatch):
    """Ours and what torch.compile makes, in both modes; one that fails leaves the others."""
    called = []
    problem = made_problem()
    problem.modules = (torch.nn.LSTM(2, 2),)
    x = problem.ours_wrt[0]

    def function(name):
        def call():
            called.append((name, torch.is_grad_enabled(), problem.modules[0].training))
            if name == "compiled loop":
                raise RuntimeError("no compiler")
            return 2 * x

        return call

    problem.ours = function("ours")
    peers = ("cdist, fast mode", "compiled loop", "compiled expansion")
    problem.peers = {name: (function(name), [x]) for name in peers}
    monkeypatch.setattr(speed, "build", lambda case, device, compiled: problem)
    speed.call_once(cases.GPU_CASES[0], CPU, True)
    names = ("ours", "compiled expansion", "compiled loop")
    assert called[1:] == [(name, grad, grad) for grad in (False, True) for name in names]


def test_what_check_compiles_ahead_is_all_that_it_does(monkeypatch):
    ran = []
    monkeypatch.setattr(check.Check, "row", lambda self: ran.append((self.case, self.setting)) or {})
    monkeypatch.setattr(check, "DTYPES", (torch.float32,))
    check.run_check(CPU)
    every, ran[:] = ran[:], []
    for n in range(check._SHARES):
        check.some_rows(n, check._SHARES, CPU)
    assert sorted(map(str, ran)) == sorted(map(str, every)) and every


# Timing


class Clock:
    """A device whose every call takes a second, and what was issued to it in which order."""

    def __init__(self):
        self.log, self.now = [], 0.0

    def issue(self, name, seconds=1.0):
        self.log.append(name)
        self.now += seconds

    def function(self, name):
        return lambda: self.issue(name)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            clock.issue("event", 0.0)
            self.at = clock.now

        def synchronize(self):
            clock.log.append("waited")

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    class Graph:
        def replay(self):
            clock.issue("replay", 0.25)

    class Captured:
        def __init__(self, graph):
            pass

        def __enter__(self):
            clock.log.append("capture")

        def __exit__(self, *error):
            clock.log.append("captured")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        Event=Event,
        CUDAGraph=Graph,
        graph=Captured,
        Stream=lambda device: stream,
        stream=lambda stream: torch.no_grad(),
        current_stream=lambda device: stream,
        synchronize=lambda device: None,
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=50 << 20),
    )
    sizes = []

    def empty(size, dtype, device):
        sizes.append(size)
        return SimpleNamespace(zero_=lambda: clock.issue("write", 0.5))

    fake = SimpleNamespace(cuda=cuda, empty=empty, int8=torch.int8)
    monkeypatch.setattr(timing, "torch", fake)
    clock.sizes = sizes
    return clock


def test_warm_calls_follow_each_other_between_two_events(clock, monkeypatch):
    issued = {name: lambda name=name: clock.issue(name, 0.02) for name in "ab"}
    times = timing.measure(issued, 0.0, GPU)
    assert np.allclose([times["a"], times["b"]], [[0.02] * 3] * 2)
    # The first call is not timed: it keeps the device busy while the host issues the others.
    assert clock.log[-5:] in ([name, "event", name, "event", "waited"] for name in "ab")
    assert clock.log.count("a") == 2 + 2 * 3
    timing.measure({"long": clock.function("long")}, 0.0, GPU)
    assert clock.log[-6:] == ["event", "waited", "event", "long", "event", "waited"]
    assert clock.log.count("long") == 2 + 3
    quick = timing.measure({"a": lambda: clock.issue("quick", 1.2e-4)}, 0.0, GPU)
    assert np.allclose(quick["a"], 1.2e-4)
    assert clock.log[-12:] == ["quick", "event", *["quick"] * 8, "event", "waited"]


def test_every_round_has_every_function_once_in_orders_that_change(monkeypatch):
    log = []
    monkeypatch.setattr(timing, "_sampler", lambda function, *how: lambda: log.append(function()) or 1.0)
    timing.measure({name: lambda name=name: name for name in "abc"}, 0.0, CPU)
    rounds = [tuple(log[n : n + 3]) for n in range(0, len(log), 3)]
    assert len(rounds) == 7 and all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1


def test_slow_calls_have_fewer_rounds_on_a_gpu_alone(clock, monkeypatch):
    for seconds, of_gpu, of_cpu in ((0.0, 3, 7), (15.0, 4, 7)):
        ticks = iter(np.arange(0.0, 1e6, 10.0))
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda ticks=ticks: next(ticks)))
        for device, rounds in ((GPU, of_gpu), (CPU, of_cpu)):
            found = timing.measure({"a": clock.function("a")}, seconds, device)["a"]
            assert len(found) == rounds, (seconds, device)


def test_cold_calls_find_the_cache_written_over(clock, monkeypatch):
    # The host takes 1.4 s to issue a call: at 0.5 s a write, 1 + 5 writes keep the device busy for longer.
    ticks = iter(np.arange(0.0, 1e6, 1.4))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    times = timing.measure({"a": lambda: clock.issue("a", 1e-5)}, 0.0, GPU, "cold")
    assert np.allclose(times["a"], 1e-5)
    assert clock.log[-10:] == ["write"] * 6 + ["event", "a", "event", "waited"]
    large = SimpleNamespace(L2_cache_size=1 << 30)
    monkeypatch.setattr(timing.torch.cuda, "get_device_properties", lambda device: large)
    timing.measure({"a": lambda: clock.issue("a")}, 0.0, GPU, "cold")
    assert clock.sizes == [1 << 28, 1 << 32]


def test_a_graph_is_captured_once_after_a_warm_up(clock):
    replay = timing.graphed(clock.function("a"), GPU)
    assert clock.log == ["a"] * 3 + ["capture", "a", "captured"]
    assert timing.measure({"a": replay}, 0.0, GPU, "graph")["a"].tolist() == [0.25] * 3
    assert clock.log.count("a") == 4


# Rows


def made_problem(kernels=("pairwise_fwd",), work=True):
    """Ours and two peers, one of them wrong, of one number; ours as if kernels had been launched."""
    x = torch.ones(2, 3, requires_grad=True)

    def ours():
        for kernel in kernels:
            config.choose(kernel, "sm_90", torch.bfloat16, {"Q": 8, "A": 8, "D": 8, "H": 64, "B": 16})
        return 2 * x

    def fails():
        raise RuntimeError("no such thing\nat all")

    exact = x.detach().double().requires_grad_()
    return Problem(
        ours=ours,
        ours_wrt=[x],
        peers={
            "right": (lambda: x + x, [x]),
            "wrong": (lambda: 2.5 * x, [x]),
            "failing": (fails, [x]),
        },
        exact=lambda: 2 * exact,
        exact_wrt=[exact],
        bound=1e-6,
        peer_bound=1e-6,
        relative=False,
        skipped={"left": "out"},
        work={"forward": Work(4.8e9, 989e9, "bfloat16", 3.9e9)} if work else {},
    )


@pytest.fixture
def device(monkeypatch):
    """Times of calls by their names: ours 2 ms."""
    seconds = {"ours": 2e-3, "right": 3e-3, "wrong": 1e-3, "random rows": 1e-3}
    asked = []

    def measure(calls, budget, device, timing):
        asked.append((timing, list(calls)))
        return {name: np.full(7, seconds[name]) for name in calls}

    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "peak_bytes", lambda call, device: 1 << 20)
    monkeypatch.setattr(speed, "graphed", lambda call, device: call)
    return asked


def test_a_row_for_every_way_of_timing(device):
    case = Case("pairwise/made", {"B": 2, "Q": 3, "A": 1, "D": 1}, timings=("cold", "warm"))
    rows = list(speed.time_problem(case, made_problem(), "forward", GPU, 0.0, RATES))
    assert [row["timing"] for row in rows] == ["cold", "warm"] == [timing for timing, _ in device]
    assert all(names == ["ours", "right", "wrong"] for _, names in device)
    for row in rows:
        assert row["ours"]["median"] == 2.0 and row["peers"]["right"]["ratio"] == 1.5
        # What is wrong is timed too, but its ratio goes by another name.
        assert row["peers"]["wrong"]["status"] == "wrong" and "ratio" not in row["peers"]["wrong"]
        assert row["peers"]["wrong"]["wrong_ratio"] == 0.5
        assert row["peers"]["failing"] == {"status": "failed: no such thing"}
        assert row["kernel"] == "pairwise_fwd"
        tile = config.choose("pairwise_fwd", "sm_90", torch.bfloat16, {"Q": 8, "A": 8, "D": 8})
        assert row["configs"] == {"pairwise_fwd": tile.numbers}
        assert row["floors_ms"] == pytest.approx({"memory": 1.0, "product": 1.0, "specials": 1.0})
        assert row["share"] == pytest.approx(0.5)
        assert row["achieved"] == pytest.approx({"bytes_per_s": 2.4e12, "flops_per_s": 494.5e12})


def test_what_cannot_be_captured_is_said(device, monkeypatch):
    case = Case("lstm/decode", {"T": 1, "B": 2, "I": 1, "H": 64}, timings=("graph",))
    calls = []

    def graphed(call, device):
        calls.append(call)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return call

    monkeypatch.setattr(speed, "graphed", graphed)
    (row,) = speed.time_problem(case, made_problem(work=False), "forward", GPU, 0.0, RATES)
    assert row["peers"]["right"] == {"status": "failed: operation not permitted when stream is capturing"}
    assert device == [("graph", ["ours", "wrong"])] and "share" not in row
    monkeypatch.setattr(speed, "graphed", lambda call, device: made_problem().peers["failing"][0]())
    with pytest.raises(RuntimeError, match="no such thing"):  # ours must be capturable
        list(speed.time_problem(case, made_problem(), "forward", GPU, 0.0, RATES))


def test_peers_write_nothing_for_a_gradient_that_nobody_wants(device):
    problem = made_problem()
    problem.modules = (torch.nn.LSTM(2, 2),)
    case = Case("lstm/made", {"T": 1, "B": 2, "I": 3, "H": 1})
    for mode in speed.MODES:
        list(speed.time_problem(case, problem, mode, GPU, 0.0))
        assert problem.modules[0].training == (mode == "forward+backward")


def test_what_is_wrong_of_ours_is_not_timed(device):
    problem = made_problem()
    problem.bound = -1.0
    case = Case("pairwise/made", {"B": 2, "Q": 3, "A": 1, "D": 1}, timings=("cold", "warm"))
    rows = list(speed.time_problem(case, problem, "forward", GPU, 0.0, RATES))
    assert len(rows) == 2 and not device and all(row["ours"]["status"] == "wrong" for row in rows)
    assert speed_report.faults(rows) == ["WRONG: pairwise/made random float32 forward"] * 2


def test_a_case_that_fails_does_not_stop_the_others(device, monkeypatch):
    def build(case, device, compiled):
        if case.name == "pairwise/bad":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to")
        return made_problem(work=False)

    monkeypatch.setattr(speed, "build", build)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    made = [Case(f"pairwise/{name}", {"B": 2, "Q": 3, "A": 1, "D": 1}) for name in ("bad", "good")]
    kept = []
    rows = speed.run_speed(made, GPU, 0.0, keep=lambda rows: kept.append(len(rows)))
    assert [row["ours"]["status"] for row in rows] == ["failed: CUDA out of memory.", "timed", "timed"]
    assert kept == [1, 1, 3]
    assert speed_report.faults(rows) == ["FAILED: pairwise/bad random float32 CUDA out of memory."]
    assert "- FAILED: pairwise/bad random float32 CUDA" in speed_report.speed_tables(rows)
    kept.clear()

    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):  # the others would fail, too
        speed.run_speed(made, GPU, 0.0, keep=lambda rows: kept.append(len(rows)))
    assert kept == [1]
    with pytest.raises(torch.OutOfMemoryError):  # on a CPU that is a mistake
        speed.run_speed(made, CPU, 0.0)


def test_the_step_of_a_single_layer(device):
    case = Case("lstm/single", {"T": 500, "B": 16, "I": 512, "H": 512}, dtype=torch.bfloat16)
    (row,) = speed.time_problem(case, made_problem(work=False), "forward", GPU, 0.0, RATES)
    assert row["us_per_step"] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("op", "dtype", "shape", "mode", "memory", "product"),
    [  # in us, by hand for an H200
        ("attention", torch.bfloat16, (64, 512, 300), "forward", 15, 10),
        ("attention", torch.bfloat16, (8, 8192, 128), "forward", 231, 139),
        ("attention", torch.float32, (8, 8192, 128), "forward", 461, 3 * 139),
        ("attention", torch.float32, (8, 8192, 128), "backward", 2 * 461, 6 * 278),
        ("attend", torch.bfloat16, (8, 8192, 128), "forward", 28 / 2, 278),
        ("attend", torch.bfloat16, (8, 8192, 128), "backward", 24, 694),
    ],
)
def test_floors(op, dtype, shape, mode, memory, product):
    B, L, D = shape
    sizes = {"B": B, "Q": L, "A": L, "D": D} | ({"V": D} if op == "attend" else {})
    of_modes = pairwise_problems.work(op, sizes, dtype)
    found = floors.floors(of_modes["forward"], RATES)
    if mode == "backward":
        both = floors.floors(of_modes["forward+backward"], RATES)
        found = {name: both[name] - ms for name, ms in found.items()}
    assert found["memory"] * 1e3 == pytest.approx(memory, rel=0.05)
    assert found["product"] * 1e3 == pytest.approx(product, rel=0.05)
    if mode == "forward":
        assert found["specials"] * 1e3 == pytest.approx(2 * B * L * L / 3.9e6)


def row(case, data="random", mode="forward", timing="warm", median=1.0, peers=None, **more):
    shape = (
        {"T": 9, "B": 1, "I": 64, "H": 64} if case.startswith("lstm/") else {"B": 8, "Q": 9, "A": 9, "D": 4}
    )
    ours = {"status": "timed", "median": median, "error": 1e-6, "gradient_error": None}
    common = {"case": case, "data": data, "shape": shape, "dtype": "tf32", "mode": mode, "timing": timing}
    return common | {"ours": ours, "peers": peers or {}} | more


def timed(ratio):
    return {"status": "timed", "ratio": ratio}


def wrong(ratio):
    return {"status": "wrong", "error": 0.01, "gradient_error": None, "wrong_ratio": ratio}


def test_the_table_of_an_lstm_has_classes_and_all_that_is_slower_or_wrong():
    def lstm(case, H, peer, mode="forward"):
        shape = {"T": 9, "B": 1, "I": H, "H": H}
        return row(f"lstm/{case}", mode=mode, peers={"torch.nn.LSTM": peer}, shape=shape)

    rows = [
        lstm("single", 64, timed(1.0)),
        lstm("single", 128, timed(4.0)),
        lstm("single", 2048, timed(0.1)),
        lstm("single", 64, timed(3.0), "forward+backward"),
        lstm("decode", 64, timed(5.0)),
        lstm("decode", 128, wrong(0.2)),
    ]
    failing = {key: rows[0][key] for key in ("case", "data", "shape", "dtype", "peers")}
    failing["ours"] = {"status": "failed: out of memory"}
    assert speed_report.speed_tables([*rows, failing]).splitlines()[2:] == [
        "| lstm/single | tf32 | warm | torch.nn.LSTM | 2 | 2.00x | 1.00x, B1 H64 | 3.00x | 3.00x, B1 H64 |",
        "| lstm/single H2048 | tf32 | warm | torch.nn.LSTM | 1 | 0.10x | 0.10x, B1 H2048 | – | – |",
        "| lstm/decode | tf32 | warm | torch.nn.LSTM | 2 | 1.00x, 1 wrong | 0.20x, B1 H128 | – | – |",
        "",
        "Slower than a peer, or wrong:",
        "",
        "- FAILED: lstm/single random tf32 out of memory",
        "- lstm/single tf32, forward, warm, beside torch.nn.LSTM: 0.10x (B1 H2048)",
    ]


def test_the_table_of_pairwise_attention():
    def pairwise(*arguments, fast=None, exact=None, wide=None):
        peers = {"cdist, fast mode": fast, "cdist, exact mode": exact, "broadcast": wide}
        peers = {name: peer for name, peer in peers.items() if peer}
        return row("pairwise/long", *arguments, peers=peers, share=0.25)

    fails, skipped = {"status": "failed: 32 bits"}, {"status": "skipped: too large"}
    rows = [
        pairwise("random", "forward", "warm", 9.0, fast=timed(0.9)),
        pairwise("random", "forward", "cold", 1.5, fast=timed(2.0), wide=skipped),
        pairwise("random", "forward+backward", "cold", 3.0, fast=timed(1.0), exact=fails),
        pairwise("text", "forward", "cold", 0.123, fast=wrong(0.5), exact=timed(30.0)),
    ]
    heads, _, *table = speed_report.speed_tables(rows).splitlines()
    assert heads.endswith(
        "| ours, ms | error, of gradients | of the floor | cdist, fast mode | cdist, exact mode |"
    )
    size = "| B8 Q9 A9 D4 | tf32 |"
    assert table == [
        f"| pairwise/long {size} 1.50, 3.00 | 1e-06, – | 25%, 25% | 2.00x, 1.00x | –, fails |",
        f"| pairwise/long, text {size} 0.12, – | 1e-06, – | 25%, – | wrong by 1e-02 (0.50x), – | 30.00x, – |",
        "",
        "Slower than a peer, or wrong:",
        "",
        "- pairwise/long tf32, forward, warm, beside cdist, fast mode: 0.90x (B8 Q9 A9 D4)",
    ]
    none = "- no row in which a peer whose results are right is faster"
    assert speed_report.speed_tables(rows[1:]).endswith(none)


def test_ceilings_count_what_is_moved_and_computed(monkeypatch):
    triton = pytest.importorskip("triton")
    from gatematch.bench import ceilings

    launched = []
    monkeypatch.setattr(ceilings, "_COPIED", 1 << 10)
    monkeypatch.setattr(ceilings, "_SIDE", 8)
    monkeypatch.setattr(
        triton.runtime.jit.JITFunction, "run", lambda self, *args, **options: launched.append(args)
    )
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2)
    )

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(ceilings, "do_bench", lambda function, **how: (function(), 500.0)[1])
    rates = ceilings.ceilings(CPU)
    products = {f"{name}_flops": 2 * 8**3 / 0.5 for name in ("bfloat16", "float16", "tf32", "float32")}
    numbers = 2 * 64 * 1024
    assert rates == {"bytes": 2 * 1024 / 0.5, **products, "specials": numbers * 4096 / 0.5}
    assert launched and all(x.numel() == numbers and count == 4096 for x, _, count, *_ in launched)
    assert set(RATES) == set(rates)


def test_the_roots_of_the_ceiling_are_special_functions_and_little_else():
    pytest.importorskip("triton")
    from gatematch.bench import ceilings
    from gatematch.bench.kernels import compiled

    x = torch.ones(1024)
    (binary,) = compiled("roots", "sm_90", lambda: ceilings.roots[(1,)](x, x, 4096, BLOCK=1024, num_warps=4))
    body = binary.asm["ptx"].split("$L__BB0_1:")[1].split("bra")[0]
    instructions = [line.strip() for line in body.splitlines() if line.startswith("\t") and "//" not in line]
    roots = [line for line in instructions if line.startswith("rsqrt.approx.ftz.f32")]
    assert len(roots) == 8 and len(instructions) <= len(roots) + 4, instructions


def test_a_bfloat16_peer_is_given_flat_weights(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", lambda *args: calls.append(args))
    monkeypatch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", lambda mode: 2)
    peer = torch.nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.bfloat16)
    lstm_problems.flatten(peer)
    ((weights, *options),) = calls
    assert all(weight is own for weight, own in zip(weights, peer.parameters(), strict=True))
    assert options == [4, 3, 2, 4, 0, 2, False, True]
