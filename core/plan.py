"""Chooses the implementation of a call (kernels, torch's operations or the reference) from one table.

Both halves use it. Which of several kernels computes a layer, by sizes, is chosen inside the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from gatematch.kernels.launch import obstacle

from .checks import check_choice

# What surrounds the call: (who computes it if the kernels are wanted and can serve it, who else). Whoever
# looks inside of a call finds one op, or plain operations; only "eager" reads values of tensors on the host.
#   triton      the op, by the kernels
#   torch       the op, by torch's own operations
#   eager       torch's own operations without any op
#   reference   plain operations, through which every derivative and transform of torch passes
# Sizes decide nothing here: TorchDynamo would compile again for others.
TABLE = {
    "nothing": ("triton", "eager"),
    "torch.func": ("triton", "torch"),
    "torch.compile": ("triton", "torch"),
    "torch.jit.trace": ("triton", "torch"),
    "a dispatch mode or subclass": ("triton", "torch"),
    "forward mode of other tensors": ("triton", "torch"),
    "forward mode": (None, "reference"),
    "torch.func inside torch.compile": (None, "reference"),
}
_OBSTACLES = {
    "forward mode": "the kernels have no forward-mode derivative",
    "torch.func inside torch.compile": "the kernels know nothing of torch.func inside of what is compiled",
}


def fx_node(module: nn.Module, *args: Any) -> Proxy:
    """A module's call as one node of a torch.fx graph, as of torch's own modules; args[0] is a Proxy.

    A tracer enters modules outside of torch.nn, and cannot follow checks and choices by sizes.
    """
    tracer = args[0].tracer
    if tracer.root is module:
        raise TypeError(
            f"module: expected one inside of what torch.fx traces, got {type(module).__name__} itself"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})


def who_computes(
    x: Tensor, impl: str, around: str, named: Sequence[str] = (), serving: Sequence[str] = ()
) -> str:
    """ "triton", "torch", "eager" or "reference", for tensors like x.

    Args:
        impl: "auto", "torch", "triton" or the name of a kernel.
        around: what surrounds the call, from `torch_private.surroundings`.
        named: the kernels that can be asked for by name.
        serving: those of them that serve this kind of call.

    Raises:
        ValueError: `impl` is unknown, or asks for kernels that cannot serve the call.
    """
    if type(impl) is not str or impl not in ("auto", "torch", "triton"):
        check_choice("impl", impl, ("auto", "torch", "triton", *named))
    kernels, otherwise = TABLE[around]
    if impl == "torch" or (impl == "auto" and not x.is_cuda):
        return otherwise
    reason = obstacle(x) or _OBSTACLES.get(around)
    if reason is None and impl in named and impl not in serving:
        reason = f"the kernels for it are {', '.join(serving)}"
    if reason is None and kernels is not None:
        return kernels
    if impl != "auto":
        raise ValueError(
            f"impl: expected 'auto' or 'torch', got {impl!r}; it cannot serve this call: {reason}"
        )
    return otherwise
