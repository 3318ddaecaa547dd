"""Adversarial Sparse Teacher, AST: a teacher trained so that its soft outputs mislead whoever distils them.

Source: Yilmaz & Keles 2024, arXiv 2403.05181. Loss, masking and α, T, k are those of its reference code; the twins
(its attack runs in normalised space) and the recipe (its schedule has 160 epochs) are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.attacks.gradient import PGD
from stillproof.attacks.threats import parse_threat
from stillproof.core.carving import carve
from stillproof.core.distillation import Batch
from stillproof.core.images import as_float, batches
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.stages import classifier_of, model_of, train_fresh, trained_artefact
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import InputError

Pairing = Literal["aligned", "random"]

TWIN = "twin"
"""The column of adversarial twins: uint8, (N, C, H, W)."""


def epd(target: Tensor, output: Tensor) -> Tensor:
    """Exponential Predictive Divergence, mean over the batch.

        EPD(p, q) = Σ_i exp(p_i) (p_i − q_i)

    target, output: probabilities, (N, K). Returns a scalar.
    Not a divergence: linear in q, may be negative, smallest at q = one-hot(argmax p).
    Source: Yilmaz & Keles 2024, arXiv 2403.05181.
    """
    return (target.exp() * (target - output)).sum(dim=1).mean()


def sparse(logits: Tensor, keep: int) -> Tensor:
    """The `keep` largest logits of each row, all others −inf. logits: (N, K)."""
    top = logits.topk(keep, dim=1)
    return torch.full_like(logits, -torch.inf).scatter(1, top.indices, top.values)


@dataclass(frozen=True, kw_only=True)
class SparseTeacher:
    """L = α·T²·EPD(p, q) + (1 − α)·CE: p from the teacher's sparse answer to an adversarial twin of the image.

    The defaults are the paper's for CIFAR-10; for CIFAR-100 it has α .035, T 30, k 7. The twins are made once,
    by PGD against the victim, in pixel space (the reference attacks normalised images with ε = .3 instead).
    """

    weight: float = 0.05
    """α."""
    temperature: float = 6.0
    """T."""
    keep: int = 2
    """k: logits kept of the adversarial response."""
    pairing: Pairing = "aligned"
    """Each image with its own twin; `random`, with another's of its batch, is what the reference code does."""
    threat: str = "linf:16/255"
    """What the twins may differ by."""
    attack_steps: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1 or self.temperature <= 0 or self.keep < 1:
            raise InputError(
                f"weight={self.weight:g}, temperature={self.temperature:g}, keep={self.keep} is no AST.",
                "weight in [0, 1], temperature above 0, keep 1 or more.",
            )
        self.attack()

    @property
    def title(self) -> str:
        changed = [
            f"{name}={getattr(self, name)}"
            for name, field in self.__dataclass_fields__.items()
            if getattr(self, name) != field.default
        ]
        return f"ast ({', '.join(changed)})" if changed else "ast"

    def attack(self) -> PGD:
        """How the twins are made: to the end, from the image itself."""
        return PGD(threat=parse_threat(self.threat), steps=self.attack_steps, random_start=False, run_to_end=True)

    def __call__(self, teacher: nn.Module, batch: Batch) -> Tensor:
        output = teacher(batch.images)
        twins = batch.columns[TWIN]
        if self.pairing == "random":
            twins = twins[batch.noise.uniform(stream="pairing").argsort()]
        teacher.eval()
        with torch.no_grad():
            misled = teacher(as_float(twins))
        teacher.train()
        target = (sparse(misled, min(self.keep, misled.shape[1])) / self.temperature).softmax(dim=1)
        softened = (output / self.temperature).softmax(dim=1)
        honest = F.cross_entropy(output, batch.known_labels())
        return self.weight * self.temperature**2 * epd(target, softened) + (1 - self.weight) * honest

    def stage(self, victim: Stage, data: Stage, *, recipe: Recipe, images: int, seed: int) -> Stage:
        attack = self.attack()
        twins = stage(
            adversarial_twins,
            f"adversarial twins of the victim, seed {seed}",
            passes=images * 3 * (attack.steps + 1),
            victim=victim,
            data=data,
            attack=attack,
        )
        return stage(
            train_sparse_teacher,
            f"harden: {self.title}, seed {seed}",
            passes=images * 4 * recipe.epochs,
            victim=victim,
            twins=twins,
            data=data,
            objective=self,
            recipe=recipe,
            seed=derive(seed, "hardening"),  # not the victim's: a retraining is what the gate compares with
        )


@job(version=2)
def adversarial_twins(context: Context, victim: Artefact, data: Artefact, *, attack: PGD) -> Artefact:
    """An adversarial example of each of the victim's training images, un-augmented, rounded to uint8."""
    if not victim.values.get("differentiable", True):
        raise InputError(
            f"{victim.values['spec']} passes no gradient to its input, so AST cannot be built on it.",
            "AST needs a white-box classifier.",
        )
    training = carve(data).training
    classifier = classifier_of(victim, context)
    labels = training.known_labels()
    twins = context.allocate(TWIN, tuple(training.images.shape))
    fooled, forwards, backwards = 0, 0, 0
    for rows in batches(len(training), context.runtime.images_at_once):
        found = attack(
            classifier,
            as_float(training.images[rows]),
            labels[rows],
            ids=torch.arange(rows.start, rows.stop),
            runtime=context.runtime,
        )
        twins[rows] = (found.images * 255).round().to(torch.uint8)
        fooled += int(found.success.sum())
        forwards, backwards = forwards + int(found.forwards.sum()), backwards + int(found.backwards.sum())
        if context.advance is not None:
            context.advance(rows.stop, len(training), f"{fooled / rows.stop:.1%} misclassified")
    values = {"success": fooled / len(training)}
    return Artefact(values, {TWIN: twins}, Cost(forwards=forwards, backwards=backwards))


@job(version=1)
def train_sparse_teacher(
    context: Context,
    victim: Artefact,
    twins: Artefact,
    data: Artefact,
    *,
    objective: SparseTeacher,
    recipe: Recipe,
    seed: int,
) -> Artefact:
    """A fresh teacher of the victim's architecture, trained towards the AST objective."""
    parts = carve(data)
    model = model_of(victim, context)
    teacher, trained = train_fresh(
        context,
        parts.training,
        objective,
        model=model,
        recipe=recipe,
        seed=seed,
        columns={TWIN: twins.tensors[TWIN]},
        validation=parts.validation,
    )
    return trained_artefact(teacher, trained, model, parts.training, twins_misclassified=twins.values["success"])
