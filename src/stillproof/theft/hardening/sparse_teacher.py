"""Adversarial Sparse Teacher, AST: a teacher trained so that its soft outputs mislead whoever distils them.

Source: Yilmaz & Keles 2024, arXiv 2403.05181. Loss, masking and α, T, k are those of its reference code; the recipe
(its schedule has 160 epochs) is not. The twins are its own only with `reference=true` (it attacks normalised images).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.attacks.gradient import PGD
from stillproof.attacks.threats import parse_threat
from stillproof.core.carving import carve
from stillproof.core.classifiers import predict
from stillproof.core.distillation import Batch
from stillproof.core.images import ImageSet, as_float, as_uint8, batches
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.stages import classifier_of, model_of
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import InputError
from stillproof.theft.hardening.normalised_pgd import NormalisedPGD, channel_statistics
from stillproof.theft.hardening.outcome import train_hardened

Pairing = Literal["aligned", "random"]
Divergence = Literal["epd", "kl"]

TWIN = "twin"
"""The column of adversarial twins: uint8, (N, C, H, W)."""

REFERENCE: Mapping[str, str | int] = {"pairing": "random", "threat": "normalised:0.3", "attack_steps": 40}
"""What `reference=true` is short for."""


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
    reference: the reference's twins and pairing, short for `pairing=random&threat=normalised:0.3&attack_steps=40`.
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
    """What the twins may differ by. `normalised:0.3` is the reference's attack: .3 of a channel's standard deviation,
    in steps of a thirtieth of that, clamped to between the channel's mean and a standard deviation more."""
    attack_steps: int = 10
    divergence: Divergence = "epd"
    """`kl` puts KL(p ‖ q) in EPD's place: what the paper compares EPD with."""
    reference: InitVar[bool] = False  # no field: it says nothing that the others do not

    def __post_init__(self, reference: bool) -> None:
        if reference:
            self._become_the_reference()
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
            if name != "reference" and getattr(self, name) != field.default
        ]
        return f"ast ({', '.join(changed)})" if changed else "ast"

    def _become_the_reference(self) -> None:
        for name, value in REFERENCE.items():
            if getattr(self, name) not in (self.__dataclass_fields__[name].default, value):
                raise InputError(
                    f"reference=true is {name}={value}, and {name}={getattr(self, name)} is asked for.",
                    "Leave one of them out.",
                )
            object.__setattr__(self, name, value)

    def attack(self) -> PGD | NormalisedPGD:
        """How the twins are made: to the end, from the image itself. Raises InputError."""
        normalised = re.fullmatch(r"normalised:([0-9]*\.?[0-9]+)", self.threat)
        if normalised:
            epsilon = float(normalised[1])
            return NormalisedPGD(epsilon=epsilon, step=epsilon / 30, steps=self.attack_steps)
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
        softened = output / self.temperature
        misleading = (
            epd(target, softened.softmax(dim=1))
            if self.divergence == "epd"
            else F.kl_div(softened.log_softmax(dim=1), target, reduction="batchmean")
        )
        honest = F.cross_entropy(output, batch.known_labels())
        return self.weight * self.temperature**2 * misleading + (1 - self.weight) * honest

    def stage(self, victim: Stage, data: Stage, *, recipe: Recipe, images: int, seed: int) -> Stage:
        attack = self.attack()
        twins = stage(
            adversarial_twins if isinstance(attack, PGD) else normalised_twins,
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
    training, classifier = carve(data).training, _white_box(victim, context)
    labels = training.known_labels()
    counted = Cost()

    def make(rows: slice) -> tuple[Tensor, int]:
        nonlocal counted
        found = attack(
            classifier,
            as_float(training.images[rows]),
            labels[rows],
            ids=torch.arange(rows.start, rows.stop),
            runtime=context.runtime,
        )
        counted += Cost(forwards=int(found.forwards.sum()), backwards=int(found.backwards.sum()))
        return found.images, int(found.success.sum())

    made = _twins(context, training, make)
    return Artefact(made.values, made.tensors, counted)


@job(version=1)
def normalised_twins(context: Context, victim: Artefact, data: Artefact, *, attack: NormalisedPGD) -> Artefact:
    """The reference's twins of the victim's training images, un-augmented, by their channels' own mean and deviation.

    They are carried as pixels of 8 bits, which the attack's clamp keeps within [mean, mean + std]: rounding moves
    them by at most half a grey level, on CIFAR-10 .008 in normalised units (a step is .01, ε .3).
    What lies above white (mean + std > 1) is white.
    """
    training, classifier = carve(data).training, _white_box(victim, context)
    mean, std = channel_statistics(training)

    def make(rows: slice) -> tuple[Tensor, int]:
        images = training.subset(torch.arange(rows.start, rows.stop))
        labels = images.known_labels()
        found = attack(classifier, as_float(images.images), labels, mean=mean, std=std, runtime=context.runtime)
        rounded = ImageSet(as_uint8(found), labels, images.classes, images.name)
        guesses = predict(classifier, rounded, context.runtime).argmax(dim=1)
        return found, int((guesses != labels).sum())

    made = _twins(context, training, make)
    passes = attack.steps * len(training)
    return Artefact(made.values, made.tensors, Cost(forwards=passes + len(training), backwards=passes))


def _white_box(victim: Artefact, context: Context) -> nn.Module:
    if not victim.values.get("differentiable", True):
        raise InputError(
            f"{victim.values['spec']} passes no gradient to its input, so AST cannot be built on it.",
            "AST needs a white-box classifier.",
        )
    return classifier_of(victim, context)


def _twins(context: Context, training: ImageSet, make: Callable[[slice], tuple[Tensor, int]]) -> Artefact:
    """The column of twins. make: rows -> their twins, float32 in [0, 1], and how many of them are misclassified."""
    twins = context.allocate(TWIN, tuple(training.images.shape))
    fooled = 0
    for rows in batches(len(training), context.runtime.images_at_once):
        found, misclassified = make(rows)
        twins[rows] = as_uint8(found)
        fooled += misclassified
        if context.advance is not None:
            context.advance(rows.stop, len(training), f"{fooled / rows.stop:.1%} misclassified")
    return Artefact({"success": fooled / len(training)}, {TWIN: twins})


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
    return train_hardened(
        context,
        carve(data),
        objective,
        model=model_of(victim, context),
        recipe=recipe,
        seed=seed,
        columns={TWIN: twins.tensors[TWIN]},
        twins_misclassified=twins.values["success"],
    )
