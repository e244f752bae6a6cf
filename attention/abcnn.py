"""ABCNN, the attention-based convolutional network for pairs of sentences, on the ops of `functional.py`."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from gatematch.checks import (
    GivenLengths,
    by_keyword,
    check_choice,
    check_dtype,
    check_int,
    check_kind,
    check_range,
    check_tensor,
)
from gatematch.plan import fx_node

from .functional import check_pair
from .modules import AttentionFeatures, check_weighted
from .pooling import all_pool, attention_weights, mean_weights, window_pool, zero_past

KINDS = ("bcnn", "abcnn1", "abcnn2", "abcnn3")
VARIANTS = ("official", "paper")


class Pair(NamedTuple):
    """The same thing of both sentences."""

    q: Tensor
    a: Tensor


class Convolution(nn.Module):
    """Wide convolution with tanh, the same for both sentences, with ABCNN-1's second channel if asked for.

    q (B, Q, D), a (B, A, D) -> (B, Q + width - 1, channels), (B, A + width - 1, channels): column t sees
    the rows t - width + 1 to t, and zeros outside of the sentence.
    """

    def __init__(
        self,
        features: int,
        channels: int,
        width: int,
        attention: AttentionFeatures | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.attention = attention
        # A filter spans all features of a channel, so two channels are one of twice as many features.
        incoming = features if attention is None else 2 * features
        self.weight = nn.Parameter(torch.empty(channels, incoming, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, q: Tensor, a: Tensor, q_lengths: Tensor | None, a_lengths: Tensor | None) -> Pair:
        check_tensor("weight", self.weight)
        check_tensor("bias", self.bias)
        if self.attention is not None:
            F_q, F_a = self.attention(q, a, q_lengths, a_lengths)
            q, a = torch.cat([q, F_q], 2), torch.cat([a, F_a], 2)
        return Pair(self._convolve(q), self._convolve(a))

    def _convolve(self, rows: Tensor) -> Tensor:
        padding = self.weight.shape[2] - 1
        return torch.tanh(F.conv1d(rows.mT, self.weight, self.bias, padding=padding)).mT

    def extra_repr(self) -> str:
        channels, incoming, width = self.weight.shape
        return f"{incoming}, {channels}, width={width}"


class ABCNN(nn.Module):
    """The siamese convolutional networks BCNN, ABCNN-1, ABCNN-2 and ABCNN-3 (Yin et al., TACL 2016).

    Each block is a wide convolution of `width` words with tanh, its weights shared by both sentences. All of
    its columns are pooled into one vector a sentence (all-ap), and windows of `width` columns into as many
    columns as there were words (w-ap), which the next block reads. The output is how similar both sentences
    are at each level: the cosine of their all-ap vectors, for the input and for each block.

    - ``"bcnn"``: no attention; both poolings are means.
    - ``"abcnn1"``: each block reads `AttentionFeatures` of its input as a second channel.
    - ``"abcnn2"``: w-ap sums the columns, weighted by the row and column sums of the attention between both
      sentences' convolutions (`pairwise_sums`: that attention itself is never in memory).
    - ``"abcnn3"``: both.

    The paper and the authors' code differ, hence the variants:

    - ``"official"`` follows the code: only real words count, so padding changes nothing, whatever it holds;
      ABCNN-1's weights are the same for both sides; ABCNN-2's weights are divided by their sum and weigh
      all-ap too.
    - ``"paper"`` follows the text: both sentences are padded to `length` with zero vectors, which take part
      in everything; ABCNN-1's weights differ by side; ABCNN-2's weights are plain sums, of which all-ap, a
      mean, knows nothing: one block of ABCNN-2 gives what BCNN does. Beware that two zero vectors have
      distance 0: a pad's attention to the other sentence's pads is 1, the highest there is.

    Args:
        features: D, the width of a word vector.
        length: the longest sentence, in words; the paper's s. ABCNN-1's weights have that many columns. By
            keyword, as all that follows.
        channels: feature maps of each convolution.
        width: words that a convolution, and columns that w-ap, spans.
        blocks: how many blocks; the paper has 1 and 2.
        kind: "bcnn", "abcnn1", "abcnn2" or "abcnn3".
        variant: "official" or "paper".
        embedding: looks words up, so that sentences are given as ids; pretrained, frozen or learned, with the
            options of `torch.nn.Embedding`. None: sentences are given as vectors.
        classes: ends with a linear layer from the similarities to that many logits. None: the similarities
            themselves, to be joined with other features of a pair as the paper does.
        device: of the weights; not of `embedding`, which stays as it is given.
        dtype: of the weights, likewise.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device, shape or value, by name, before
            anything is computed.
    """

    @by_keyword
    def __init__(
        self,
        features: int,
        *,
        length: int,
        channels: int = 50,
        width: int = 4,
        blocks: int = 2,
        kind: str = "abcnn3",
        variant: str = "official",
        embedding: nn.Embedding | None = None,
        classes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "features": features,
            "length": length,
            "channels": channels,
            "width": width,
            "blocks": blocks,
        }
        for name, size in sizes.items():
            check_int(name, size, 1)
        check_choice("kind", kind, KINDS)
        check_choice("variant", variant, VARIANTS)
        if embedding is not None:
            check_kind("embedding", embedding, nn.Embedding, "a torch.nn.Embedding")
            if embedding.embedding_dim != features:
                got = embedding.embedding_dim
                raise ValueError(f"embedding: expected features = {features} columns, got {got}")
        if classes is not None:
            check_int("classes", classes, 1)
        if dtype is not None:
            check_dtype("dtype", dtype)
        self.features, self.length, self.channels, self.width = map(int, (features, length, channels, width))
        self.kind, self.variant = kind, variant
        self.embedding = embedding
        self.blocks = nn.ModuleList()
        for incoming in [features, *[channels] * (blocks - 1)]:
            attention = None
            if kind in ("abcnn1", "abcnn3"):
                attention = AttentionFeatures(
                    incoming, length=length, shared=variant == "official", device=device, dtype=dtype
                )
            self.blocks.append(Convolution(incoming, channels, width, attention, device, dtype))
        self.classifier = (
            None if classes is None else nn.Linear(blocks + 1, classes, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot uniform weights and zero biases in the blocks; nn.Linear's own for the classifier.

        The embedding is left alone: it may be pretrained.
        """
        for module in self.modules():
            if isinstance(module, Convolution | AttentionFeatures):
                module.reset_parameters()
        if self.classifier is not None:
            self.classifier.reset_parameters()

    def forward(
        self,
        q: Tensor,
        a: Tensor,
        q_lengths: GivenLengths | None = None,
        a_lengths: GivenLengths | None = None,
    ) -> Tensor:
        """How similar both sentences are at each level.

        Args:
            q: (B, Q, D), or unbatched (Q, D), in the dtype of the weights; with `embedding` integer ids
                (B, Q) or (Q,). Q from 1 to `length`.
            a: (B, A, D), (A, D), (B, A) or (A,) likewise.
            q_lengths: (B,) integers as for `pairwise_attention`, how many words of each q are real; all if
                None. The others are left out ("official") or become zero vectors ("paper"). A sentence of
                length 0 is allowed: its convolution sees `width` - 1 columns of zeros.
            a_lengths: the same for a.

        Returns:
            Similarities (B, blocks + 1), the input's first, each from -1 to 1 and 0 beside a zero vector, in
            the dtype of the vectors; or logits (B, classes); unbatched without B.
        """
        if isinstance(q, Proxy):
            return fx_node(self, q, a, q_lengths, a_lengths)
        levels = self.representations(q, a, q_lengths, a_lengths)
        similarities = torch.stack([_cosine(*level) for level in levels], -1).to(levels[0].q.dtype)
        return similarities if self.classifier is None else self.classifier(similarities)

    def representations(
        self,
        q: Tensor,
        a: Tensor,
        q_lengths: GivenLengths | None = None,
        a_lengths: GivenLengths | None = None,
    ) -> list[Pair]:
        """The all-ap vectors (q, a) at every level: the input's, (B, D), and each block's, (B, channels).

        Arguments and errors are those of `forward`.
        """
        unbatched, q_lengths, a_lengths = self._check(q, a, q_lengths, a_lengths)
        if self.embedding is not None:
            q, a = self.embedding(q), self.embedding(a)
        if unbatched:
            q, a = q[None], a[None]
        # Small integer types could not hold a length and the columns that a convolution adds.
        q_lengths, a_lengths = (None if n is None else n.long() for n in (q_lengths, a_lengths))
        q, a = zero_past(q, q_lengths), zero_past(a, a_lengths)
        if self.variant == "paper":
            # From here on the pads are words like any other.
            q, a = (F.pad(rows, (0, 0, 0, self.length - rows.shape[1])) for rows in (q, a))
            q_lengths = a_lengths = None
        # A convolution has width - 1 columns more than its sentence, until w-ap takes them off again. Those
        # past that are the biases': their weights are 0, and no window of a real word reaches them.
        q_columns, a_columns = (None if n is None else n + (self.width - 1) for n in (q_lengths, a_lengths))

        official, attentive = self.variant == "official", self.kind in ("abcnn2", "abcnn3")
        levels = [Pair(all_pool(q, mean_weights(q, q_lengths)), all_pool(a, mean_weights(a, a_lengths)))]
        for left, block in zip(reversed(range(len(self.blocks))), self.blocks, strict=True):
            q, a = block(q, a, q_lengths, a_lengths)
            attention = None
            if attentive and (official or left):
                attention = attention_weights(q, a, q_columns, a_columns, official)
            if official and attention is not None:
                q_shares, a_shares = attention
            else:
                q_shares, a_shares = mean_weights(q, q_columns), mean_weights(a, a_columns)
            levels.append(Pair(all_pool(q, q_shares), all_pool(a, a_shares)))
            if left:
                q_weights, a_weights = attention or (None, None)
                q = zero_past(window_pool(q, self.width, q_weights), q_lengths)
                a = zero_past(window_pool(a, self.width, a_weights), a_lengths)
        return [Pair(level.q[0], level.a[0]) for level in levels] if unbatched else levels

    def _check(
        self, q: Tensor, a: Tensor, q_lengths: GivenLengths | None, a_lengths: GivenLengths | None
    ) -> tuple[bool, Tensor | None, Tensor | None]:
        """`check_pair`, and what else a call of this module needs."""
        if self.embedding is not None:
            for name, ids in (("q", q), ("a", a)):
                _check_ids(name, ids, self.embedding)
            # The vectors' shapes, dtype and device before they are looked up.
            vector = self.embedding.weight.new_empty(self.features)
            q, a = (vector.expand(*ids.shape, -1) for ids in (q, a))
        # Not from parameters(): a replica of DataParallel has none.
        weight = cast(Tensor, self.blocks[0].weight)
        check_weighted("q" if self.embedding is None else "embedding", q, weight)
        if q.shape[-1] != self.features:
            raise ValueError(f"q: expected features = {self.features} columns, got shape {tuple(q.shape)}")
        checked = check_pair(q, a, q_lengths, a_lengths)
        for name, rows in (("q", q), ("a", a)):
            if not 1 <= rows.shape[-2] <= self.length:
                raise ValueError(
                    f"{name}: expected from 1 to length = {self.length} rows, got {rows.shape[-2]}"
                )
        return checked

    def extra_repr(self) -> str:
        return (
            f"{self.features}, length={self.length}, channels={self.channels}, width={self.width}, "
            f"kind={self.kind!r}, variant={self.variant!r}"
        )


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine over the last dimension, in float32 at least, of vectors of any size.

    0 beside a zero vector, whose derivatives are bounded; those of torch's own grow to 1e8 there, and the
    all-ap of a sentence without words is such a vector as long as the biases are 0.
    """
    cosine = (_unit(x) * _unit(y)).sum(-1)
    # Rounding may go past 1; there a clamp alone would have no derivatives.
    return cosine + (cosine.clamp(-1, 1) - cosine).detach()


def _unit(vector: Tensor) -> Tensor:
    vector = vector.to(torch.promote_types(vector.dtype, torch.float32))
    # Squares underflow and overflow. A unit vector does not depend on the scale, nor do its derivatives.
    largest = vector.detach().abs().amax(-1, keepdim=True)
    zero = largest == 0
    vector = vector / largest.masked_fill(zero, 1)
    # The norm has no derivatives at a zero vector, so any other one's is taken there.
    return vector / torch.linalg.vector_norm(vector.masked_fill(zero, 1), dim=-1, keepdim=True)


def _check_ids(name: str, ids: Tensor, embedding: nn.Embedding) -> None:
    check_tensor(name, ids)
    check_dtype(name, ids.dtype, (torch.int32, torch.int64))
    if ids.dim() not in (1, 2):
        size = name.upper()
        raise ValueError(f"{name}: expected shape (B, {size}) or ({size},), got {tuple(ids.shape)}")
    device = embedding.weight.device
    if ids.device != device:
        raise ValueError(f"{name}: expected device {device} as the embedding, got {ids.device}")
    most = embedding.num_embeddings - 1
    check_range(name, ids, most, "num_embeddings - 1", "; padding has ids too")
