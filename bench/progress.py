"""How far a long command is: on stderr, a bar in a terminal and a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import track as bar

T = TypeVar("T")
# Seconds between lines.
PAUSE = 10.0


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items in turn; `total` is how many, where they do not say so themselves."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from bar(items, description, total, transient=True, console=console)
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    said = time.monotonic()
    for number, item in enumerate(items, 1):
        if time.monotonic() - said >= PAUSE:
            said = time.monotonic()
            of = "" if total is None else f" of {total}"
            print(f"{description}: {number}{of}", file=sys.stderr, flush=True)
        yield item
