"""Defensive distillation (Papernot et al. 2016, arXiv 1511.04508): a student whose gradients vanish.

A teacher is trained at temperature T, a student on its answers at T, and deployed at T = 1. It is no defence (Carlini &
Wagner 2017): it is here so that an audit can be shown not to be fooled by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.classifiers import Model
from stillproof.core.distillation import Batch
from stillproof.core.noise import derive
from stillproof.core.plan import Stage, stage
from stillproof.core.stages import distil, training_stage
from stillproof.core.training import Recipe
from stillproof.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AtTemperature:
    """T·CE(softmax(z/T), y): the factor keeps the gradient's size as T grows, or training stalls."""

    temperature: float

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        return self.temperature * F.cross_entropy(student(batch.images) / self.temperature, batch.known_labels())


@dataclass(frozen=True, kw_only=True)
class SoftLabels:
    """T·CE(softmax(z/T), softmax(z_teacher/T)), on the teacher's answers to the plain images."""

    temperature: float

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        output = student(batch.images) / self.temperature
        target = (batch.teacher_logits(output.shape[1]) / self.temperature).softmax(dim=1)
        return self.temperature * F.cross_entropy(output, target)


@dataclass(frozen=True, kw_only=True)
class DefensiveDistillation:
    """Teacher and student of one architecture, both at temperature T."""

    temperature: float = 50.0

    def __post_init__(self) -> None:
        if self.temperature < 1:
            raise InputError(
                f"temperature={self.temperature:g} hides nothing.", "Give 1 or more; papers have 20 to 100."
            )

    def stage(self, *, data: Stage, model: Model, recipe: Recipe, seed: int, images: int) -> Stage:
        """The stage that makes the student. images: how many it is trained on, for the estimate of work."""
        common = {"data": data, "model": model, "recipe": recipe}
        teacher = training_stage(
            f"the teacher at T = {self.temperature:g}",
            **common,  # type: ignore[arg-type]
            seed=seed,
            images=images,
            objective=AtTemperature(temperature=self.temperature),
        )
        return stage(
            distil,
            f"distil defensively at T = {self.temperature:g}, seed {seed}",
            passes=3 * images * recipe.epochs,
            teacher=teacher,
            objective=SoftLabels(temperature=self.temperature),
            online=False,
            seed=derive(seed, "student"),
            **common,
        )
