"""The thief who learns, together with its student, how the answers have been garbled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.distillation import LEAST, Batch
from stillproof.core.training import Fit
from stillproof.errors import InputError
from stillproof.theft.lesson import Lesson
from stillproof.theft.thieves import DEFENDED, Tuned, tried

MOST_CLASSES = 128
"""With more classes they share one matrix: one of each would have K³ entries."""

BEGINNING = 0.9
"""What the diagonal begins with; the rest of a row shares the remainder."""


class MarkovTeacher(nn.Module):
    """(1 − α)·CE + α·KL(p̃ M_y ‖ student), p̃ ∝ p^(1/T); M_y: one row-stochastic matrix for each label, trained too.

    An objective for `fit`. The rows are softmaxes of free parameters, so they stay stochastic; the parameters are
    deviations from a beginning near the identity, towards which weight decay pulls them.
    """

    def __init__(self, classes: int, temperature: float, alpha: float, pace: float) -> None:
        super().__init__()
        how_many = classes if classes <= MOST_CLASSES else 1
        self.deviations = nn.Parameter(torch.zeros(how_many, classes, classes))
        self.temperature, self.alpha, self.pace = temperature, alpha, pace

    def matrices(self) -> Tensor:
        """All of them, (K or 1, K, K): rows sum to 1."""
        classes = self.deviations.shape[1]
        ahead = math.log(BEGINNING / (1 - BEGINNING) * (classes - 1))
        beginning = ahead * torch.eye(classes, device=self.deviations.device)
        return torch.softmax(self.pace * self.deviations + beginning, dim=2)

    def transformed(self, answers: Tensor, labels: Tensor) -> Tensor:
        """What the student is to learn: probabilities, (N, K). answers: log-probabilities, (N, K); labels: (N,)."""
        softened = (answers / self.temperature).softmax(dim=1)
        each = self.matrices()
        chosen = each[labels] if len(each) > 1 else each.expand(len(labels), -1, -1)
        garbled: Tensor = (softened[:, None] @ chosen)[:, 0]
        return garbled

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch."""
        output, labels = student(batch.images).float(), batch.known_labels()
        target = self.transformed(batch.teacher_logits(output.shape[1]), labels)
        apart = target.clamp(min=LEAST).log() - F.log_softmax(output, dim=1)
        loss: Tensor = (1 - self.alpha) * F.cross_entropy(output, labels)
        return loss + self.alpha * (target * apart).sum(dim=1).mean()


@dataclass(frozen=True, kw_only=True)
class MarkovDistillation:
    """A course: one student, and the Markov matrices that are trained beside it and then thrown away."""

    temperature: float
    alpha: float
    pace: float

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.alpha < 1 or self.pace < 0:
            raise InputError(
                f"temperature={self.temperature:g}, alpha={self.alpha:g}, pace={self.pace:g} is no Markov KD.",
                "The temperature is above 0, the pace 0 or more, alpha in [0, 1): without labels the matrices could "
                "say anything.",
            )

    @property
    def trainings(self) -> int:
        return 1

    def train(self, lesson: Lesson) -> tuple[nn.Module, Fit]:
        """The student."""
        student = lesson.student()
        objective = MarkovTeacher(len(lesson.images.classes), self.temperature, self.alpha, self.pace)
        return student, lesson.fit(student, objective)

    def __str__(self) -> str:
        return f"T = {self.temperature:g}, α = {self.alpha:g}, pace {self.pace:g}"


@dataclass(frozen=True, kw_only=True)
class MarkovKD(Tuned):
    """Markov KD (Yang & Ye, ECCV 2024): the answer, softened by a power, times a matrix learnt for each label.

    What the paper minimises was not at hand. This reading: student and matrices go down one loss, KL beside CE. The
    pace, by which the matrices' parameters are multiplied, is ours: near the identity a softmax hardly moves, and one
    that moves far ends at the label, where the answers say nothing.
    """

    temperature: float | None = None
    alpha: float | None = None
    pace: float | None = None

    called: ClassVar[str] = "Markov KD"
    signs: ClassVar[Mapping[str, str]] = {"temperature": "T", "alpha": "α", "pace": "pace"}
    knows: ClassVar[str] = DEFENDED

    def candidates(self) -> tuple[MarkovDistillation, ...]:
        return tuple(
            MarkovDistillation(temperature=t, alpha=a, pace=p)
            for t in tried(self.temperature, 1.0, 4.0)
            for a in tried(self.alpha, 0.5, 0.9)
            for p in tried(self.pace, 1.0, 4.0)
        )
