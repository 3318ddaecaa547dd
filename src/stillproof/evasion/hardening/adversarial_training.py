"""PGD training: each batch is learnt as the worst of its surroundings (Madry et al. 2018, arXiv 1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.distillation import Batch
from stillproof.evasion.hardening.inner import Inner


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Inner):
    """CE(f(x'), y), x' the worst of the surroundings by the same loss.

    The defaults are the paper's for CIFAR-10: 8/255, 7 steps of 2/255.
    """

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        labels = batch.known_labels()
        worst = self.worst(student, batch, lambda logits: F.cross_entropy(logits, labels, reduction="sum"))
        return F.cross_entropy(student(worst), labels)
