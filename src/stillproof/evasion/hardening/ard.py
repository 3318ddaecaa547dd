"""Adversarially robust distillation, ARD (Goldblum et al. 2020, arXiv 1905.09747)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.distillation import Batch, kd_divergence
from stillproof.errors import InputError
from stillproof.evasion.hardening.inner import Inner


@dataclass(frozen=True, kw_only=True)
class ARD(Inner):
    """α·T²·KL(teacher(x) ‖ student(x')) + (1 − α)·CE(student(x), y), x' the worst for the student's cross-entropy.

    The teacher must be robust itself: it is asked about the image, and the student answers for the surroundings. Its
    logits travel as the column `teacher`. The paper's T for CIFAR-10 is 30, its α 1.
    """

    temperature: float = 30.0
    alpha: float = 1.0
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0 or not 0 <= self.alpha <= 1:
            raise InputError(f"{self} cannot be distilled with.", "The temperature is above 0, alpha in [0, 1].")

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        labels = batch.known_labels()
        worst = self.worst(student, batch, lambda logits: F.cross_entropy(logits, labels, reduction="sum"))
        output = student(worst)
        loss = self.alpha * kd_divergence(output, batch.teacher_logits(output.shape[1]), self.temperature)
        if self.alpha < 1:
            loss = loss + (1 - self.alpha) * F.cross_entropy(student(batch.images), labels)
        return loss
