"""Waiting for a GPU that may hang: with a deadline, so that a hang is a failure and ends."""

import os
import signal
import time

import pytest

SECONDS = 200.0  # a GPU may be shared by many processes


def hangs(what, seconds):
    """Ends this process: a kernel cannot be stopped, and whatever comes after it would wait for it, too.

    With pytest-xdist the test fails and a new process takes over; without, no other test is run.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
    signal.alarm(60)  # should it hang on its way out
    pytest.exit(f"{what} has not ended after {seconds:g} s: the GPU hangs", 1)


def wait(what, *events, seconds=SECONDS, meanwhile=lambda: None):
    """Until the work before these events is done, by asking for it; `meanwhile` is called again and again."""
    end = time.monotonic() + seconds
    while not all(event.query() for event in events):
        if time.monotonic() > end:
            hangs(what, seconds)
        meanwhile()
        time.sleep(1e-3)


def join(what, threads, seconds=SECONDS):
    """Until these daemon threads have ended."""
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
        if thread.is_alive():
            hangs(what, seconds)
