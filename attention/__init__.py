"""Pairwise attention ``S[b, i, j] = 1 / (1 + ||q[b, i] - a[b, j]||)``, batched and inside the graph."""

from .functional import pairwise_attend, pairwise_attention, pairwise_sums
from .modules import AttentionFeatures, PairwiseAttention

__all__ = ["AttentionFeatures", "PairwiseAttention", "pairwise_attend", "pairwise_attention", "pairwise_sums"]
