"""The Hessian as a matrix, and its product with one vector."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor

from gatematch.checks import check_alike, check_bool, check_int, check_shape, check_tensor

from .derivatives import LossFn, check_loss_fn, gradient, product, pull_back, warn_if_constant
from .parameters import Parameters, Params

ROWS = 32  # at once; more gain little for small models and lose cache for large ones
T = TypeVar("T")


@overload
def hessian(
    loss_fn: LossFn,
    params: Params,
    *,
    block_diagonal: Literal[False] = False,
    chunk_size: int | None = None,
    progress: bool = False,
) -> Tensor: ...


@overload
def hessian(
    loss_fn: LossFn,
    params: Params,
    *,
    block_diagonal: Literal[True],
    chunk_size: int | None = None,
    progress: bool = False,
) -> dict[str, Tensor]: ...


def hessian(
    loss_fn: LossFn,
    params: Params,
    *,
    block_diagonal: bool = False,
    chunk_size: int | None = None,
    progress: bool = False,
) -> Tensor | dict[str, Tensor]:
    """The Hessian of a loss over tensors of any shapes, as one symmetric matrix.

    ```python
    w, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    x = torch.randn(20, 3)
    H = hessian(lambda: torch.tanh(x @ w + b).square().mean(), [w, b])     # (16, 16)
    ```

    Args:
        loss_fn: takes no argument, reads the parameters where they live, as an optimiser's closure does, and
            returns a scalar tensor. It is called once, with gradients on whatever the caller's mode, and
            must be twice differentiable by torch.
        params: a module (those of its parameters that require gradients), a mapping from names, or an
            iterable of tensors that require gradients; all on one device, of any real floating dtypes,
            shapes and strides. `parameter_index` says which rows are whose.
        block_diagonal: only each parameter's second derivatives by itself: a dict name -> (p, p) matrix,
            p its number of elements.
        chunk_size: how many rows are computed at once, in as many times the memory of one backward pass;
            1 computes row by row. None is 32, which is faster than row by row for small models, whose time
            goes into calls, and slower for large batches of data. A loss with an operation that torch cannot
            batch is computed row by row.
        progress: show a bar, which needs the package rich.

    Returns:
        H, (P, P) in the promoted dtype of the parameters, on their device, out of the graph, or the dict of
        blocks. H is the average of what is computed and its transpose, so symmetric to the bit. Rows of
        parameters that the loss does not use, or that it is linear in, are zero; so is all of H if the loss
        depends on none of them, and a UserWarning says so. A loss that is NaN gives NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device, shape or value, by name; a loss
            that is no real scalar; a view or copy of a parameter that the loss does not read.
        MemoryError: the matrix, and a second one for the average, would take more memory than there is; the
            loss has not been called then. `HessianOperator` needs no matrix.
        RuntimeError: torch has no second derivative for an operation.
    """
    check_loss_fn(loss_fn)
    check_bool("block_diagonal", block_diagonal)
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, 1)
    check_bool("progress", progress)
    track = _tracker() if progress else iter
    parameters = Parameters(params)
    _check_memory(parameters, block_diagonal)
    gradients = gradient(loss_fn, parameters)
    warn_if_constant(gradients)
    if block_diagonal:
        parts = [([g], [tensor]) for g, tensor in zip(gradients, parameters.tensors, strict=True)]
    else:
        parts = [(gradients, parameters.tensors)]
    blocks = [_Block(*part, parameters.dtype) for part in parts]
    chunk = chunk_size or ROWS
    spans = [(block, start) for block in blocks for start in range(0, len(block.matrix), chunk)]
    for block, start in track(spans):
        block.fill(start, min(start + chunk, len(block.matrix)))
    matrices = [(block.matrix + block.matrix.T).div_(2) for block in blocks]
    return dict(zip(parameters.index, matrices, strict=True)) if block_diagonal else matrices[0]


def hvp(loss_fn: LossFn, params: Params, vector: Tensor) -> Tensor:
    """The product of the Hessian with one vector, in O(P) memory beside one graph of the loss's gradient.

    Args:
        loss_fn: as for `hessian`. `HessianOperator` serves many products without calling it again.
        params: as for `hessian`.
        vector: (P,) in the promoted dtype of the parameters, on their device.

    Returns:
        H v, (P,), dtype and device of the vector, out of the graph.

    Raises:
        TypeError, ValueError, RuntimeError: as `hessian`.
    """
    check_loss_fn(loss_fn)
    parameters = Parameters(params)
    check_tensor("vector", vector)
    check_shape("vector", vector, (parameters.size,))
    check_alike("vector", vector, "params", parameters)
    gradients = gradient(loss_fn, parameters)
    warn_if_constant(gradients)
    return product(gradients, parameters, vector.detach())


def _check_memory(parameters: Parameters, block_diagonal: bool) -> None:
    """Raise MemoryError unless the matrix, or all blocks, and as much for the average can be allocated."""
    sizes = [tensor.numel() for tensor in parameters.tensors] if block_diagonal else [parameters.size]
    needed = 2 * sum(size * size for size in sizes) * parameters.dtype.itemsize
    available = _available(parameters.device)
    if available is not None and needed > available:
        raise MemoryError(
            f"params: expected a Hessian that fits twice into {available / 1e9:.3g} GB of memory, got "
            f"{parameters.size} elements and {needed / 1e9:.3g} GB; HessianOperator needs no matrix"
        )


def _available(device: torch.device, root: Path = Path("/")) -> int | None:
    """How many bytes can still be allocated on a device; None where that is not known.

    On Linux what the kernel can give without ending a process, cached files included, and no more than a
    container's limit.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
        available = sizes["MemAvailable"] + sizes["SwapFree"]
    except (OSError, LookupError, ValueError):
        return None
    try:
        return min(available, int((root / "sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return available


class _Block:
    """The matrix of second derivatives by some of the parameters, filled row by row or in chunks of rows."""

    def __init__(
        self, gradients: Sequence[Tensor | None], tensors: Sequence[Tensor], dtype: torch.dtype
    ) -> None:
        self.gradients, self.tensors = gradients, tensors
        bounds = [0, *accumulate(tensor.numel() for tensor in tensors)]
        self.columns = [slice(*pair) for pair in pairwise(bounds)]
        self.matrix = torch.zeros(bounds[-1], bounds[-1], dtype=dtype, device=tensors[0].device)
        self.batches = True

    def fill(self, start: int, stop: int) -> None:
        if self.batches and stop - start > 1:
            try:
                self._fill(start, stop, batched=True)
                return
            except Exception:  # no batching rule, or no memory; if it is anything else, a single row says so
                self.batches = False
        for row in range(start, stop):
            self._fill(row, row + 1, batched=False)

    def _fill(self, start: int, stop: int, batched: bool) -> None:
        # Only the gradients that have rows here: torch then skips the graph of the others.
        gradients, units = [], []
        for g, tensor, own in zip(self.gradients, self.tensors, self.columns, strict=True):
            if g is not None and own.start < stop and start < own.stop:
                unit = g.new_zeros(stop - start, tensor.numel())
                unit.diagonal(start - own.start).fill_(1)
                gradients.append(g)
                units.append(unit.view(-1, *tensor.shape) if batched else unit.view(tensor.shape))
        found = pull_back(gradients, units, self.tensors, batched)
        for second, columns in zip(found, self.columns, strict=True):
            if second is not None:
                self.matrix[start:stop, columns] = second.reshape(stop - start, -1)


def _tracker() -> Callable[[list[T]], Iterable[T]]:
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError as error:
        raise ImportError('progress needs rich: pip install "gatematch[bench]"') from error
    return partial(track, description="Hessian", console=Console(stderr=True))
