"""The grid whose programs are alive at once, on kernels of a few lines."""

import re
import threading

import pytest
import torch
import triton
import triton.language as tl
from interpreted.bounds import ACCESSES, OutOfBounds
from interpreted.cooperative import Deadlock, cooperative
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, interpreter_builder

PROGRAMS, STEPS = 4, 6
SEEDS = [None, *range(8)]


@triton.jit
def barrier(count_ptr, target):
    tl.atomic_add(count_ptr, 1, sem="release")
    while tl.atomic_add(count_ptr, 0, sem="acquire") < target:
        pass


@triton.jit
def sums(x_ptr, count_ptr, steps, BUG: tl.constexpr, PROGRAMS: tl.constexpr):
    """Every step each program adds up the numbers of the step before."""
    i = tl.arange(0, PROGRAMS)
    program = tl.program_id(0)
    second: tl.constexpr = 0 if BUG == "overwritten" else PROGRAMS
    for step in range(steps):
        total = tl.sum(tl.load(x_ptr + step % 2 * second + i), 0) + program
        if BUG == "too early":
            tl.atomic_add(count_ptr, 1)
        tl.store(x_ptr + (step + 1) % 2 * second + program, total)
        if BUG == "too early":
            while tl.atomic_add(count_ptr, 0) < (step + 1) * PROGRAMS:
                pass
        elif BUG == "one too few":
            barrier(count_ptr, (step + 1) * PROGRAMS - 1)
        elif BUG != "no barrier":
            barrier(count_ptr, (step + 1) * PROGRAMS)


def sums_are_right(bug=""):
    x = torch.zeros(2, PROGRAMS, dtype=torch.int64)
    sums[(PROGRAMS,)](x, torch.zeros(1, dtype=torch.int32), STEPS, BUG=bug, PROGRAMS=PROGRAMS)
    expected = torch.zeros(PROGRAMS, dtype=torch.int64)
    for _ in range(STEPS):
        expected = expected.sum() + torch.arange(PROGRAMS)
    return torch.equal(x[0], expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_lets_programs_see_each_other(seed):
    with cooperative(seed):
        assert sums_are_right()


@pytest.mark.parametrize("bug", ["no barrier", "one too few", "too early", "overwritten"])
def test_a_wrong_barrier_shows(bug):
    right = 0
    for seed in range(10):
        with cooperative(seed):
            right += sums_are_right(bug)
    assert right <= 5


@triton.jit
def wait_for_more(count_ptr, flag_ptr, FOR: tl.constexpr, PROGRAMS: tl.constexpr):
    if FOR == "barrier":
        if tl.program_id(1) > 0:  # the first ends at once
            barrier(count_ptr, PROGRAMS)
    elif FOR == "flag":
        while tl.load(flag_ptr, volatile=True) == 0:
            pass
    elif FOR == "poll":
        tl.atomic_poll(flag_ptr, tl.program_id(0) + 1)
    elif FOR == "lock":  # taken and never given back
        while tl.atomic_cas(flag_ptr, 0, 1) != 0:
            pass
    else:  # both of a pair, seen in turn
        while tl.atomic_xchg(flag_ptr, 0) + tl.atomic_max(count_ptr, -1) == 0:
            pass


@pytest.mark.parametrize("seed", SEEDS[:3])
@pytest.mark.parametrize("what", ["barrier", "flag", "lock", "pair", *["poll"] * hasattr(tl, "atomic_poll")])
def test_waiting_in_vain_is_an_error(what, seed):
    count, flag = torch.zeros(2, 1, dtype=torch.int32)
    before = threading.active_count()
    with (
        cooperative(seed, limit=30),
        pytest.raises(InterpreterError, match=r"in the last \d+ of \d+") as error,
    ):
        wait_for_more[(1, PROGRAMS)](count, flag, FOR=what, PROGRAMS=PROGRAMS)
    assert isinstance(error.value.__cause__, Deadlock)
    waiting = set(re.findall(r"\(0, (\d), 0\)", str(error.value).split(";")[1]))
    if what == "barrier":
        assert waiting == {"1", "2", "3"}
    else:
        assert len(waiting) == PROGRAMS - (what == "lock")
    assert threading.active_count() == before


@triton.jit
def work(x_ptr, flag_ptr, reads, stores, adds):
    for _ in range(reads):
        tl.load(x_ptr)
    if tl.program_id(0) == 0:
        for i in range(stores):
            tl.store(x_ptr, i)
        for _ in range(adds):
            tl.atomic_add(x_ptr, 1)
        tl.atomic_xchg(flag_ptr, 1)
    if stores + adds > 0:
        while tl.atomic_add(flag_ptr, 0) == 0:
            pass


@pytest.mark.parametrize("seed", SEEDS[:3])
@pytest.mark.parametrize("amount", [(28, 0, 0), (0, 200, 0), (0, 0, 200)], ids=["reads", "stores", "atomics"])
def test_work_is_no_waiting(amount, seed):
    x, flag = torch.zeros(2, 1, dtype=torch.int32)
    with cooperative(seed, limit=30):
        work[(3,)](x, flag, *amount)
    assert x.item() == max(amount[1] - 1, 0) + amount[2]


@triton.jit
def fail(count_ptr, PROGRAMS: tl.constexpr):
    if tl.program_id(0) == 2:
        tl.arange(0, 3)
    barrier(count_ptr, PROGRAMS)


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_an_error_in_one_program_ends_all(seed):
    before = threading.active_count()
    with cooperative(seed):
        with pytest.raises(InterpreterError, match="power of 2") as error:
            fail[(PROGRAMS,)](torch.zeros(1, dtype=torch.int32), PROGRAMS=PROGRAMS)
        assert isinstance(error.value.__cause__, ValueError)
        assert threading.active_count() == before
        assert sums_are_right()  # the next launch is none the worse


@triton.jit
def overrun(count_ptr, x_ptr, PROGRAMS: tl.constexpr):
    barrier(count_ptr, PROGRAMS)
    tl.store(x_ptr + tl.program_id(0) * 2 + tl.arange(0, 2), 1)


def test_lanes_are_watched():
    x = torch.zeros(8)[:5]
    where = r"masked_store in program \(2, 0, 0\): 1 of 2 lanes"
    with cooperative(1), pytest.raises(InterpreterError, match=where) as error:
        overrun[(3,)](torch.zeros(1, dtype=torch.int32), x, PROGRAMS=3)
    assert isinstance(error.value.__cause__, OutOfBounds)


@triton.jit
def take_tickets(ticket_ptr, order_ptr, n):
    for _ in range(n):
        tl.store(order_ptr + tl.atomic_add(ticket_ptr, 1), tl.program_id(0))


def order(seed):
    order = torch.empty(2, PROGRAMS * 20, dtype=torch.int32)
    with cooperative(seed):
        for row in order:
            take_tickets[(PROGRAMS,)](torch.zeros(1, dtype=torch.int32), row, 20)
    return order.tolist()


def test_the_order_is_the_seeds():
    orders = [order(seed) for seed in SEEDS]
    assert orders == [order(seed) for seed in SEEDS]
    assert len({str(x) for x in orders}) == len(SEEDS)
    assert orders[0] == [[*range(PROGRAMS)] * 20] * 2  # in turn
    assert orders[1][0] != orders[1][1]  # another order in the next launch


@triton.jit
def places(count_ptr, x_ptr, PROGRAMS: tl.constexpr):
    i = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    barrier(count_ptr, PROGRAMS)
    tl.store(x_ptr + i, tl.program_id(0) * 100 + tl.program_id(1) * 10 + tl.program_id(2))


@pytest.mark.parametrize("seed", SEEDS)
def test_programs_keep_their_places(seed):
    x = torch.empty(2, 3, 4, dtype=torch.int32)
    with cooperative(seed):
        places[x.shape](torch.zeros(1, dtype=torch.int32), x, PROGRAMS=x.numel())
    assert x.tolist() == [[[100 * i + 10 * j + k for k in range(4)] for j in range(3)] for i in range(2)]


def test_nothing_stays():
    def patched():
        return [getattr(interpreter_builder, name) for name in ACCESSES], GridExecutor.__init__

    before = patched()
    with cooperative():
        assert patched() != before
        assert sums_are_right()
    assert patched() == before
