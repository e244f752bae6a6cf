"""How each kernel is launched, for the report of what it compiles to and for choosing its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gatematch.kernels import (
    config,
    lstm_persistent,
    lstm_resident,
    lstm_step,
    pairwise,
    pairwise_bwd,
    pairwise_stream,
)
from gatematch.kernels.config import Config
from gatematch.kernels.pairwise_parts import parts_of
from gatematch.kernels.pairwise_prepare import Side, prepare
from gatematch.kernels.pairwise_split import parts_for, split_rows
from gatematch.kernels.pairwise_stream_bwd import Upstream, stream_gradient

from .results import matches


@dataclass(frozen=True)
class Sample:
    """Inputs of a launcher: sizes by the letters of the kernel's entries, but for those of features."""

    dtype: torch.dtype
    shape: Mapping[str, int]
    features: int = 0
    value_features: int = 0
    batch: int = 1
    device: str = "cpu"
    training: bool = True
    with_lengths: bool = True
    precision: str = "float32"
    steps: int = 4

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, device=self.device).to(self.dtype)

    @cached_property
    def vocabulary(self) -> Tensor:
        """What rows are drawn from: 1 of 64 pairs is of the same, as in text with words in common."""
        return self.normal(64, self.features)

    def rows(self, letter: str) -> Tensor:
        """Every other one a little beside its word: near, but not equal, so that it has a gradient."""
        rows = self.vocabulary[torch.randint(64, (self.batch, self.shape[letter]), device=self.device)]
        rows[:, ::2] += 0.05 * self.normal(self.batch, -(-self.shape[letter] // 2), self.features)
        return rows

    def values(self, letter: str) -> Tensor:
        return self.normal(self.batch, self.shape[letter], self.value_features)

    def numbers(self, letter: str) -> Tensor:
        """A float32 number for each row."""
        return torch.rand(self.batch, self.shape[letter], device=self.device)

    def lengths(self, letter: str) -> Tensor | None:
        if not self.with_lengths:
            return None
        return mixed(self.shape[letter], self.batch, self.device)


def mixed(most: int, number: int, device: str) -> Tensor:
    """Lengths from all down to none: the first is full, so that one row is all that a launch is timed for."""
    return most - torch.arange(number, device=device) * (most + 1) // max(number, 1)


_LARGE_BATCH = 64


def samples(kernel: str, dtype: torch.dtype, shape: Mapping[str, int]) -> Iterator[Sample]:
    """Inputs that between them reach every branch which a kernel decides at compile time."""
    if "H" in shape:
        yield Sample(dtype, shape)
        yield Sample(dtype, shape, training=False, with_lengths=False)
        # Rows that start at no multiple of 16 bytes, but for kernels that are given only such.
        less = 1 if kernel.startswith("lstm_step") else 16
        yield Sample(dtype, {**shape, "H": max(shape["H"] - less, 16)})
        if dtype == torch.float32:
            yield Sample(dtype, shape, precision="tf32")
        return
    D, V = shape["D"], shape.get("V", 0)
    yield Sample(dtype, shape, D, V)
    yield Sample(dtype, shape, D, V, training=False, with_lengths=False)
    yield Sample(dtype, shape, D + 1, V + 1)  # rows that start at no multiple of 16 bytes
    yield Sample(dtype, shape, 7, V)  # few features: no product of q and a
    if dtype == torch.float32:
        yield Sample(dtype, shape, D, V, precision="tf32")
    if kernel == "pairwise_stream_fwd":
        # Enough programs without splitting a row's columns among several: O is stored as it is returned.
        yield Sample(dtype, shape, D, V, batch=_LARGE_BATCH)
        yield Sample(dtype, shape, D, V, batch=_LARGE_BATCH, training=False, with_lengths=False)


Launch = Callable[[], tuple[Tensor | None, ...]]


def _pairwise_fwd(sample: Sample) -> Launch:
    q, a = sample.rows("Q"), sample.rows("A")
    lengths = sample.lengths("Q"), sample.lengths("A")
    return lambda: pairwise.attention_forward(
        q, a, *lengths, precision=sample.precision, save=sample.training
    )[:1]


def _pairwise_parts(sample: Sample) -> Launch:
    x, lengths = sample.rows("M"), sample.lengths("M")
    number = 2 if (sample.dtype, sample.precision) == (torch.float32, "float32") else 1
    return lambda: parts_of(x, x.clone(), lengths, lengths, number=number)[1][2:]


def _pairwise_bwd(sample: Sample) -> Launch:
    q, a, precision = sample.rows("Q"), sample.rows("A"), sample.precision
    ends = sample.lengths("Q"), sample.lengths("A")
    S, W, centre = pairwise.attention_forward(q, a, *ends, save=True)
    assert W is not None
    g = torch.randn_like(S)
    wanted = True, sample.training
    return lambda: pairwise_bwd.attention_gradients(
        q, a, W, centre, g, *ends, wanted=wanted, precision=precision
    )


def _pairwise_bwd_short(sample: Sample) -> Launch:
    short = {letter: min(sample.shape[letter], pairwise_bwd.SHORT) for letter in "QA"}
    return _pairwise_bwd(replace(sample, shape={**sample.shape, **short}))


def _pairwise_split(sample: Sample) -> Launch:
    x, lengths = sample.rows("M"), sample.lengths("M")
    centre = torch.randn(sample.batch, sample.features, device=sample.device)
    number = parts_for(sample.dtype, sample.precision)
    # Of the first sequence, which is full: past a length nothing is stored, and to mask that would be timed.
    return lambda: (split_rows(x, lengths, centre, number)[:1],)


def _sides(sample: Sample) -> tuple[Side, Side]:
    x, y = sample.rows("M"), sample.rows("N")
    return prepare(x, y, sample.lengths("M"), sample.lengths("N"), sample.precision)


def _pairwise_prepare(sample: Sample) -> Launch:
    x, lengths = sample.rows("M"), sample.lengths("M")

    def launch() -> tuple[Tensor | None, ...]:
        side, _ = prepare(x, x, lengths, lengths, sample.precision)
        return side.copy, side.squares[..., : x.shape[1]][:1]  # past a length they are infinite

    return launch


def _pairwise_stream_fwd(sample: Sample) -> Launch:
    x, y = _sides(sample)
    v = sample.values("N")
    return lambda: pairwise_stream.attend_forward(
        x, y, v, normalize=not sample.training, precision=sample.precision
    )


def _pairwise_stream_sums(sample: Sample) -> Launch:
    x, y = _sides(sample)
    return lambda: pairwise_stream.sums_forward(x, y, precision=sample.precision)


def _pairwise_stream_bwd(sample: Sample) -> Launch:
    x, y = _sides(sample)
    u, v, of_x, of_y = sample.values("M"), sample.values("N"), sample.numbers("M"), sample.numbers("N")
    if sample.training:
        upstream = [(Upstream(u), Upstream(v))]
    else:  # of normalised rows, on either side, and of the sums
        upstream = [
            (Upstream(u, of_x, of_x), Upstream(v)),
            (Upstream(u), Upstream(v, of_y, of_y)),
            (Upstream(shift=of_x), Upstream(shift=of_y)),
        ]
    return lambda: tuple(stream_gradient(x, y, *sides, precision=sample.precision) for sides in upstream)


@dataclass(frozen=True)
class _Sequence:
    """Inputs of a recurrent kernel: a few steps in both directions."""

    z: Tensor
    weights: list[Tensor]
    h_0: Tensor
    c_0: Tensor
    lengths: Tensor | None

    @classmethod
    def of(cls, sample: Sample) -> _Sequence:
        N, T, B, H = 2, sample.steps, sample.shape["B"], sample.shape["H"]
        weights = [sample.normal(4 * H, H) / H**0.5 for _ in range(N)]
        states = sample.normal(N, B, H), sample.normal(N, B, H)
        lengths = mixed(T, B, sample.device) if sample.with_lengths else None
        return cls(sample.normal(N, T, B, 4 * H), weights, *states, lengths)


def _forward_of(kernels: ModuleType) -> Callable[[Sample], Launch]:
    def launch(sample: Sample) -> Launch:
        x = _Sequence.of(sample)
        options = {"precision": sample.precision, "save": sample.training}
        # What is saved is stored over z.
        return lambda: kernels.forward(x.z.clone(), x.weights, x.h_0, x.c_0, x.lengths, **options)

    return launch


def _backward_of(kernels: ModuleType) -> Callable[[Sample], Launch]:
    def launch(sample: Sample) -> Launch:
        x = _Sequence.of(sample)
        N, T, B, H = *x.z.shape[:3], sample.shape["H"]
        gates, cells = torch.sigmoid(x.z), torch.randn(N, T, B, H, device=sample.device)
        g_y, g_cells = sample.normal(T, B, N * H), sample.normal(N, T, B, H)
        upstream = (g_y, x.h_0, x.c_0, g_cells) if sample.training else (None, x.h_0, x.c_0, None)
        saved = gates, cells, x.weights, x.c_0, x.lengths
        return lambda: kernels.backward(*saved, *upstream, precision=sample.precision)

    return launch


def _lstm_step_fwd(sample: Sample) -> Launch:
    """A sequence, and a step of the cell; where there is nothing to train without biases, and of a layer."""
    sequence, x = _forward_of(lstm_step)(sample), _Sequence.of(sample)
    H = sample.shape["H"]
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    if sample.training:
        biases = sample.normal(4 * H), sample.normal(4 * H)
    cell = x.h_0[1], x.weights[0], x.weights[1], *biases
    options: dict[str, Any] = {"precision": sample.precision, "save": sample.training}

    def launch() -> tuple[Tensor | None, ...]:
        step = lstm_step.cell_forward(*cell, x.h_0[0], x.c_0[0], **options)
        if sample.training:
            return *sequence(), *step
        h_n = torch.empty_like(x.h_0[0])
        first = lstm_step.cell_forward(*cell, None, None, **options, h_n=h_n)
        later = lstm_step.cell_forward(*cell, x.h_0[0], x.c_0[0], **options, h_n=h_n)
        return *sequence(), *step, *first, *later, h_n

    return launch


def _lstm_step_bwd(sample: Sample) -> Launch:
    sequence, x = _backward_of(lstm_step)(sample), _Sequence.of(sample)
    gates = torch.sigmoid(x.z[0, 0])
    return lambda: (*sequence(), *lstm_step.cell_gradient(gates, x.c_0[0], x.h_0[0], x.c_0[1]))


# For each kernel what makes its inputs and returns the call that launches it, and no other kernel. A new
# kernel needs a line here and entries in kernels/configs.
LAUNCHES: dict[str, Callable[[Sample], Launch]] = {
    "pairwise_fwd": _pairwise_fwd,
    "pairwise_parts": _pairwise_parts,
    "pairwise_tiles_fwd": _pairwise_fwd,
    "pairwise_bwd": _pairwise_bwd,
    "pairwise_bwd_short": _pairwise_bwd_short,
    "pairwise_bwd_near": _pairwise_bwd,
    "pairwise_split": _pairwise_split,
    "pairwise_prepare": _pairwise_prepare,
    "pairwise_stream_fwd": _pairwise_stream_fwd,
    "pairwise_stream_sums": _pairwise_stream_sums,
    "pairwise_stream_bwd": _pairwise_stream_bwd,
    "lstm_resident_fwd": _forward_of(lstm_resident),
    "lstm_resident_bwd": _backward_of(lstm_resident),
    "lstm_persistent_fwd": _forward_of(lstm_persistent),
    "lstm_persistent_bwd": _backward_of(lstm_persistent),
    "lstm_step_fwd": _lstm_step_fwd,
    "lstm_step_bwd": _lstm_step_bwd,
}


@contextmanager
def launched_with(kernel: str, tile: Config) -> Iterator[None]:
    """One kernel is launched with this configuration, whatever is listed for it."""
    choose = config.choose

    def instead(name: str, arch: str, dtype: torch.dtype, shape: Mapping[str, int]) -> Config:
        return tile if name == kernel else choose(name, arch, dtype, shape)

    with mock.patch.object(config, "choose", instead):
        yield


@dataclass(frozen=True)
class Entry:
    """A shipped configuration."""

    kernel: str
    arch: str
    dtype: torch.dtype
    shape: Mapping[str, int]
    tile: Config

    def __str__(self) -> str:
        return f"{self.kernel}/{self.arch}/{str(self.dtype).removeprefix('torch.')}"


def served(kernel: str, arch: str, sample: Sample) -> bool:
    """Whether the kernel is ever launched so on that architecture."""
    if kernel.startswith("lstm_resident"):
        return lstm_resident.serves(sample.shape["H"], sample.dtype, sample.precision, arch)
    return True


def entries(archs: Iterable[str], pattern: str) -> list[Entry]:
    """The shipped configurations whose kernel/arch/dtype matches.

    Raises:
        ValueError: if none does, or the pattern is not one.
    """
    wanted = matches("--filter", pattern)
    listed = (
        Entry(kernel, arch, *entry)
        for kernel in LAUNCHES
        for arch in archs
        for entry in config.shipped(kernel, arch)
    )
    found = [entry for entry in listed if wanted(str(entry))]
    if not found:
        raise ValueError(f"--filter {pattern!r} matches no kernel/arch/dtype of {', '.join(LAUNCHES)}")
    return found
