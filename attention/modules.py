"""Pairwise attention as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from gatematch.checks import (
    GivenLengths,
    by_keyword,
    check_alike,
    check_bool,
    check_dtype,
    check_int,
    check_tensor,
)
from gatematch.plan import fx_node

from .functional import check_pair, checked_attention, pairwise_attention


class PairwiseAttention(nn.Module):
    """``S[b, i, j] = 1 / (1 + ||q[b, i] - a[b, j]||)`` as a module without parameters."""

    def forward(
        self,
        q: Tensor,
        a: Tensor,
        q_lengths: GivenLengths | None = None,
        a_lengths: GivenLengths | None = None,
    ) -> Tensor:
        """`pairwise_attention` without its options."""
        if isinstance(q, Proxy):
            return fx_node(self, q, a, q_lengths, a_lengths)
        return pairwise_attention(q, a, q_lengths, a_lengths)


class AttentionFeatures(nn.Module):
    """The learnable attention features of ABCNN-1: S turned into a second channel beside each sentence.

    With S the pairwise attention of q and a, and W0, W1 of shape (features, length),

        F_q = S @ W0.T[:A]        F_a = S.T @ W1.T[:Q]

    which is W0·Sᵀ and W1·S of the paper (Yin et al., "ABCNN", TACL 2016, section 4.1) with words as rows.

    Args:
        features: width of the feature maps, D for channels of the width of the sentences.
        length: the longest sentence, in rows; shorter ones use the first columns of the weights. By keyword,
            as all that follows.
        shared: one weight for both sides (W0 = W1), as in the authors' code: `weight_q`; `weight_a` is None.
        device: of the weights.
        dtype: of the weights; float64, float32, float16 or bfloat16.

    Shapes: q (B, Q, D), a (B, A, D) with Q, A <= length -> F_q (B, Q, features), F_a (B, A, features);
    unbatched likewise. Rows past `q_lengths`, `a_lengths` get features 0.
    """

    @by_keyword
    def __init__(
        self,
        features: int,
        *,
        length: int,
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("features", features, 1)
        check_int("length", length, 1)
        check_bool("shared", shared)
        if dtype is not None:
            check_dtype("dtype", dtype)
        self.features = int(features)
        self.length = int(length)
        self.shared = bool(shared)
        self.weight_q = nn.Parameter(torch.empty(features, length, device=device, dtype=dtype))
        if shared:
            # One parameter under two names would be two after to_empty() or load_state_dict(assign=True).
            self.register_parameter("weight_a", None)
        else:
            self.weight_a = nn.Parameter(torch.empty(features, length, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot uniform, as the authors initialise them."""
        nn.init.xavier_uniform_(self.weight_q)
        if not self.shared:
            nn.init.xavier_uniform_(self.weight_a)

    def forward(
        self,
        q: Tensor,
        a: Tensor,
        q_lengths: GivenLengths | None = None,
        a_lengths: GivenLengths | None = None,
    ) -> tuple[Tensor, Tensor]:
        if isinstance(q, Proxy):
            return fx_node(self, q, a, q_lengths, a_lengths)
        weight_q = self.weight_q
        weight_a = weight_q if self.shared else self.weight_a
        check_tensor("weight_q", weight_q)
        check_tensor("weight_a", weight_a)
        check_weighted("q", q, weight_q)
        unbatched, q_lengths, a_lengths = check_pair(q, a, q_lengths, a_lengths)
        for name, rows in (("q", q), ("a", a)):
            if rows.shape[-2] > self.length:
                raise ValueError(
                    f"{name}: expected at most length = {self.length} rows, got {rows.shape[-2]}"
                )
        S = checked_attention(q, a, q_lengths, a_lengths, unbatched)
        return S @ weight_q.mT[: a.shape[-2]], S.mT @ weight_a.mT[: q.shape[-2]]

    def extra_repr(self) -> str:
        return f"{self.features}, length={self.length}" + (", shared=True" if self.shared else "")


def check_weighted(name: str, rows: Tensor, weight: Tensor) -> None:
    """Rows that weights multiply are on their device, in their dtype or in one that autocast casts.

    Checked before q and a are compared: what the weights tell of q comes before what q tells of a.
    """
    check_pair(rows, rows, None, None)
    check_alike(name, rows, "the weights", weight, autocast=True)
