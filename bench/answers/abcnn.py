"""The ABCNN models: a siamese ABCNN compares both sides level by level, and its similarities are weighed.

    e      = idf · mean of a token's spelling rows, with dropout        (question and answer alike)
    score  = v · ABCNN(e_q, e_a)                                        the cosines of e and of each block

The idf makes ABCNN's plain means over words the weighted ones that the other model takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatematch.attention import ABCNN

from .batches import Batch
from .model import Settings, Siamese
from .text import MAX_LENGTH


@dataclass(frozen=True)
class ABCNNSettings(Settings):
    """Those of the ABCNN models; `model` is the kind of ABCNN."""

    # With 64, dev MAP is 0.02 (ABCNN-3) to 0.05 (BCNN) lower, the mean of seeds 0 to 2.
    embedding: int = 128
    channels: int = 50
    width: int = 4
    blocks: int = 1


class ABCNNMatcher(Siamese):
    """Scores candidate answers; see the equations above."""

    def __init__(self, rows: int, settings: ABCNNSettings) -> None:
        super().__init__(rows, settings)
        self.abcnn = ABCNN(
            settings.embedding,
            length=MAX_LENGTH,
            channels=settings.channels,
            width=settings.width,
            blocks=settings.blocks,
            kind=settings.model,
        )
        self.score = nn.Linear(settings.blocks + 1, 1, bias=False)  # a bias would shift all candidates alike
        with torch.no_grad():
            self.score.weight.fill_(5.0)  # as the matcher's similarities

    def forward(self, batch: Batch) -> Tensor:
        """One score for every answer of the batch, (answers,)."""
        e_q, e_a = self._embed(batch)
        questions, answers, pair = batch.questions, batch.answers, batch.question_of
        e_q, e_a = e_q * questions.weights[..., None], e_a * answers.weights[..., None]
        similarities = self.abcnn(e_q[pair], e_a, questions.lengths[pair], answers.lengths)
        return self.score(similarities)[:, 0]
