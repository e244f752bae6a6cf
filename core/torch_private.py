"""torch's private API: every use of it in this package, what for, and what it says of a call.

tests/test_torch_private.py calls each: when torch changes one, a test says which. Aliases are torch's own
objects, which TorchDynamo knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

# The innermost level of torch.func (grad, vmap, jvp) around this call, None outside. Dynamo cannot trace it.
innermost_transform = torch._C._functorch.peek_interpreter_stack
# autograd.grad(is_grads_batched=True) has a vmap of its own, above autograd, without rules for Functions.
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
add_legacy_batch_dim = torch._add_batch_dim
remove_legacy_batch_dim = torch._remove_batch_dim
# Autocast is on for some device.
is_any_autocast_enabled = torch._C._is_any_autocast_enabled
# An assertion on the device, for which the host does not wait.
assert_async = torch._assert_async
# Decorates a function that Dynamo must not trace, nor enter after a graph break.
disable_dynamo = torch._disable_dynamo


def surroundings() -> str:
    """What surrounds this call: a key of the table in plan.py."""
    # torch has no public way to ask whether a level is open.
    dual = forward_ad._current_level >= 0
    if torch.compiler.is_compiling():
        transformed = dual or torch._C._are_functorch_transforms_active()
        return "torch.func inside torch.compile" if transformed else "torch.compile"
    if dual:
        return "forward mode"
    return "nothing" if innermost_transform() is None else "torch.func"


def forward_mode() -> bool:
    """Whether a level of forward-mode derivatives is open."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether ``torch.func`` is at work, outside of what is compiled."""
    return not torch.compiler.is_compiling() and innermost_transform() is not None


def bypasses_dispatcher(args: Iterable[Any]) -> bool:
    """True if an op may bypass the dispatcher: no mode, compiler or tracer is active, no tensor is of a
    subclass. The dispatcher costs the host more time than a GPU takes for a single step.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_tracing()
        and innermost_transform() is None
        and all([type(x) in _PLAIN or not isinstance(x, Tensor) for x in args])
    )


_PLAIN = (Tensor, Parameter)


@contextlib.contextmanager
def autograd_inside_op() -> Iterator[None]:
    """Autograd records inside of a custom op, where the dispatcher leaves it out."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded - torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
