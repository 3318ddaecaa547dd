"""Nasty Teacher: as accurate as a normal teacher, and as far from its soft answers as the cross-entropy lets it be.

Source: Ma et al. 2021 (ICLR), arXiv 2105.07381. Loss, direction of the KL, ω and T are those of its reference code; its
recipe (SGD, 160 or 200 epochs, the best epoch chosen on the test set) is not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.carving import carve
from stillproof.core.distillation import Batch, OnlineTeacher, kd_divergence
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.stages import classifier_of, model_of
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import InputError
from stillproof.theft.hardening.outcome import train_hardened


@dataclass(frozen=True, kw_only=True)
class NastyTeacher:
    """L = CE(z, y) − ω·T²·KL(softmax(z/T) ‖ softmax(z_normal/T)), z_normal from the frozen normal teacher.

    The defaults are the paper's for CIFAR-10; for CIFAR-100 it has ω .005, T 20. The victim is the normal teacher and
    sees every augmented view; the nasty one begins at other weights (at the victim's the KL has no gradient).

    For a given normal teacher q the KL is bounded, by max −log qᵢ, and so is the loss from below: a large ω does not
    make the loss run away, it buys the least likely class at the price of accuracy. What does diverge is arithmetic.
    The reference code takes the logarithm of probabilities, and its gradient is NaN once one of them underflows; here
    the logarithms come first. What diverges all the same is reported (SP-T4), as is what is not nasty in the end.
    """

    weight: float = 0.04
    """ω."""
    temperature: float = 4.0
    """T."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.temperature <= 0:
            raise InputError(
                f"weight={self.weight:g}, temperature={self.temperature:g} is no nasty teacher.",
                "The weight is 0 or more, the temperature above 0.",
            )

    @property
    def title(self) -> str:
        standard = type(self)()
        return "nasty" if self == standard else f"nasty (ω = {self.weight:g}, T = {self.temperature:g})"

    def __call__(self, teacher: nn.Module, batch: Batch) -> Tensor:
        """The normal teacher's logits travel as the column `teacher`."""
        output = teacher(batch.images)
        normal = batch.teacher_logits(output.shape[1])
        apart = kd_divergence(normal, output, self.temperature)  # KL(output ‖ normal): what is fled is the reference
        return F.cross_entropy(output, batch.known_labels()) - self.weight * apart

    def stage(self, victim: Stage, data: Stage, *, recipe: Recipe, images: int, seed: int) -> Stage:
        return stage(
            train_nasty,
            f"harden: {self.title}, seed {seed}",
            passes=images * 4 * recipe.epochs,
            victim=victim,
            data=data,
            objective=self,
            recipe=recipe,
            seed=derive(seed, "hardening"),  # not the victim's: a retraining is what the gate compares with
        )


@job(version=1)
def train_nasty(
    context: Context, victim: Artefact, data: Artefact, *, objective: NastyTeacher, recipe: Recipe, seed: int
) -> Artefact:
    """A fresh classifier of the victim's architecture, trained away from the frozen victim's soft answers."""
    parts = carve(data)
    beside = OnlineTeacher(classifier_of(victim, context), objective, context.runtime)
    made = train_hardened(context, parts, beside, model=model_of(victim, context), recipe=recipe, seed=seed)
    return replace(made, cost=made.cost + Cost(forwards=made.cost.forwards))  # the victim's passes beside it
