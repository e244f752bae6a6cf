"""Pairwise attention ``S[b, i, j] = 1 / (1 + ||q[b, i] - a[b, j]||)``, batched and inside the graph."""

from .abcnn import ABCNN
from .functional import pairwise_attend, pairwise_attention, pairwise_sums
from .modules import AttentionFeatures, PairwiseAttention
from .pooling import attention_pool

__all__ = [
    "ABCNN",
    "AttentionFeatures",
    "PairwiseAttention",
    "attention_pool",
    "pairwise_attend",
    "pairwise_attention",
    "pairwise_sums",
]
