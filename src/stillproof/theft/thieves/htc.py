"""The thief who flattens an answer until its false peaks are gone, and puts the label back on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.distillation import Batch
from stillproof.errors import InputError
from stillproof.theft.thieves import DEFENDED, Tuned, tried


def composed(answers: Tensor, labels: Tensor, temperature: float, weight: float) -> Tensor:
    """(1 − η)·one-hot(label) + η·softmax(answer/T): probabilities, (N, K).

    answers: logits or log-probabilities, (N, K), -inf where 0; labels: int64, (N,); weight: η in [0, 1].
    """
    one_hot = F.one_hot(labels, answers.shape[1]).to(answers.dtype)
    return (1 - weight) * one_hot + weight * (answers / temperature).softmax(dim=1)


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Soft cross-entropy of the student, at T = 1, to the composed target."""

    temperature: float
    weight: float

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.weight <= 1:
            raise InputError(
                f"temperature={self.temperature:g}, weight={self.weight:g} cannot be composed.",
                "The temperature is above 0, the weight in [0, 1].",
            )

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        output, labels = student(batch.images), batch.known_labels()
        target = composed(batch.teacher_logits(output.shape[1]), labels, self.temperature, self.weight)
        return F.cross_entropy(output, target)

    def __str__(self) -> str:
        return f"T = {self.temperature:g}, η = {self.weight:g}"


@dataclass(frozen=True, kw_only=True)
class HTC(Tuned):
    """High-temperature composition ("Distilling the Undistillable", Jandial et al. 2022, arXiv 2210.11728).

    The paper's formula was not at hand. This reading: the answer at a high temperature is mixed with the label, and the
    student, not softened, learns the mixture.
    """

    temperature: float | None = None
    weight: float | None = None

    called: ClassVar[str] = "HTC"
    signs: ClassVar[Mapping[str, str]] = {"temperature": "T", "weight": "η"}
    knows: ClassVar[str] = DEFENDED

    def candidates(self) -> tuple[Composition, ...]:
        temperatures, weights = tried(self.temperature, 8.0, 20.0, 50.0), tried(self.weight, 0.3, 0.6, 0.9)
        return tuple(Composition(temperature=t, weight=w) for t in temperatures for w in weights)
