"""Who computes a call: torch, the reference or the kernels, as `impl` says and as the call allows."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gatematch.kernels.launch import obstacle

KERNELS = ("resident", "persistent", "step", "cluster")
IMPLS = ("auto", "torch", "triton", *KERNELS)


def transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, which the fused op cannot follow."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def check_impl_name(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def takes_kernels(x: Tensor, impl: str, kernels: tuple[str, ...] = KERNELS) -> bool:
    """Whether the kernels compute a call. Raises ValueError if `impl` asks for them and they cannot."""
    check_impl_name(impl)
    if impl == "torch" or (impl == "auto" and not x.is_cuda):
        return False
    reason = obstacle(x)
    if reason is None and (transformed() or _compiles_transformed()):
        reason = "the kernels know nothing of torch.func and of forward-mode derivatives"
    if reason is None and impl in KERNELS and impl not in kernels:
        reason = f"the kernels for it are {', '.join(kernels)}"
    if reason is not None and impl != "auto":
        raise ValueError(f"impl: {impl!r} cannot serve this call: {reason}; use 'auto' or 'torch'")
    return reason is None


def _compiles_transformed() -> bool:
    """`transformed` for what is being compiled; there the ops would give zero for what they do not know."""
    return torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None
    )
