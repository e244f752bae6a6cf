"""The programs of an interpreted launch alive at once, so that they can wait for each other.

Triton's interpreter runs the programs of a grid to their ends, one after another: a barrier over the grid
would spin for ever. Here each is a thread. One runs at a time and hands over before its accesses to memory,
the only place where programs see each other. An access of a whole block is one step, and all programs see one
order of steps: a race between blocks shows under some seed, a wrong memory order or missing fence under none.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from interpreted.bounds import ACCESSES
from triton.runtime.interpreter import GridExecutor, TensorHandle, _interpreter, interpreter_builder

# Accesses of a random turn. Equal turns find fewer bugs: no program gets far ahead of another.
LONGEST_TURN = 64


class Deadlock(AssertionError):
    pass


class _Stop(BaseException):
    """Ends the other programs after one failed. No Exception: the interpreter would wrap that."""


@contextlib.contextmanager
def cooperative(seed: int | None = None, limit: int = 1000) -> Iterator[None]:
    """Launches inside run all their programs at once, and an error in one of them ends all.

    Without a seed the programs make one access each in turn. With one, who goes on and for how many accesses
    is random, and the same for the same seed; an atomic always ends a turn. `limit` accesses per live program
    in which nobody wrote anything or ended are a Deadlock. A loop that writes for ever, or touches no memory,
    is not seen.
    """
    chance = None if seed is None else random.Random(seed)
    launch: _Launch | None = None
    init = GridExecutor.__init__

    class AllAtOnce:
        """In the place of a kernel's function, which the interpreter inspects and calls for each program."""

        def __init__(self, function: Callable[..., None]) -> None:
            functools.update_wrapper(self, function)
            self.function, self.__globals__ = function, function.__globals__
            self.__signature__ = inspect.signature(function)

        def __call__(self, **arguments: Any) -> None:
            nonlocal launch
            if interpreter_builder.grid_idx == (0, 0, 0):  # the first call runs all, the others nothing
                launch = _Launch(functools.partial(self.function, **arguments), chance, limit)
                launch.run()

    def init_with_all(self: GridExecutor, function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        init(self, function, *args, **kwargs)
        self.fn = AllAtOnce(function)

    def in_turn(name: str) -> Callable[..., Any]:
        access = getattr(interpreter_builder, name)

        def waited(*args: Any, **kwargs: Any) -> Any:
            assert launch is not None
            launch.wait(name)
            result = access(*args, **kwargs)
            if "atomic" in name or args[-1] is True:  # the last argument of a load: volatile, as polls are
                launch.turn = 0
            if _writes(name, args, result):
                launch.idle = 0
            return result

        return waited

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(GridExecutor, "__init__", init_with_all))
        for name in ACCESSES:  # atomic loads, stores and polls of newer versions end in these
            patches.enter_context(mock.patch.object(interpreter_builder, name, in_turn(name)))
        if poll := getattr(interpreter_builder, "create_atomic_poll", None):

            def endless(pointer: Any, value: Any, timeout: Any, *how: Any) -> Any:
                """Triton 3.9 gives no timeout as an empty object, and its interpreter reads that."""
                return poll(pointer, value, timeout if isinstance(timeout, TensorHandle) else None, *how)

            patches.enter_context(mock.patch.object(interpreter_builder, "create_atomic_poll", endless))
        yield


def _writes(name: str, args: tuple[Any, ...], result: Any) -> bool:
    """Whether an access changed memory; an atomic did if not the value that it returned is there now."""
    if "atomic" not in name:
        return name == "create_masked_store"
    pointer_at, mask_at = ACCESSES[name]
    pointers, before = args[pointer_at].data, result.data
    mask = np.ones(pointers.shape, bool) if mask_at is None else args[mask_at].data.astype(bool)
    now = _interpreter.load(pointers, mask, before, before.dtype)
    return bool(now.tobytes() != before.tobytes())


class _Launch:
    def __init__(self, program: Callable[[], None], chance: random.Random | None, limit: int) -> None:
        self.program, self.chance, self.limit = program, chance, limit
        self.places = list(itertools.product(*map(range, interpreter_builder.grid_dim)))
        self.live = list(range(len(self.places)))
        self.running = -1
        self.batons = [threading.Lock() for _ in self.places]
        self.turn = 0  # accesses left to the running program
        self.idle = self.total = 0  # accesses since the last write or end of a program, and in all
        self.failure: BaseException | None = None
        self.all_ended = threading.Event()

    def run(self) -> None:
        threads = []
        for me, baton in enumerate(self.batons):
            baton.acquire()
            context = contextvars.copy_context()  # numpy's errstate, for one, is the launching thread's
            threads.append(threading.Thread(target=context.run, args=(self._program, me), daemon=True))
        for thread in threads:
            thread.start()
        self._choose()
        self.batons[self.running].release()
        try:
            self.all_ended.wait()
        except BaseException as interrupt:
            self.failure = interrupt
            self.all_ended.wait()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def wait(self, access: str) -> None:
        """Called by the running program before an access: hands over if its turn has ended."""
        me = self.running
        self.total, self.idle, self.turn = self.total + 1, self.idle + 1, self.turn - 1
        if self.failure is None and self.idle > self.limit * len(self.live):
            self.failure = Deadlock(
                f"nothing was written in the last {self.idle} of {self.total} accesses, now "
                f"{access.removeprefix('create_')} in program {self.places[me]}; not ended: "
                + ", ".join(str(self.places[program]) for program in self.live)
            )
        if self.failure is None and self.turn <= 0:
            self._choose()
            if self.running != me:
                self.batons[self.running].release()
                self.batons[me].acquire()
        if self.failure is not None:
            raise _Stop

    def _choose(self) -> None:
        if self.chance is None:
            self.running = next((program for program in self.live if program > self.running), self.live[0])
        else:
            self.running = self.chance.choice(self.live)
            self.turn = int(LONGEST_TURN ** self.chance.random())
        interpreter_builder.grid_idx = self.places[self.running]  # where program_id and messages read it

    def _program(self, me: int) -> None:
        self.batons[me].acquire()
        try:
            if self.failure is None:
                self.program()
        except _Stop:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        self.live.remove(me)
        self.idle = 0
        if self.live:
            self._choose()
            self.batons[self.running].release()
        else:
            self.all_ended.set()
