"""What `gatematch-bench speed` is about: a case, and the problem that it becomes on a device."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., Tensor]
MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One row of the table; shape letters as everywhere: T B I H P L, and B Q A D V.

    precision: of float32 products in an LSTM, "ieee" or "tf32".
    timings: how it is timed on a GPU, see timing.py; on a CPU there is one way.
    """

    name: str
    shape: dict[str, int]
    data: str = "random"
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "ieee"
    timings: tuple[str, ...] = ("warm",)

    @property
    def numbers(self) -> str:
        """The dtype by name, and "tf32" for float32 with such products."""
        return "tf32" if self.precision == "tf32" else str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        """What --filter is matched with."""
        sizes = [f"{letter}{size}" for letter, size in self.shape.items()]
        return " ".join([self.name, self.data, self.numbers, *sizes])


@dataclass(frozen=True)
class Part:
    """Some rows of some batches of (B, Q, ...): what is compared with float64 where all would be too much.

    The first and the last of both are always among them: that is where a wrong offset shows. Of an LSTM they
    are all steps of some rows of the batch.
    """

    batches: Tensor
    rows: Tensor

    @classmethod
    def of(cls, B: int, Q: int, most: int, device: torch.device) -> Part:
        """Up to `most` rows in all, whole batches if one fits."""
        batches = min(B, max(most // Q, 2))
        rows = min(Q, max(most // batches, 1))

        def spread(size: int, number: int) -> Tensor:
            return torch.linspace(0, size - 1, number, device=device, dtype=torch.float64).round().long()

        return cls(spread(B, batches), spread(Q, rows))

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor[self.batches][:, self.rows]

    def alone(self, tensor: Tensor) -> Tensor:
        """The tensor with zeros outside of the part."""
        at = self.batches[:, None], self.rows
        return torch.zeros_like(tensor).index_put(at, tensor[at])


@dataclass(frozen=True)
class Work:
    """The least that an operation has to do: each input read and each output written once."""

    bytes: float
    flops: float
    product: str  # whose rate the products have: bfloat16, float16, tf32 or float32
    specials: float = 0.0  # square roots and reciprocals


@dataclass
class Problem:
    """Functions without arguments that give the output, each with what it depends on, in one order."""

    ours: Function
    ours_wrt: list[Tensor]
    peers: dict[str, tuple[Function, list[Tensor]]]
    exact: Function
    exact_wrt: list[Tensor]
    # Largest error allowed in the output: ours, and a peer's before it counts as wrong.
    bound: float
    peer_bound: float
    relative: bool
    # What `exact` computes of the output, and for each gradient; None for all of it.
    part: Part | None = None
    wrt_parts: tuple[Callable[[Tensor], Tensor], ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    # Ours on random rows of the same shape, for data that could be slower.
    random: tuple[Function, list[Tensor]] | None = None
    # For each mode.
    work: dict[str, Work] = field(default_factory=dict)
    # Peers that keep more in training than a pass without gradients needs.
    modules: tuple[nn.Module, ...] = ()


# Peers that torch.compile makes.
COMPILED = "compiled expansion", "compiled loop", "FlexAttention"


def has_compiler() -> bool:
    """Whether torch.compile can work: it needs a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))
