"""What a student is trained towards: objectives for `fit`, as pure functions and the thin classes that hold
their hyper-parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.noise import Noise
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError

TEACHER = "teacher"
"""The column that holds a teacher's logits (or log-probabilities: softmax cannot tell), (N, K)."""

NO_CHANCE = -1e4
"""The logarithm that stands for that of 0: exp of it is 0, and 0 times it is 0 where 0 times -inf would be NaN."""

LEAST = 1e-8
"""What a class of probability 0 counts as where only a finite logit will do: below a float's rounding of 1."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's images and everything that travels with them."""

    images: Tensor
    """Augmented, float32 in [0, 1], (n, C, H, W)."""
    labels: Tensor | None
    """int64, (n,)."""
    index: Tensor
    """Rows of the ImageSet: int64, (n,)."""
    columns: Mapping[str, Tensor]
    """What travels with a row, first dimension n: teacher logits, an adversarial twin, a weight."""
    noise: Noise
    """Randomness of these rows at this step."""

    def teacher_logits(self, classes: int) -> Tensor:
        """The column `teacher`, (n, K). Raises InputError if there is none, or it is not of so many classes."""
        found = self.columns.get(TEACHER)
        if found is None or found.ndim != 2 or found.shape[1] != classes:
            has = "no such column" if found is None else f"one of shape {tuple(found.shape)}"
            raise InputError(
                f"the teacher's logits, (n, {classes}), are needed as the column {TEACHER!r}: there is {has}.",
                "Give fit(columns={'teacher': predict(teacher, images, runtime)}).",
            )
        return found

    def known_labels(self) -> Tensor:
        """The labels. Raises InputError if there are none."""
        if self.labels is None:
            raise InputError("this objective needs labels, and the images have none.", "Give labelled images.")
        return self.labels


class Objective(Protocol):
    """What training minimises. May itself be an nn.Module: its parameters are then trained too."""

    def __call__(self, student: nn.Module, batch: Batch, /) -> Tensor:
        """The loss of a batch, a scalar."""


def kd_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over the batch.

    student, teacher: logits, (N, K). Returns a scalar.
    The factor T² keeps the gradient's size as T grows. Source: Hinton et al. 2015, arXiv 1503.02531.
    A teacher's logit of -inf is a probability of 0 at every temperature.
    """
    target = F.log_softmax(teacher / temperature, dim=1).clamp(min=NO_CHANCE)
    output = F.log_softmax(student / temperature, dim=1)
    return F.kl_div(output, target, reduction="batchmean", log_target=True) * temperature**2


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Plain training on the labels, smoothed or not."""

    label_smoothing: float = 0.0

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(student(batch.images), batch.known_labels(), label_smoothing=self.label_smoothing)

    def __str__(self) -> str:
        return f"smoothing {self.label_smoothing:g}"


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """α·T²·KL(teacher ‖ student) + (1 − α)·CE; with α = 1 it needs no labels.

    The teacher's logits travel with the images as the column `teacher`.
    """

    temperature: float = 4.0
    alpha: float = 0.9

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.alpha <= 1:
            raise InputError(
                f"temperature={self.temperature:g}, alpha={self.alpha:g} cannot be distilled with.",
                "The temperature is above 0, alpha in [0, 1].",
            )

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        output = student(batch.images)
        loss = self.alpha * kd_divergence(output, batch.teacher_logits(output.shape[1]), self.temperature)
        if self.alpha < 1:
            loss = loss + (1 - self.alpha) * F.cross_entropy(output, batch.known_labels())
        return loss

    def __str__(self) -> str:
        return f"T = {self.temperature:g}, α = {self.alpha:g}"


def dkd_divergences(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Decoupled KD: T²·KL of (label's class, all others) as two classes, and T²·KL among the others alone.

    student, teacher: logits, (N, K); labels: int64, (N,). Returns two scalars, TCKD and NCKD: means over the batch.
    With K = 2 there is nothing among the others, and NCKD is 0. Source: Zhao et al. 2022, arXiv 2203.08679.
    """
    true = F.one_hot(labels, student.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        logs = F.log_softmax(logits / temperature, dim=1).clamp(min=NO_CHANCE)
        rest = logs[~true].view(len(logs), -1)
        others = rest.logsumexp(dim=1, keepdim=True)
        return torch.cat([logs[true][:, None], others], dim=1), rest - others

    binary, among = (
        F.kl_div(output, target, reduction="batchmean", log_target=True) * temperature**2
        for output, target in zip(parts(student), parts(teacher), strict=True)
    )
    return binary, among


@dataclass(frozen=True, kw_only=True)
class DKD:
    """CE + α·TCKD + β·NCKD (see dkd_divergences). The defaults are the paper's for large teachers on CIFAR-100.

    Without the reference code's warm-up, which lets the two divergences grow over 20 of 240 epochs.
    """

    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.alpha < 0 or self.beta < 0:
            raise InputError(
                f"temperature={self.temperature:g}, alpha={self.alpha:g}, beta={self.beta:g} cannot be distilled with.",
                "The temperature is above 0, alpha and beta are 0 or more.",
            )

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        output, labels = student(batch.images), batch.known_labels()
        binary, among = dkd_divergences(output, batch.teacher_logits(output.shape[1]), labels, self.temperature)
        return F.cross_entropy(output, labels) + self.alpha * binary + self.beta * among

    def __str__(self) -> str:
        return f"T = {self.temperature:g}, α = {self.alpha:g}, β = {self.beta:g}"


def completed(logits: Tensor) -> Tensor:
    """The logits, (N, K), with those of -inf replaced by that of the probability LEAST, or by the smallest finite one
    of their row, whichever is less; finite ones stay."""
    hidden = logits == -torch.inf
    smallest = logits.masked_fill(hidden, torch.inf).amin(dim=1, keepdim=True)
    least = logits.logsumexp(dim=1, keepdim=True) + math.log(LEAST)
    return torch.where(hidden, torch.minimum(least, smallest), logits)


def standardised(logits: Tensor) -> Tensor:
    """Each row less its mean, over its standard deviation, or over .01 if that is larger. logits: (N, K).

    The reference code adds 1e-7 instead: with logits that begin as equal the gradient is then ten million.
    """
    return (logits - logits.mean(dim=1, keepdim=True)) / logits.std(dim=1, keepdim=True).clamp(min=0.01)


@dataclass(frozen=True, kw_only=True)
class StandardisedDistillation:
    """label_weight·CE + weight·T²·KL of z-scored logits: the student need not match the teacher's shift and scale.

    Source: Sun et al. 2024, arXiv 2403.01427; weights as its code has them.
    """

    temperature: float = 2.0
    weight: float = 9.0
    label_weight: float = 0.1

    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.weight < 0 or self.label_weight < 0:
            raise InputError(
                f"temperature={self.temperature:g}, weight={self.weight:g}, label_weight={self.label_weight:g} "
                "cannot be distilled with.",
                "The temperature is above 0, the weights are 0 or more.",
            )

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        output = student(batch.images)
        if output.shape[1] < 3:
            raise InputError(
                "logit standardisation says nothing of two classes: their z-scores are always ±0.7.", "Use kd."
            )
        taught = standardised(completed(batch.teacher_logits(output.shape[1])))
        loss = self.weight * kd_divergence(standardised(output), taught, self.temperature)
        if self.label_weight > 0:
            loss = loss + self.label_weight * F.cross_entropy(output, batch.known_labels())
        return loss

    def __str__(self) -> str:
        return f"T = {self.temperature:g}, weight {self.weight:g}"


@dataclass(frozen=True, kw_only=True)
class TeacherLabel:
    """Cross-entropy to the teacher's argmax: all that a label-only oracle gives away."""

    label_smoothing: float = 0.0

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        output = student(batch.images)
        target = batch.teacher_logits(output.shape[1]).argmax(dim=1)
        return F.cross_entropy(output, target, label_smoothing=self.label_smoothing)

    def __str__(self) -> str:
        return f"smoothing {self.label_smoothing:g}"


class OnlineTeacher:
    """Another objective, with the teacher asked about each augmented view instead of a cached answer."""

    def __init__(self, teacher: nn.Module, objective: Objective, runtime: Runtime) -> None:
        self.teacher = runtime.place(teacher.eval().requires_grad_(False))
        self.objective, self.runtime = objective, runtime

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad(), self.runtime.autocast():
            answer = self.teacher(batch.images).float()
        seen = Batch(batch.images, batch.labels, batch.index, {**batch.columns, TEACHER: answer}, batch.noise)
        return self.objective(student, seen)
