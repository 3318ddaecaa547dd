"""Attacks that climb a loss inside a ball: FGSM, PGD, APGD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from stillproof.attacks.attack import GradientAttack
from stillproof.attacks.driver import State, climb
from stillproof.attacks.frozen import Frozen, Slope
from stillproof.attacks.losses import Loss, LossName, loss_of
from stillproof.attacks.record import AttackResult, Record, Task
from stillproof.attacks.threats import Ball, Linf, Threat, per_image
from stillproof.core.noise import Noise, derive
from stillproof.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FGSM(GradientAttack):
    """Fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572): one step to the edge of the ball."""

    threat: Threat = field(default_factory=lambda: Linf(8 / 255))
    loss: LossName | Loss = "cross-entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        loss_of(self.loss)

    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        single = PGD(threat=self.threat, steps=1, step=1.0, loss=self.loss, random_start=False, samples=self.samples)
        return single.attack(model, task, seed)


@dataclass(frozen=True, kw_only=True)
class PGD(GradientAttack):
    """Projected gradient descent (Madry et al. 2018, arXiv 1706.06083).

    step: as a share of epsilon. An image keeps the first iterate that succeeds and leaves; with `run_to_end` it is
    optimised through all steps and keeps the successful iterate of the largest loss, as those need who train
    on the examples and do not only count them. Where none succeeds it keeps that of the largest loss.
    """

    threat: Threat = field(default_factory=lambda: Linf(8 / 255))
    steps: int = 20
    step: float = 0.125
    loss: LossName | Loss = "cross-entropy"
    random_start: bool = True
    restarts: int = 1
    run_to_end: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        loss_of(self.loss)
        if self.steps < 1 or self.step <= 0 or self.restarts < 1:
            raise InputError(f"{self} cannot run.", "Give 1 or more steps and restarts, and a positive step.")
        if self.restarts > 1 and not self.random_start:
            raise InputError(f"{self} would do the same {self.restarts} times.", "Let it start at random.")

    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        record = Record(model, task, self.threat, "largest" if self.run_to_end else "first")
        for restart in range(self.restarts):
            rows = record.open()
            if not len(rows):
                break
            left = task[rows]
            noise = Noise(derive(seed, "pgd", restart), left.ids, 0)
            start = self.threat.random_start(left.origin, noise) if self.random_start else left.origin
            search = _Ascent(left, start, self, self.threat.around(left.origin))
            climb(model, record, search, rows, steps=self.steps, samples=self.samples)
        return record.result()


@dataclass
class _Ascent(State):
    """Steps of one length."""

    task: Task
    current: Tensor
    settings: PGD
    ball: Ball

    def ascended(self, logits: Tensor) -> Tensor:
        return loss_of(self.settings.loss)(logits, self.task.labels, self.task.target)

    def move(self, slope: Slope, adversarial: Tensor) -> None:  # noqa: ARG002
        threat = self.settings.threat
        length = self.settings.step * threat.epsilon
        self.current = self.ball.project_(torch.add(self.current, threat.steepest(slope.gradient), alpha=length))


def perturbed(
    loss: Callable[[Tensor], Tensor],
    origin: Tensor,
    start: Tensor,
    *,
    threat: Threat,
    steps: int,
    step: float,
) -> Tensor:
    """The last iterate of PGD, for training: nothing is judged, kept or counted.

    loss: images -> the summed loss of a student that is being trained, in the caller's precision; step: as a share of
    epsilon.
    """
    images, ball = start, threat.around(origin)
    for _ in range(steps):
        probe = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(probe), probe)
        images = ball.project_(images + step * threat.epsilon * threat.steepest(gradient))
    return images.detach()


MOMENTUM = 0.75
"""Share of the new step in APGD's."""

ENOUGH_RISES = 0.75
"""ρ: a window in which the loss rose in a smaller share of steps has oscillated."""

FIRST_WINDOW, SHORTER_BY, SHORTEST_WINDOW = 0.22, 0.03, 0.06
"""APGD's windows between two looks at the step size, as shares of all steps."""


@dataclass(frozen=True, kw_only=True)
class APGD(GradientAttack):
    """Auto-PGD: a step size for each image that halves where the loss no longer rises.

    targets: with 0 it ascends `loss`; with n > 0 it makes n searches, each towards the next likely wrong class, by the
    targeted form of the loss, and any misclassification is a success (APGD-T: `loss="dlr", targets=9`).
    Source: Croce & Hein 2020, arXiv 2003.01690.
    """

    threat: Threat = field(default_factory=lambda: Linf(8 / 255))
    steps: int = 100
    loss: LossName | Loss = "cross-entropy"
    restarts: int = 1
    targets: int = 0
    run_to_end: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        loss_of(self.loss)
        if self.steps < 1 or self.restarts < 1 or self.targets < 0:
            raise InputError(f"{self} cannot run.", "Give 1 or more steps and restarts.")

    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        record = Record(model, task, self.threat, "largest" if self.run_to_end else "first")
        for number, (_, towards) in enumerate(product(range(self.restarts), self._aims(task, record))):
            rows = record.open()
            if not len(rows):
                break
            left = task[rows]
            noise = Noise(derive(seed, "apgd", number), left.ids, 0)
            start = self.threat.random_start(left.origin, noise)
            search = _AutoAscent.begin(left, None if towards is None else towards[rows], start, self)
            climb(model, record, search, rows, steps=self.steps, samples=self.samples)
        return record.result()

    def _aims(self, task: Task, record: Record) -> list[Tensor | None]:
        """What each search goes towards: away from the label, towards the target, or towards each likely class."""
        if task.target is not None or not self.targets:
            return [task.target]
        likely = record.clean.scatter(1, task.labels[:, None], -torch.inf).argsort(dim=1, descending=True)
        return list(likely[:, : min(self.targets, likely.shape[1] - 1)].T)


@dataclass
class _AutoAscent(State):
    """Steps with momentum, of each image's own length."""

    task: Task
    towards: Tensor | None
    settings: APGD
    ball: Ball
    current: Tensor
    previous: Tensor
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor
    last_value: Tensor
    rises: Tensor
    length: Tensor
    was_halved: Tensor
    value_at_check: Tensor
    number: int = 0
    window: int = 0
    in_window: int = 0

    @classmethod
    def begin(cls, task: Task, towards: Tensor | None, start: Tensor, settings: APGD) -> _AutoAscent:
        low = torch.full((len(start),), -torch.inf, device=start.device)
        return cls(
            task=task,
            towards=towards,
            settings=settings,
            ball=settings.threat.around(task.origin),
            current=start,
            previous=start,
            best=start,
            best_gradient=torch.zeros_like(start),
            best_value=low,
            last_value=low,
            rises=torch.zeros_like(low),
            length=torch.full_like(low, 2 * settings.threat.epsilon),
            was_halved=torch.ones_like(low, dtype=torch.bool),
            value_at_check=low,
            window=max(1, int(FIRST_WINDOW * settings.steps)),
        )

    def ascended(self, logits: Tensor) -> Tensor:
        return loss_of(self.settings.loss)(logits, self.task.labels, self.towards)

    def move(self, slope: Slope, adversarial: Tensor) -> None:  # noqa: ARG002
        value, gradient = slope.value, slope.gradient
        if self.number:
            self.rises += value > self.last_value
            self.in_window += 1
        better = value > self.best_value
        self.best = _where(better, self.current, self.best)
        self.best_gradient = _where(better, gradient, self.best_gradient)
        self.best_value = torch.where(better, value, self.best_value)
        self.last_value = value
        if not self.number:
            self.value_at_check = value
        if self.in_window == self.window:
            gradient = self._shortened(gradient)
        self._step(gradient)
        self.number += 1

    def _shortened(self, gradient: Tensor) -> Tensor:
        """Halve the steps that bring nothing, and go back to the best point; returns the gradients there."""
        oscillated = self.rises <= ENOUGH_RISES * self.window
        stuck = ~self.was_halved & (self.value_at_check >= self.best_value)
        halved = oscillated | stuck
        self.length = torch.where(halved, self.length / 2, self.length)
        self.current = _where(halved, self.best, self.current)
        self.was_halved, self.value_at_check = halved, self.best_value
        self.rises = torch.zeros_like(self.rises)
        steps = self.settings.steps
        self.window = max(self.window - max(1, int(SHORTER_BY * steps)), int(SHORTEST_WINDOW * steps), 1)
        self.in_window = 0
        return _where(halved, self.best_gradient, gradient)

    def _step(self, gradient: Tensor) -> None:
        share = MOMENTUM if self.number else 1.0
        step = per_image(self.length) * self.settings.threat.steepest(gradient)
        # in place, and in the order of the authors' code: the result is theirs to the last bit
        aimed = self.ball.project_(step.add_(self.current))
        moved = aimed.sub_(self.current).mul_(share).add_(self.current)
        if self.number:
            moved += (self.current - self.previous).mul_(1 - share)
        self.previous, self.current = self.current, self.ball.project_(moved)


def _where(chosen: Tensor, images: Tensor, others: Tensor) -> Tensor:
    return torch.where(per_image(chosen), images, others)
