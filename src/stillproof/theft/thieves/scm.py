"""The thief who lets several students in a row forget what is wrong with an answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.classifiers import predict
from stillproof.core.distillation import TEACHER, Batch, completed, kd_divergence, standardised
from stillproof.core.training import Fit
from stillproof.errors import InputError
from stillproof.theft.lesson import BUDGET, Lesson
from stillproof.theft.thieves import DEFENDED, Tuned, titled

CLOSENESS = 0.1
"""The temperature at which likenesses are compared."""


def contrast(student: Tensor, master: Tensor, labels: Tensor) -> Tensor:
    """InfoNCE: each image's z-scored logits are to be told from the batch by the master's; mean over the batch.

    student, master: logits, (N, K); labels: int64, (N,). Returns a scalar. Likeness is the cosine. Other images of the
    same label are no negatives: their answers ought to be alike.
    """
    ours, theirs = (F.normalize(standardised(logits), dim=1) for logits in (student, master))
    likeness = ours @ theirs.T / CLOSENESS
    alike = labels[:, None] == labels[None]
    alike.fill_diagonal_(False)
    return (likeness.masked_fill(alike, -1e4).logsumexp(dim=1) - likeness.diagonal()).mean()


@dataclass(frozen=True, kw_only=True)
class _Contrastive:
    temperature: float
    weight: float

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        output, labels = student(batch.images).float(), batch.known_labels()
        master = completed(batch.teacher_logits(output.shape[1]))
        learnt = kd_divergence(output, master, self.temperature) + F.cross_entropy(output, labels)
        return learnt / 2 + self.weight * contrast(output, master, labels)


def midway(first: Tensor, second: Tensor) -> Tensor:
    """Logarithm of the mean probabilities: (N, K). first, second: logits, (N, K), -inf where 0."""
    return torch.logaddexp(first.log_softmax(dim=1), second.log_softmax(dim=1)) - math.log(2)


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """A course of students: ½·CE + ½·T²·KL(master ‖ student) + weight·contrast, where the master of the first is the
    victim and that of each later one the mean of the victim's answer and the student's before it; the last is kept."""

    temperature: float
    weight: float
    length: int

    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.weight < 0 or not 1 <= self.length <= BUDGET:
            raise InputError(
                f"temperature={self.temperature:g}, weight={self.weight:g}, length={self.length} is no sequence.",
                f"The temperature is above 0, the weight 0 or more, the length 1 to {BUDGET}.",
            )

    @property
    def trainings(self) -> int:
        return self.length

    def train(self, lesson: Lesson) -> tuple[nn.Module, Fit]:
        """The last student of the sequence."""
        objective = _Contrastive(temperature=self.temperature, weight=self.weight)
        columns, forwards, backwards = lesson.answers, 0, 0
        for number in range(1, self.length):
            student = lesson.student(f"student {number}")
            trained = lesson.fit(student, objective, columns, last=False)
            said = predict(student, lesson.images, lesson.context.runtime)
            columns = {TEACHER: midway(lesson.answers[TEACHER], said)}
            forwards += trained.forwards + len(lesson.images)
            backwards += trained.backwards
        student = lesson.student()
        trained = lesson.fit(student, objective, columns)
        return student, replace(trained, forwards=trained.forwards + forwards, backwards=trained.backwards + backwards)

    def __str__(self) -> str:
        students = "1 student" if self.length == 1 else f"{self.length} students"
        return f"T = {self.temperature:g}, weight {self.weight:g}, {students}"


TRIES = (
    Sequence(temperature=4, weight=0.1, length=2),
    Sequence(temperature=1, weight=0.1, length=2),
    # without contrast one student is plain KD: no thief should be worse than that where there is no defence
    Sequence(temperature=1, weight=0, length=1),
    Sequence(temperature=4, weight=0, length=1),
    Sequence(temperature=8, weight=0, length=1),
    Sequence(temperature=4, weight=0.1, length=1),
    Sequence(temperature=1, weight=0.1, length=1),
    Sequence(temperature=4, weight=1, length=1),
)


@dataclass(frozen=True, kw_only=True)
class SCM(Tuned):
    """A sequence of contrastive students ("Distilling the Undistillable", Jandial et al. 2022, arXiv 2210.11728).

    The paper's formula was not at hand. This reading: each student distils the mean of the victim and the one before it
    beside the labels, with a contrastive term over the batch's answers. length: of the sequence; without one the thief
    tries two students, and the first alone, with and without contrast.
    """

    length: int | None = None
    temperature: float | None = None
    weight: float | None = None

    called: ClassVar[str] = "SCM"
    signs: ClassVar[Mapping[str, str]] = {"temperature": "T", "weight": "weight"}
    knows: ClassVar[str] = DEFENDED

    @property
    def title(self) -> str:
        several = self.called if self.length is None else f"{self.called} of {self.length}"
        return titled(several, {"T": self.temperature, "weight": self.weight})

    def candidates(self) -> tuple[Sequence, ...]:
        """As many of TRIES, with what is fixed, as the budget has room for."""
        options: dict[str, Any] = {"length": self.length, "temperature": self.temperature, "weight": self.weight}
        fixed = {option: value for option, value in options.items() if value is not None}
        found = tuple(dict.fromkeys(replace(each, **fixed) for each in TRIES))
        spent = accumulate(each.trainings for each in found)
        return tuple(each for each, so_far in zip(found, spent, strict=True) if so_far <= BUDGET)
