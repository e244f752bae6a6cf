"""What every siamese model starts from, and the matcher: one embedding and one bidirectional LSTM read both
sides, pairwise attention compares them word by word, and a few similarities are weighed into a score.

    e      = mean of a token's spelling rows, with dropout         (question and answer alike)
    h      = bidirectional LSTM over e
    S      = pairwise(e_q, e_a)                                    which word resembles which
    F      = attention features of (h_q, h_a)                      ABCNN-1's second channel
    z      = tanh(W [h; F] + b), maximum over the words
    score  = v · [S's best matches of q's words, of a's words, cos(e), cos(h), mlp(z_q, z_a)]

where means over words are weighted by idf. The LSTM and the two pairwise pieces are handed in, so that ours
and torch's run in the very same model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gatematch.attention import AttentionFeatures, pairwise_attention
from gatematch.lstm import LSTM

from .batches import Batch
from .text import MAX_LENGTH, PAD, UNKNOWN

Pairwise = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What a training run depends on, besides its data: that of every model."""

    model: str
    seed: int = 0
    embedding: int = 64
    dropout: float = 0.3
    forget_words: float = 0.5  # share of words spelled as unknown in a training batch
    wrong: int = 7  # wrong answers beside a right one
    batch: int = 16  # questions
    learning_rate: float = 3e-3

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class MatcherSettings(Settings):
    """Those of the LSTM matcher."""

    model: str = "lstm"
    hidden: int = 32
    features: int = 16


class PackedLSTM(nn.LSTM):
    """torch's LSTM called like ours: lengths go in by packing and come out by unpacking."""

    def forward(  # type: ignore[override]
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        assert lengths is not None
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        y, state = super().forward(packed, hx)
        return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0], state


def torch_pairwise(q: Tensor, a: Tensor, q_lengths: Tensor, a_lengths: Tensor) -> Tensor:
    """The attention as one writes it with torch alone, in cdist's default mode."""
    S = 1 / (1 + torch.cdist(q, a))
    return S * (mask(q_lengths, q.shape[1])[:, :, None] & mask(a_lengths, a.shape[1])[:, None, :])


class TorchAttentionFeatures(AttentionFeatures):
    """The same parameters as ours, over torch's pairwise attention."""

    def forward(
        self, q: Tensor, a: Tensor, q_lengths: Any = None, a_lengths: Any = None
    ) -> tuple[Tensor, Tensor]:
        assert q_lengths is not None and a_lengths is not None
        S = torch_pairwise(q, a, q_lengths, a_lengths)
        return S @ self.weight_q[:, : a.shape[1]].mT, S.mT @ self.weight_a[:, : q.shape[1]].mT


class Siamese(nn.Module):
    """The word vectors of both sides: a token's is the mean of its spelling rows, with dropout.

    Args:
        rows: embedding rows that spellings refer to.
        settings: sizes and dropout.
        pairwise: (q, a, q_lengths, a_lengths) -> S.

    A subclass is called with a batch and returns one score for every answer of it, (answers,).
    """

    def __init__(self, rows: int, settings: Settings, pairwise: Pairwise = pairwise_attention) -> None:
        super().__init__()
        self.forget_words = settings.forget_words
        self.embedding = nn.Embedding(rows, settings.embedding, padding_idx=PAD)
        # Half of the usual spread: at D = 64, strangers then score about 0.15 and equals 1.
        nn.init.normal_(self.embedding.weight, std=0.5)
        with torch.no_grad():
            self.embedding.weight[PAD].zero_()
        self.dropout = nn.Dropout(settings.dropout)
        self.pairwise = pairwise

    def word_attention(self, batch: Batch) -> Tensor:
        """S between the words of each answer and of its question, (answers, Q, A)."""
        e_q, e_a = self._embed(batch)
        pair = batch.question_of
        return self.pairwise(e_q[pair], e_a, batch.questions.lengths[pair], batch.answers.lengths)

    def _embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        spellings = batch.spellings
        if self.training:
            # A word that is forgotten now and then teaches its n-grams to stand in for it.
            forgotten = torch.rand(len(spellings), device=spellings.device) < self.forget_words
            first = torch.where(forgotten, UNKNOWN, spellings[:, 0])
            spellings = torch.cat([first[:, None], spellings[:, 1:]], 1)
        # The root keeps the spread of a sum of independent rows at that of one row.
        tokens = self.embedding(spellings).sum(1) / (spellings != PAD).sum(1, keepdim=True).sqrt()
        return (
            self.dropout(F.embedding(batch.questions.tokens, tokens)),
            self.dropout(F.embedding(batch.answers.tokens, tokens)),
        )


class Matcher(Siamese):
    """Scores candidate answers; see the equations above.

    Args:
        rows: embedding rows that spellings refer to.
        settings: sizes and dropout.
        lstm: the class of the encoder, with torch.nn.LSTM's constructor and a call with `lengths`.
        pairwise: (q, a, q_lengths, a_lengths) -> S.
        attention_features: the class of the second channel, with AttentionFeatures' constructor and call.
    """

    def __init__(
        self,
        rows: int,
        settings: MatcherSettings,
        lstm: type[nn.Module] = LSTM,
        pairwise: Pairwise = pairwise_attention,
        attention_features: type[nn.Module] = AttentionFeatures,
    ) -> None:
        super().__init__(rows, settings, pairwise)
        hidden = settings.hidden
        self.lstm = lstm(settings.embedding, hidden, batch_first=True, bidirectional=True)
        self.attention_features = attention_features(settings.features, length=MAX_LENGTH)
        self.mix = nn.Linear(2 * hidden + settings.features, hidden)
        self.compare = nn.Sequential(
            nn.Linear(4 * hidden, hidden), nn.Tanh(), nn.Dropout(settings.dropout), nn.Linear(hidden, 1)
        )
        self.score = nn.Linear(5, 1, bias=False)  # a bias would shift all candidates alike
        # Start from the similarities: what the MLP learns by heart from few pairs then weighs less.
        with torch.no_grad():
            self.score.weight.copy_(torch.tensor([[5.0, 5.0, 5.0, 5.0, 1.0]]))

    def forward(self, batch: Batch) -> Tensor:
        """One score for every answer of the batch, (answers,)."""
        e_q, e_a = self._embed(batch)
        h_q, _ = self.lstm(e_q, lengths=batch.questions.lengths)
        h_a, _ = self.lstm(e_a, lengths=batch.answers.lengths)
        # From here on one row is one pair: a question is repeated for each of its candidates.
        pair = batch.question_of
        e_q, h_q = e_q[pair], h_q[pair]
        lengths = batch.questions.lengths[pair], batch.answers.lengths
        w_q, w_a = batch.questions.weights[pair], batch.answers.weights

        S = self.pairwise(e_q, e_a, *lengths)
        F_q, F_a = self.attention_features(h_q, h_a, *lengths)
        z_q, z_a = self._channels(h_q, F_q, lengths[0]), self._channels(h_a, F_a, lengths[1])
        compared = torch.cat([z_q * z_a, (z_q - z_a).abs(), z_q, z_a], 1)
        similarities = [
            _mean(S.amax(2), w_q),
            _mean(S.amax(1), w_a),
            F.cosine_similarity(_mean(e_q, w_q), _mean(e_a, w_a)),
            F.cosine_similarity(_mean(h_q, w_q), _mean(h_a, w_a)),
            self.compare(self.dropout(compared))[:, 0],
        ]
        return self.score(torch.stack(similarities, 1))[:, 0]

    def _channels(self, h: Tensor, features: Tensor, lengths: Tensor) -> Tensor:
        """[h; F] mixed, and the maximum over the words of a text."""
        z = torch.tanh(self.mix(torch.cat([h, features], 2)))
        # Not amax: over a tanh its gradient is NaN by torch.compile's default backend (torch 2.13).
        return z.masked_fill(~mask(lengths, z.shape[1])[:, :, None], -1.0).max(1).values


def mask(lengths: Tensor, size: int) -> Tensor:
    """Boolean (N, size): which rows lie within the lengths."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean over dim 1 of (N, T) or (N, T, D) with weights (N, T), which are 0 past the length."""
    shares = weights / weights.sum(1, keepdim=True).clamp(min=1e-6)
    return (values * shares.view(*shares.shape, *[1] * (values.dim() - 2))).sum(1)


def ours(rows: int, settings: MatcherSettings) -> Matcher:
    """The matcher on gatematch's LSTM and pairwise attention."""
    return Matcher(rows, settings)


def peer(rows: int, settings: MatcherSettings) -> Matcher:
    """The matcher on torch's packed LSTM and cdist."""
    return Matcher(rows, settings, PackedLSTM, torch_pairwise, TorchAttentionFeatures)
