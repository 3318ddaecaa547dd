"""What a probe, a student distilled on suspect and trusted images alike, has learned: what D3 and the baselines read.

It must have learned both in one way: the trusted images are then to the clean suspects as these are to each other, and
what they score says what is usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from stillproof.core.distillation import Batch, kd_divergence
from stillproof.poison.scan_set.sight import Scores


@dataclass(frozen=True, slots=True)
class Learned:
    """What a probe shows of some images, the suspects first, then the trusted ones.

    features: of its last layer but one, float32, (N, D); losses: KD loss of each image in each epoch, float32,
    (N, epochs); guessed: the class that the teacher sees, int64, (N,); suspects: how many of them there are.
    """

    features: Tensor
    losses: Tensor
    guessed: Tensor
    suspects: int

    def scores(self, found: np.ndarray) -> Scores:
        """What all images score, (N,), as suspects and trusted ones."""
        return Scores(found[: self.suspects], found[self.suspects :], least=1e-9)

    def by_class(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows of each predicted class, int64, and their features, float64: of classes with a few images at least."""
        for index in range(int(self.guessed.max()) + 1):
            rows = (self.guessed == index).nonzero()[:, 0]
            if len(rows) >= FEWEST:
                yield rows.numpy(), self.features[rows].double().numpy()


FEWEST = 10
"""Images of a class that something can be said of."""


class Watching(nn.Module):
    """Distillation from the column `teacher`, α = 1, that notes the loss of each image in each epoch.

    A module, so that what it noted is in the checkpoints.
    """

    losses: Tensor
    seen: Tensor

    def __init__(self, images: int, epochs: int, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("losses", torch.zeros(images, epochs))
        self.register_buffer("seen", torch.zeros(images, dtype=torch.int64))

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        output = student(batch.images)
        answers = batch.teacher_logits(output.shape[1])
        target = (answers / self.temperature).log_softmax(1)
        each = (target.exp() * (target - (output.detach().float() / self.temperature).log_softmax(1))).sum(1)
        self.losses[batch.index, self.seen[batch.index]] = each
        self.seen[batch.index] += 1
        return kd_divergence(output, answers, self.temperature)
