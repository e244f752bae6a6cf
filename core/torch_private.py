"""torch's private API: every use of it in this package, what for, and what it says of a call.

tests/test_torch_private.py calls each: when torch changes one, a test says which. Aliases are torch's own
objects, which TorchDynamo knows.
"""

from __future__ import annotations

import contextlib
import warnings
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
# A tensor of a level of torch.func that is closed, as it is outside; of an open one it is x itself.
unwrap_if_dead = torch._C._functorch.unwrap_if_dead
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
# An assertion on the device, for which the host does not wait.
assert_async = torch._assert_async
# Decorates a function that Dynamo must not trace, nor enter after a graph break.
disable_dynamo = torch._disable_dynamo


def surroundings(read: Iterable[Any], *inputs: Iterable[Any] | None) -> str:
    """What surrounds this call: a key of the table in plan.py.

    Args:
        read: the tensors, or None, whose values or sizes the call could look at.
        inputs: all that it can be differentiated by.
    """
    if torch.compiler.is_compiling():
        inside = forward_mode() or torch._C._are_functorch_transforms_active()
        return "torch.func inside torch.compile" if inside else "torch.compile"
    transformed = innermost_transform() is not None
    if forward_ad._current_level >= 0:
        carried = transformed or any(has_tangent(x) for group in inputs for x in group or ())
        return "forward mode" if carried else "forward mode of other tensors"
    if transformed:
        return "torch.func"
    if _is_tracing():
        return "torch.jit.trace"
    if _dispatch_modes() > 0:
        return "a dispatch mode or subclass"
    for x in read:  # quicker than all(): every call comes this way
        if type(x) not in _PLAIN:
            return "a dispatch mode or subclass"
    return "nothing"


def forward_mode() -> bool:
    """Whether a level of forward-mode derivatives is open, for which torch has no public name."""
    return forward_ad._current_level >= 0


def has_tangent(x: Any) -> bool:
    """Whether forward mode differentiates by x, where it is open and no ``torch.func`` hides it."""
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def writes(x: Tensor) -> int | None:
    """How often x or a view of its memory was written to in place; None where torch does not count."""
    return None if x.is_inference() else x._version


def tracing() -> bool:
    """Whether ``torch.jit.trace`` writes the call down."""
    return not torch.compiler.is_compiling() and _is_tracing()


def transformed() -> bool:
    """Whether ``torch.func`` is at work, outside of what is compiled."""
    return not torch.compiler.is_compiling() and innermost_transform() is not None


def bypasses_dispatcher(args: Iterable[Any]) -> bool:
    """True if an op may bypass the dispatcher: no mode, compiler or tracer is active, no tensor is of a
    subclass. The dispatcher costs the host more time than a GPU takes for a single step.
    """
    return (
        not torch.compiler.is_compiling()
        and _dispatch_modes() == 0
        and not _is_tracing()
        and innermost_transform() is None
        and all([type(x) in _PLAIN or not isinstance(x, Tensor) for x in args])
    )


_PLAIN = frozenset((Tensor, Parameter, type(None)))
# torch's own modules say nothing when a check compares traced sizes, which is all that these do.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module="gatematch")


@contextlib.contextmanager
def autograd_inside_op() -> Iterator[None]:
    """Autograd records inside of a custom op, where the dispatcher leaves it out."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded - torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
