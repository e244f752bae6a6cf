"""Which kernel computes a layer.

    resident     H up to 64, what fits one multiprocessor: nobody waits for others
    persistent   beyond: W_hh is spread over the chip, one wait of all for all in every step
    resident     H up to 128 in 16 bits, where persistent cannot serve
    step         whatever neither can serve, one launch a step: any H, and where another could not be launched

On an H200 both take about as long forward at H 64, and resident less backward; at H 128 persistent takes
less forward. As long as the programs of persistent fit the chip they read less than step, which reads all of
W_hh in every step.
"""

import functools
import importlib
import logging
from types import ModuleType
from typing import Any, NamedTuple

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from gatematch.kernels.config import architecture
from gatematch.kernels.recurrence import processors

from .checks import KERNELS

_log = logging.getLogger("gatematch")


class Layer(NamedTuple):
    """What the choice depends on."""

    hidden_size: int
    dtype: torch.dtype
    precision: str
    device: torch.device


@functools.cache
def _module(kernel: str) -> ModuleType:
    return importlib.import_module(f"gatematch.kernels.lstm_{kernel}")


# To which H a layer is rather computed by a multiprocessor than by many that wait for each other.
_RESIDENT = 64

# Layers, forward or backward, whose kernel could not be launched: it is tried once.
_failed: set[tuple[Layer, bool]] = set()


@functools.lru_cache(maxsize=1024)
def serves(kernel: str, layer: Layer, backward: bool) -> bool:
    """Whether a kernel can compute such a layer on its device."""
    arch = architecture(layer.device)
    H, dtype, precision, device = layer
    if kernel == "step":
        return True
    if kernel == "persistent":
        return bool(_module(kernel).serves(H, dtype, precision, arch, processors(device), backward))
    return bool(_module(kernel).serves(H, dtype, precision, arch))


def select(layer: Layer, backward: bool) -> str:
    """The kernel by the rule above."""
    kernels: tuple[str, ...] = ("resident", "persistent")
    if layer.hidden_size > _RESIDENT:
        kernels = kernels[::-1]
    if (layer, backward) in _failed:
        kernels = ()
    return next((kernel for kernel in kernels if serves(kernel, layer, backward)), "step")


def launch(impl: str, layer: Layer, backward: bool, *args: Any, **options: Any) -> Any:
    """Run the kernel that `impl` names, or the one that the rule selects and, should it fail, `step`.

    A kernel that is named has no substitute, but for a backward that it does not have.

    Raises:
        ValueError: the kernel that `impl` names cannot serve the layer.
    """
    named = impl in KERNELS
    if named and not serves(impl, layer, backward):
        if not backward:
            H, dtype, precision, device = layer
            raise ValueError(
                f"impl: {impl!r} cannot serve hidden_size {H} in {dtype} ({precision}) on {device}; "
                "use 'triton'"
            )
        named = False
    kernel = impl if named else select(layer, backward)
    run = "backward" if backward else "forward"
    try:
        return getattr(_module(kernel), run)(*args, **options)
    except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
        # The first launch fails or none: nothing is written yet. Only one RuntimeError is about the launch.
        refused = not isinstance(error, RuntimeError) or "cooperative launch" in str(error)
        if named or kernel == "step" or not refused:
            raise
        _log.warning(
            "the LSTM's %s kernel cannot be launched for %s, step takes it: %s", kernel, layer, error
        )
        _failed.add((layer, backward))
        return getattr(_module("step"), run)(*args, **options)
