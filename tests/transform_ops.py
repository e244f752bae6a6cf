"""The ops that every transform is tried on, each beside the same in plain torch: the rows of the tables."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import nn
from torch.func import functional_call

from gatematch.attention import (
    ABCNN,
    AttentionFeatures,
    attention_pool,
    modules,
    pairwise_attend,
    pairwise_attention,
    pairwise_sums,
    pooling,
)
from gatematch.attention import reference as exact
from gatematch.lstm import LSTM, LSTMCell, lstm, lstm_cell
from gatematch.lstm.reference import lstm_cell_reference, lstm_reference


@dataclass(frozen=True)
class Op:
    """A row of the tables.

    Attributes:
        function: of the inputs and then the lengths, to one tensor or a tree of them.
        reference: the same in plain torch.
        shapes: those of the inputs.
        weights: how many of the last inputs are weights; for an op without any, what stands in for them.
        lengths: for each tensor of lengths those of its rows.
        open: for the first inputs the dimensions that an exported program keeps open.
        low: the dtypes of the results under bfloat16's autocast; empty: those of the inputs.
        equal: whether a row of the second input is to equal one of the first.
        scale: that of random weights; larger ones would saturate what follows.
        module: whose parameters the weights are, by these names, and `arguments` what it is called with.
    """

    function: Callable
    reference: Callable
    shapes: list[tuple[int, ...]]
    weights: int
    lengths: tuple[list[int], ...] = ()
    open: tuple[tuple[int, ...], ...] = ()
    low: tuple[torch.dtype, ...] = ()
    equal: bool = False
    scale: float = 1.0
    module: nn.Module | None = None
    names: tuple[str, ...] = ()
    arguments: Callable = lambda *given: given

    @property
    def data(self) -> int:
        return len(self.shapes) - self.weights


def of_module(module: nn.Module, reference: Callable, data: list, arguments=Op.arguments, **others) -> Op:
    """The op that a module is, its parameters as further inputs."""
    names, weights = zip(*module.named_parameters(), strict=True)

    def function(*given):
        inputs, params, lengths = split(given, len(data), len(names))
        return functional_call(module, dict(zip(names, params, strict=True)), arguments(*inputs, *lengths))

    shapes = [*data, *(tuple(weight.shape) for weight in weights)]
    others |= {"module": module, "names": names, "arguments": arguments}
    return Op(function, reference, shapes, len(names), **others)


def split(given, *sizes):
    """The first so many, the next so many, and the rest."""
    parts, start = [], 0
    for size in sizes:
        parts.append(given[start : start + size])
        start += size
    return *parts, given[start:]


T, B, I, H, P = 3, 2, 2, 2, 1
Q, A, D, V = 3, 4, 3, 2
LONGEST = A + 1
LENGTHS = ([3, 2], [2, 4])
OPEN = ((0, 1), (0, 1))


def lstm_op(impl: str, as_module: bool, cells: bool = False, lengths: tuple = (), **options) -> Op:
    model = LSTM(I, H, impl=impl, **options)
    names = [name for name, _ in model.named_parameters()]
    N = model.num_layers * (1 + model.bidirectional)
    data = [(T, B, I), (N, B, model.proj_size or H), (N, B, H)]

    def called(function):
        def call(*given):
            (x, h, c), weights, lengths = split(given, 3, len(names))
            return function(x, dict(zip(names, weights, strict=True)), (h, c), *lengths)

        return call

    def reference(x, params, hx, lengths=None):
        return lstm_reference(x, params, hx, lengths=lengths)[: 2 + cells]

    def function(x, params, hx, lengths=None):
        return lstm(x, params, hx, lengths=lengths, return_cells=cells, impl=impl)

    # torch's own loop, in use for lengths and projections, has only the products in autocast's dtype.
    low = (torch.bfloat16, torch.bfloat16, torch.float32 if lengths else torch.bfloat16)
    others = {"lengths": lengths, "open": ((0, 1), (1,), (1,)), "low": low + low[:1] * cells}
    if as_module:
        return of_module(model, called(reference), data, lambda x, h, c, *n: (x, (h, c), *n), **others)
    shapes = [*data, *(tuple(weight.shape) for weight in model.parameters())]
    return Op(called(function), called(reference), shapes, len(names), **others)


def cell_op(impl: str, as_module: bool) -> Op:
    cell = LSTMCell(I, H, impl=impl)
    data = [(B, I), (B, H), (B, H)]

    def reference(x, h, c, *weights):
        return lstm_cell_reference(x, (h, c), *weights)

    def function(x, h, c, *weights):
        return lstm_cell(x, (h, c), *weights, impl=impl)

    others = {"open": ((0,), (0,), (0,)), "low": (torch.float32,) * 2}
    if as_module:
        return of_module(cell, reference, data, lambda x, h, c: (x, (h, c)), **others)
    return Op(function, reference, [*data, *(tuple(w.shape) for w in cell.parameters())], 4, **others)


def features_reference(q, a, weight_q, weight_a, *lengths):
    S = exact.pairwise_attention_reference(q, a, *lengths)
    return S @ weight_q[:, : a.shape[1]].mT, S.mT @ weight_a[:, : q.shape[1]].mT


def pool_reference(q, a, q_lengths, a_lengths):
    """Windows of two rows."""
    sums = exact.pairwise_sums_reference(q, a, q_lengths, a_lengths)
    pooled = []
    for rows, weights, lengths in zip((q, a), sums, (q_lengths, a_lengths), strict=True):
        weighted = rows * weights[..., None]
        whole = torch.arange(2, rows.shape[1] + 1) <= lengths[:, None]
        pooled.append(torch.where(whole[..., None], weighted[:, :-1] + weighted[:, 1:], 0))
    return tuple(pooled)


def abcnn_op() -> Op:
    model = ABCNN(D, length=LONGEST, channels=4, width=2, blocks=2, kind="abcnn3")
    names = [name for name, _ in model.named_parameters()]

    def sums(q, a, q_lengths, a_lengths, **_):
        return exact.pairwise_sums_reference(q, a, q_lengths, a_lengths)

    def reference(*given):
        data, weights, lengths = split(given, 2, len(names))
        plain = exact.pairwise_attention_reference
        with (
            mock.patch.object(modules, "pairwise_attention", plain),
            mock.patch.object(pooling, "pairwise_sums", sums),
        ):
            return functional_call(model, dict(zip(names, weights, strict=True)), (*data, *lengths))

    shared = {"lengths": LENGTHS, "open": OPEN, "equal": True}
    return of_module(model, reference, [(B, Q, D), (B, A, D)], scale=0.5, **shared)


def ops(impl: str) -> dict[str, Op]:
    """Every row, computed by this path; modules that leave no choice only by "auto"."""

    def attend(normalize, *given):
        q, a, v, q_lengths, a_lengths = given
        return pairwise_attend(q, a, v, normalize, q_lengths=q_lengths, a_lengths=a_lengths, impl=impl)

    def attend_reference(normalize, *given):
        return exact.pairwise_attend_reference(*given, normalize)

    def pairwise(function, reference, lengths=LENGTHS, shapes=((B, Q, D), (B, A, D))):
        return Op(function, reference, list(shapes), 1, lengths, ((0, 1),) * len(shapes), equal=True)

    attention = partial(pairwise_attention, impl=impl), exact.pairwise_attention_reference
    sums = partial(pairwise_sums, impl=impl), exact.pairwise_sums_reference
    pool = lambda q, a, *n: attention_pool(q, a, 2, *n, impl=impl), pool_reference
    triple = ((B, Q, D), (B, A, D), (B, A, V))
    two_layers = {"num_layers": 2, "bidirectional": True, "proj_size": P}
    rows = {
        "`LSTM`": lstm_op(impl, True),
        "`LSTM`, 2 layers, both directions, projection, lengths": lstm_op(
            impl, True, lengths=([3, 2],), **two_layers
        ),
        "`lstm`, `return_cells`": lstm_op(impl, False, cells=True),
        "`LSTMCell`": cell_op(impl, True),
        "`lstm_cell`": cell_op(impl, False),
        "`pairwise_attention`": pairwise(*attention, ()),
        "`pairwise_attention`, lengths": pairwise(*attention),
        "`pairwise_attend`, lengths": pairwise(
            partial(attend, None), partial(attend_reference, None), shapes=triple
        ),
        '`pairwise_attend`, `"rows"`, lengths': pairwise(
            partial(attend, "rows"), partial(attend_reference, "rows"), shapes=triple
        ),
        "`pairwise_sums`": pairwise(*sums, ()),
        "`pairwise_sums`, lengths": pairwise(*sums),
        "`attention_pool`, lengths": pairwise(*pool),
    }
    if impl == "auto":
        features = AttentionFeatures(2, length=LONGEST)
        rows["`AttentionFeatures`, lengths"] = of_module(
            features,
            features_reference,
            [(B, Q, D), (B, A, D)],
            lengths=LENGTHS,
            open=OPEN,
            low=(torch.bfloat16,) * 2,
            equal=True,
        )
        rows["`ABCNN`, lengths"] = abcnn_op()
    return rows
