"""The thief whose student keeps the answers away from its last layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.distillation import Batch, kd_divergence
from stillproof.core.features import Watched, feature_maps
from stillproof.core.images import as_float
from stillproof.core.noise import derive
from stillproof.core.training import Fit
from stillproof.errors import InputError
from stillproof.theft.lesson import Lesson
from stillproof.theft.thieves import DEFENDED, Prospect, Tuned, tried

SELF_DISTILLED, SELF_LABELLED = 0.3, 0.7
"""What the auxiliary head takes from the deep one, and from the labels, beside the answers."""


def shelf(maps: dict[str, Tensor], depth: float) -> str:
    """The layer at a share of the depth, in [0, 1), of the layers that end a resolution (of all, where there are fewer
    than three resolutions)."""
    ends = {found.shape[2:]: layer for layer, found in maps.items()}
    layers = list(ends.values()) if len(ends) > 2 else list(maps)
    return layers[int(depth * len(layers))]


class Doubt(nn.Module):
    """CE(deep) + αT²·KL(answer ‖ aux) + (1 − α)·CE(aux) + .3·KL(deep ‖ aux) + .7·CE(aux), the latter KL at T.

    The gradient of KL(deep ‖ aux) reaches both heads, as in the reference code: what the answers taught the auxiliary
    head comes to the deep one by the layers they share, and by this. An objective for `fit`; the auxiliary head is its
    own, and no part of the student.
    """

    def __init__(self, seen: Watched, classes: int, temperature: float, alpha: float) -> None:
        super().__init__()
        channels, height, width = seen.first.shape[1:]
        side = min(2, height, width)
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(side),
            nn.Flatten(),
            nn.Linear(channels * side**2, classes),
        )
        self._seen, self.temperature, self.alpha = seen, temperature, alpha

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch."""
        deep, labels = student(batch.images).float(), batch.known_labels()
        shallow = self.head(self._seen.take())
        told = kd_divergence(shallow, batch.teacher_logits(deep.shape[1]), self.temperature)
        itself = kd_divergence(shallow, deep, self.temperature) / self.temperature**2  # the reference leaves out T²
        labelled = (1 - self.alpha + SELF_LABELLED) * F.cross_entropy(shallow, labels)
        return F.cross_entropy(deep, labels) + self.alpha * told + labelled + SELF_DISTILLED * itself


@dataclass(frozen=True, kw_only=True)
class SkepticalDistillation:
    """A course: one student, with an auxiliary head on an inner feature map that is thrown away afterwards."""

    temperature: float
    alpha: float
    depth: float
    """Where the head sits: the share of the student's layers below it."""

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.alpha <= 1 or not 0 <= self.depth < 1:
            raise InputError(
                f"temperature={self.temperature:g}, alpha={self.alpha:g}, depth={self.depth:g} is no skeptic.",
                "The temperature is above 0, alpha in [0, 1], the depth in [0, 1).",
            )

    @property
    def trainings(self) -> int:
        return 1

    def train(self, lesson: Lesson) -> tuple[nn.Module, Fit]:
        """The student without the head. Raises InputError if its layers give no feature maps."""
        student, images = lesson.student(), lesson.images
        probe = as_float(images.images[:4])
        maps = feature_maps(student, probe)
        if not maps:
            raise InputError(
                f"a skeptical student hangs a head on an inner feature map, and {lesson.model.text} has none.",
                "Use another --thief-model, or leave skeptical out of --thief.",
            )
        with Watched(student, shelf(maps, self.depth), "map", probe, "the auxiliary head") as seen:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(lesson.seed, "auxiliary head"))
                doubt = Doubt(seen, len(images.classes), self.temperature, self.alpha)
            return student, lesson.fit(student, doubt)

    def __str__(self) -> str:
        return f"T = {self.temperature:g}, α = {self.alpha:g}, depth {self.depth:g}"


@dataclass(frozen=True, kw_only=True)
class Skeptical(Tuned):
    """The Skeptical Student (Kundu et al., NeurIPS 2021, "Analyzing the Confidentiality of Undistillable Teachers").

    One auxiliary head does what two do in the reference code where the answers go to another depth than the
    self-distillation; the head is a convolution and a linear layer, and has no attention.
    """

    temperature: float | None = None
    alpha: float | None = None
    depth: float | None = None

    called: ClassVar[str] = "skeptical"
    signs: ClassVar[Mapping[str, str]] = {"temperature": "T", "alpha": "α", "depth": "depth"}
    knows: ClassVar[str] = DEFENDED

    def why_not(self, prospect: Prospect) -> str:
        """Without a feature map there is nowhere to hang its head."""
        if prospect.feature_maps:
            return ""
        return f"it hangs a head on an inner feature map, and {prospect.student.text} has none"

    def candidates(self) -> tuple[SkepticalDistillation, ...]:
        return tuple(
            SkepticalDistillation(temperature=t, alpha=a, depth=d)
            for t in tried(self.temperature, 1.0, 4.0)
            for a in tried(self.alpha, 0.5, 0.9)
            for d in tried(self.depth, 0.34, 0.67)
        )
