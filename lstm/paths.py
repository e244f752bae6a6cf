"""Who computes a call: torch, the reference or the kernels, as `impl` says and as the call allows."""

import torch
from torch import Tensor

from gatematch.kernels.autograd import compiles_transformed, forward_mode, transformed
from gatematch.kernels.launch import obstacle

KERNELS = ("resident", "persistent", "step")
IMPLS = ("auto", "torch", "triton", *KERNELS)


def check_impl_name(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def takes_kernels(x: Tensor, impl: str, kernels: tuple[str, ...] = KERNELS) -> bool:
    """Whether the kernels compute a call. Raises ValueError if `impl` asks for them and they cannot."""
    check_impl_name(impl)
    if impl == "torch" or (impl == "auto" and not x.is_cuda):
        return False
    reason = obstacle(x)
    if reason is None and compiles_transformed():
        reason = "the kernels know nothing of torch.func inside of what is compiled"
    if reason is None and forward_mode():
        reason = "the kernels have no forward-mode derivative"
    if reason is None and impl in KERNELS and impl not in kernels:
        reason = f"the kernels for it are {', '.join(kernels)}"
    if reason is not None and impl != "auto":
        raise ValueError(f"impl: {impl!r} cannot serve this call: {reason}; use 'auto' or 'torch'")
    return reason is None


def takes_reference() -> bool:
    """Whether only plain torch operations can follow what is done to a call; see kernels/autograd.py."""
    return forward_mode() or compiles_transformed()


def takes_ops() -> bool:
    """Whether a call that the kernels do not compute goes through an op of ours, and the fused one inside it.

    The fused op cannot be mapped, nor followed by ``torch.func``. Under torch.compile it cannot have lengths,
    fails where gradients are needed (AOTAutograd in torch 2.13) and, exported, serves no other T.
    """
    return (torch.compiler.is_compiling() or transformed()) and not takes_reference()
