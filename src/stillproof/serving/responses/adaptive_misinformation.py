"""Adaptive misinformation (Kariyappa & Qureshi 2020, arXiv 1911.07100): wrong answers where the victim is unsure.

The paper also trains the victim with outliers, so that images from elsewhere get unsure answers; here the victim is
served as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.carving import carve
from stillproof.core.distillation import Batch
from stillproof.core.noise import derive
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.stages import model_of, train_fresh, trained_artefact
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import InputError
from stillproof.serving.responses import Response, Strength

RARE = 1e-7
"""Added to 1 − p before its logarithm, as the reference code does."""


@dataclass(frozen=True, kw_only=True)
class Misinformation:
    """Cross-entropy of the complement 1 − p, normalised, to the label: a network trained to be wrong."""

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        complement = (1 - student(batch.images).softmax(dim=1) + RARE).log()
        return F.cross_entropy(complement, batch.known_labels())


@dataclass(frozen=True, kw_only=True)
class AdaptiveMisinformation(Response):
    """Serves (1 − a)p + a·p_wrong, a = 1/(1 + exp(ν(max p − τ))); p_wrong from a second network trained to be wrong.

    τ and ν as ModelGuard's reference code sets them (the paper's own code has ν 10 000). No promise of the argmax.
    """

    tau: float = 0.4
    nu: float = 1000.0

    reads_images: ClassVar[bool] = True
    needs_helper: ClassVar[bool] = True
    strength: ClassVar[Strength | None] = Strength("tau", weakest=0, strongest=1.1)

    def __post_init__(self) -> None:
        if self.nu <= 0:
            raise InputError(f"nu={self.nu:g} is no slope.", "Give more than 0.")

    @property
    def title(self) -> str:
        return f"adaptive misinformation (τ = {self.tau:g}, ν = {self.nu:g})"

    def __call__(self, logits: Tensor, images: Tensor | None = None, state: nn.Module | None = None) -> Tensor:
        if images is None or state is None:
            raise InputError("adaptive misinformation asks a second network.", "Give images and a helper.")
        honest = logits.log_softmax(dim=1)
        sure = honest.amax(dim=1, keepdim=True).exp()
        doubt = self.nu * (self.tau - sure)
        mixed = torch.stack([honest + F.logsigmoid(-doubt), state(images).log_softmax(dim=1) + F.logsigmoid(doubt)])
        return mixed.logsumexp(dim=0)

    def prepare(self, victim: Stage, data: Stage, *, recipe: Recipe, images: int, seed: int) -> Stage | None:
        return stage(
            train_wrong,
            f"train a network to be wrong, seed {seed}",
            passes=3 * images * recipe.epochs,
            victim=victim,
            data=data,
            objective=Misinformation(),
            recipe=recipe,
            seed=derive(seed, "misinformation"),
        )


@job(version=1)
def train_wrong(
    context: Context, victim: Artefact, data: Artefact, *, objective: Misinformation, recipe: Recipe, seed: int
) -> Artefact:
    """A network of the victim's architecture, trained towards the complement of the labels."""
    parts = carve(data)
    model = model_of(victim, context)
    network, trained = train_fresh(
        context, parts.training, objective, model=model, recipe=recipe, seed=seed, validation=parts.validation
    )
    return trained_artefact(network, trained, model, parts.training)
