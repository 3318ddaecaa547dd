"""Attacks that look for the smallest change that is adversarial, in a hundred steps: FMN, DDN.

Both end with a few passes in fp32 along the line to the nearest image found (`Record.polish`), which no paper has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stillproof.attacks.attack import GradientAttack
from stillproof.attacks.driver import State, climb
from stillproof.attacks.frozen import Frozen, Slope
from stillproof.attacks.losses import LOSSES, LossName, margin
from stillproof.attacks.record import AttackResult, Record, Task
from stillproof.attacks.threats import NORMS, NormName, per_image, unit
from stillproof.core.noise import Noise, derive
from stillproof.errors import InputError

TINY = 1e-12
"""Keeps gradients that are zero from dividing by it."""


@dataclass(frozen=True, kw_only=True)
class FMN(GradientAttack):
    """Fast minimum-norm attack: a ball that shrinks where the image is adversarial and grows where it is not.

    The ball changes by a share γ, from `shrink` to `last_shrink`; steps go along the gradient of the margin, with the
    Euclidean length α, from `length` to `last_length`; both fall as a cosine.
    Source: Pintor et al. 2021, arXiv 2102.12827.
    """

    norm: NormName = "l2"
    steps: int = 100
    length: float = 1.0
    last_length: float = 0.01
    shrink: float = 0.05
    last_shrink: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.norm not in NORMS or min(self.length, self.last_length) <= 0:
            raise InputError(f"{self} cannot run.", "Give 1 or more steps, of positive length, and linf or l2.")
        if not 0 < self.last_shrink <= self.shrink < 1:
            raise InputError(f"{self} cannot run.", "Give 0 < last_shrink <= shrink < 1.")

    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        record = Record(model, task, NORMS[self.norm], "nearest")
        rows = record.open()
        if len(rows):
            search = _Boundary.begin(record.task[rows], self, derive(seed, "fmn"))
            climb(model, record, search, rows, steps=self.steps, samples=self.samples)
            record.polish()
        return record.result()


@dataclass
class _Boundary(State):
    task: Task
    settings: FMN
    current: Tensor
    radius: Tensor
    found: Tensor
    nearest: Tensor
    farthest: Tensor
    aside: Tensor
    """Where an image goes that has no gradient."""
    number: int = 0

    @classmethod
    def begin(cls, task: Task, settings: FMN, seed: int) -> _Boundary:
        farthest = _farthest(task, settings.norm)
        never = torch.zeros_like(task.labels, dtype=torch.bool)
        radius = torch.full_like(farthest, torch.inf)
        return cls(task, settings, task.origin, radius, never, farthest, farthest, _aside(task, seed))

    def ascended(self, logits: Tensor) -> Tensor:
        return margin(logits, self.task.labels, self.task.target)

    def move(self, slope: Slope, adversarial: Tensor) -> None:
        settings, origin = self.settings, self.task.origin
        norm = NORMS[settings.norm]
        length = _falling(settings.length, settings.last_length, self.number / settings.steps)
        shrink = _falling(settings.shrink, settings.last_shrink, self.number / settings.steps)
        distance = norm.distance(self.current, origin)
        self.found = self.found | adversarial
        self.nearest = torch.where(adversarial, torch.minimum(distance, self.nearest), self.nearest)
        to_boundary = slope.value.abs() / norm.dual(slope.gradient).clamp_min(TINY)
        # a little beyond: on the boundary itself the margin is 0, and an image would stay there
        # and never less than before, or an image stops where the pixel range eats its steps
        tried = self.radius.masked_fill(self.radius.isinf(), 0)
        # faster, where half precision sees it beyond the boundary and fp32 does not
        growth = torch.where((slope.value >= 0) & ~adversarial, 1.5, 1 + shrink)
        outwards = torch.where(self.found, self.radius, torch.maximum(distance + to_boundary, tried)) * growth
        inwards = torch.minimum(self.radius * (1 - shrink), self.nearest)
        self.radius = torch.minimum(torch.where(adversarial, inwards, outwards), self.farthest)
        step = length * unit(_or_aside(slope.gradient, self.aside))
        self.current = (origin + norm.cut(self.current + step - origin, self.radius)).clamp_(0, 1)
        self.number += 1


@dataclass(frozen=True, kw_only=True)
class DDN(GradientAttack):
    """Decoupled direction and norm: steps along the gradient, put back on a sphere that grows or shrinks by γ.

    The paper ascends the cross-entropy, whose gradient a distilled model does not have; the log odds have the same
    direction everywhere.
    Source: Rony et al. 2019, arXiv 1811.09600.
    """

    steps: int = 100
    shrink: float = 0.05
    radius: float = 1.0
    length: float = 1.0
    last_length: float = 0.01
    loss: LossName = "log-odds"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = min(self.radius, self.length, self.last_length) > 0
        if self.steps < 1 or not 0 < self.shrink < 1 or not positive or self.loss not in LOSSES:
            raise InputError(f"{self} cannot run.", "Give 1 or more steps, positive lengths, 0 < shrink < 1.")

    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        record = Record(model, task, NORMS["l2"], "nearest")
        rows = record.open()
        if len(rows):
            left = record.task[rows]
            radius = torch.full((len(rows),), self.radius, device=left.origin.device)
            search = _Sphere(left, self, left.origin, radius, _farthest(left, "l2"), _aside(left, derive(seed, "ddn")))
            climb(model, record, search, rows, steps=self.steps, samples=self.samples)
            record.polish()
        return record.result()


@dataclass
class _Sphere(State):
    task: Task
    settings: DDN
    current: Tensor
    radius: Tensor
    farthest: Tensor
    aside: Tensor
    """Where an image goes that has no gradient."""
    number: int = 0

    def ascended(self, logits: Tensor) -> Tensor:
        return LOSSES[self.settings.loss](logits, self.task.labels, self.task.target)

    def move(self, slope: Slope, adversarial: Tensor) -> None:
        settings, origin = self.settings, self.task.origin
        length = _falling(settings.length, settings.last_length, self.number / settings.steps)
        gradient = _or_aside(slope.gradient, self.aside)
        grown = self.radius * torch.where(adversarial, 1 - settings.shrink, 1 + settings.shrink)
        self.radius = torch.minimum(grown, self.farthest)
        change = self.current + length * unit(gradient) - origin
        self.current = (origin + unit(change) * per_image(self.radius)).clamp_(0, 1)
        self.number += 1


def _falling(first: float, last: float, share: float) -> float:
    """From first to last, as a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def _farthest(task: Task, norm: NormName) -> Tensor:
    """How far the farthest corner of [0, 1] is from each image."""
    return NORMS[norm].distance((task.origin < 0.5).to(task.origin.dtype), task.origin)


def _aside(task: Task, seed: int) -> Tensor:
    return Noise(seed, task.ids, 0).normal(tuple(task.origin.shape[1:]))


def _or_aside(gradient: Tensor, aside: Tensor) -> Tensor:
    """The gradient, or where it is zero all over, a random direction."""
    dead = (gradient == 0).flatten(1).all(dim=1)
    return torch.where(per_image(dead), aside, gradient)
