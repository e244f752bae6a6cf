"""Sets the precision of torch's float32 products, which torch offers only as flags of the whole process.

While a flag is set, it also holds for products of other threads on that device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_ALL: Any = torch.backends
_AS_IT_IS = contextlib.nullcontext()


class Switch:
    """One such switch, which several threads may use at a time, since backward passes run in their own.

    Reference-counted: the first user sets it, the last restores it. A user of another precision waits.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._free, self._users, self._wanted, self._before = threading.Condition(), 0, "", ""

    @contextlib.contextmanager
    def at(self, precision: str) -> Iterator[None]:
        """Products in "ieee" or "tf32". A thread must not nest two that differ: it would wait for itself."""
        with self._free:
            self._free.wait_for(lambda: self._users == 0 or self._wanted == precision)
            if self._users == 0:
                self._wanted, self._before = precision, self.backend.fp32_precision
                if not self.is_at(precision):
                    self.backend.fp32_precision = precision
            self._users += 1
        try:
            yield
        finally:
            with self._free:
                self._users -= 1
                if self._users == 0 and self.backend.fp32_precision != self._before:
                    # What was read may be the precision of all of torch: not to be pinned down here.
                    inherited = self._before == _ALL.fp32_precision
                    self.backend.fp32_precision = "none" if inherited else self._before
                self._free.notify_all()

    def is_at(self, precision: str) -> bool:
        current = self.backend.fp32_precision
        return current == precision or (current == "none" and precision == "ieee")


_CPU = Switch(_ALL.mkldnn.matmul)
_CUDA = Switch(_ALL.cuda.matmul)


def library_products(device_type: str, precision: str = "ieee") -> contextlib.AbstractContextManager[None]:
    """Products of float32 in this precision and of other dtypes as they are, whatever autocast says."""
    # On the CPU this package asks for "ieee" only: where that is set there is nothing to do.
    exact = device_type != "cuda" and _CPU.backend.fp32_precision in ("ieee", "none")
    if exact and not torch.is_autocast_enabled(device_type):
        return _AS_IT_IS
    return _guarded(device_type, precision)


@contextlib.contextmanager
def _guarded(device_type: str, precision: str) -> Iterator[None]:
    switch = _CUDA if device_type == "cuda" else _CPU
    with torch.autocast(device_type, enabled=False), switch.at(precision):
        yield
