"""Compiled training steps: one graph, and one more for all other lengths; results as in eager."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from gatematch.attention import (
    ABCNN,
    AttentionFeatures,
    attention_pool,
    pairwise_attend,
    pairwise_attention,
    pairwise_sums,
)
from gatematch.bench.answers.batches import Batch, Texts
from gatematch.bench.answers.model import MatcherSettings, ours
from gatematch.lstm import LSTM

torch.set_num_threads(1)
BATCHES, B, D = 20, 3, 5


def sizes(most: int = 30) -> list[tuple[int, int]]:
    """Two lengths for each batch, no number twice for one of them nor a batch size."""
    drawn = [(torch.randperm(most - B) + B + 1)[:BATCHES].tolist() for _ in range(2)]
    pairs = list(zip(*drawn, strict=True))
    # What is equal the first time a size changes is compiled as equal.
    return [(q, a) for q, a in pairs if q != a] + [(q, a) for q, a in pairs if q == a]


def lengths_to(T: int) -> torch.Tensor:
    return torch.randint(1, T + 1, (B,))


class Recurrent(nn.Module):
    def __init__(self, with_lengths: bool, **options) -> None:
        super().__init__()
        self.with_lengths = with_lengths
        self.lstm = LSTM(D, 4, **options)

    def batch(self, T: int, _: int) -> tuple:
        return torch.randn(T, B, D, requires_grad=True), lengths_to(T) if self.with_lengths else None

    def forward(self, x, lengths):
        y, (h_n, c_n) = self.lstm(x, lengths=lengths)
        return y.square().sum() + (h_n * c_n.sum()).sum()


class Pairwise(nn.Module):
    """Every pairwise op."""

    def __init__(self) -> None:
        super().__init__()
        self.features = AttentionFeatures(2, length=40)

    def batch(self, Q: int, A: int) -> tuple:
        rows = (torch.randn(B, n, D, requires_grad=True) for n in (Q, A))
        return *rows, lengths_to(Q), lengths_to(A)

    def forward(self, q, a, *lengths):
        S = pairwise_attention(q, a)
        O = pairwise_attend(q, a, a, "rows", q_lengths=lengths[0], a_lengths=lengths[1])
        several = (
            *pairwise_sums(q, a, *lengths),
            *attention_pool(q, a, 3, *lengths),
            *self.features(q, a, *lengths),
        )
        return sum(y.square().sum() for y in (S, O, *several))


class Convolutional(Pairwise):
    def __init__(self) -> None:
        super().__init__()
        self.features = ABCNN(D, length=40, channels=3)

    def forward(self, q, a, *lengths):
        return self.features(q, a, *lengths).square().sum()


class Matching(nn.Module):
    """The answer matcher, in eval mode: eager and compiled dropout draw different numbers."""

    def __init__(self) -> None:
        super().__init__()
        settings = MatcherSettings(embedding=D, hidden=4, features=2)
        self.matcher = ours(60, settings).eval()

    def batch(self, Q: int, A: int) -> tuple:
        tokens = Q + A

        def texts(rows: int, T: int) -> Texts:
            lengths = torch.randint(1, T + 1, (rows,))
            weights = torch.rand(rows, T) * (torch.arange(T) < lengths[:, None])
            return Texts(torch.randint(tokens, (rows, T)), lengths, weights)

        pair = torch.arange(B).repeat_interleave(2)
        return (Batch(torch.randint(2, 60, (tokens, 4)), texts(B, Q), texts(2 * B, A), pair),)

    def forward(self, batch):
        return torch.logsumexp(self.matcher(batch).view(B, 2), 1).sum()


MODELS = {
    "lstm": lambda: Recurrent(False),
    "lstm, 2 layers, both directions, lengths": lambda: Recurrent(True, num_layers=2, bidirectional=True),
    "lstm, projection, lengths": lambda: Recurrent(True, proj_size=2),
    "pairwise": Pairwise,
    "abcnn": Convolutional,
    "matcher": Matching,
}


def results(model: nn.Module, loss, batch: tuple) -> list[torch.Tensor]:
    wanted = [x for x in batch if isinstance(x, torch.Tensor) and x.requires_grad] + list(model.parameters())
    value = loss(*batch)
    return [value, *torch.autograd.grad(value, wanted, allow_unused=True)]


def check(model: nn.Module, backend: str, batches: int = BATCHES) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for lengths in sizes()[:batches]:
        batch = model.batch(*lengths)
        got, want = results(model, compiled, batch), results(model, model, batch)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert graphs.frame_count == 2


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_and_one_more_for_all_other_lengths(name):
    check(MODELS[name](), "aot_eager")


@pytest.mark.slow
# torch 2.13's default backend compiles any convolution for every length.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "abcnn"])
def test_with_the_default_backend(name):
    check(MODELS[name](), "inductor", batches=6)
