"""The thief who believes nothing about the classes that an answer hides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.distillation import NO_CHANCE, Batch, kd_divergence
from stillproof.errors import InputError
from stillproof.theft.thieves import TEMPERATURES, Tuned, tried


def revealed(answers: Tensor) -> Tensor:
    """Which classes an answer says something about: bool, (N, K). answers: log-probabilities, (N, K).

    Hidden are those of probability 0, and those that share the smallest of a row with another: a thief completes what
    top-k leaves out with equal shares, and rounding leaves equal zeros. A row of equals hides nothing.
    """
    smallest = answers.amin(dim=1, keepdim=True)
    least = answers == smallest
    shared = least & (least.sum(dim=1, keepdim=True) > 1)
    hidden = shared | (answers == -torch.inf)
    return ~hidden | least.all(dim=1, keepdim=True)


def revealed_divergence(student: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """T²·KL among the revealed classes alone, both sides renormalised over them; mean over the batch.

    student: logits, (N, K); answers: log-probabilities, (N, K). Returns a scalar.
    """
    hidden = ~revealed(answers)
    kept = [logits.masked_fill(hidden, NO_CHANCE * temperature) for logits in (student, answers)]
    return kd_divergence(kept[0], kept[1], temperature)


@dataclass(frozen=True, kw_only=True)
class RevealedDistillation:
    """α·T²·KL among the revealed classes + (1 − α)·CE: the labels alone speak of the hidden ones."""

    temperature: float
    alpha: float

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.alpha <= 1:
            raise InputError(
                f"temperature={self.temperature:g}, alpha={self.alpha:g} cannot be distilled with.",
                "The temperature is above 0, alpha in [0, 1].",
            )

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        output, labels = student(batch.images), batch.known_labels()
        told = revealed_divergence(output.float(), batch.teacher_logits(output.shape[1]), self.temperature)
        return self.alpha * told + (1 - self.alpha) * F.cross_entropy(output, labels)

    def __str__(self) -> str:
        return f"T = {self.temperature:g}, α = {self.alpha:g}, revealed"


@dataclass(frozen=True, kw_only=True)
class Top(Tuned):
    """KD with labels that renormalises what is revealed and imputes nothing."""

    temperature: float | None = None
    alpha: float | None = None

    called: ClassVar[str] = "top"
    signs: ClassVar[Mapping[str, str]] = {"temperature": "T", "alpha": "α"}

    def candidates(self) -> tuple[RevealedDistillation, ...]:
        temperatures, alphas = tried(self.temperature, *TEMPERATURES), tried(self.alpha, 0.5, 0.9)
        return tuple(RevealedDistillation(temperature=t, alpha=a) for t in temperatures for a in alphas)
