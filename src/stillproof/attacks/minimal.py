"""Attacks that look for the smallest change that is adversarial: C&W, FMN, DDN.

All end with a few passes in fp32 along the line to the nearest image found (`Record.polish`), which no paper has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stillproof.attacks.attack import GradientAttack
from stillproof.attacks.driver import State, climb
from stillproof.attacks.frozen import Frozen, Slope
from stillproof.attacks.losses import LOSSES, LossName, margin
from stillproof.attacks.record import AttackResult, Record, Task
from stillproof.attacks.threats import NORMS, NormName
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
        origin = task.origin
        farthest = NORMS[settings.norm].distance((origin < 0.5).to(origin.dtype), origin)
        never = torch.zeros_like(task.labels, dtype=torch.bool)
        radius = torch.full_like(farthest, torch.inf)
        return cls(task, settings, origin, radius, never, farthest, farthest, _aside(task, seed))

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
        step = length * _unit(_or_aside(slope.gradient, self.aside))
        self.current = (origin + norm.cut(self.current + step - origin, self.radius)).clamp_(0, 1)
        self.number += 1


@dataclass(frozen=True, kw_only=True)
class DDN(GradientAttack):
    """Decoupled direction and norm: steps along the gradient, put back on a sphere that grows or shrinks by γ.

    The paper ascends the cross-entropy, whose gradient a distilled model does not have; the default is the margin.
    Source: Rony et al. 2019, arXiv 1811.09600.
    """

    steps: int = 100
    shrink: float = 0.05
    radius: float = 1.0
    length: float = 1.0
    last_length: float = 0.01
    loss: LossName = "margin"

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
            search = _Sphere(left, self, left.origin, radius, _aside(left, derive(seed, "ddn")))
            climb(model, record, search, rows, steps=self.steps, samples=self.samples)
            record.polish()
        return record.result()


@dataclass
class _Sphere(State):
    task: Task
    settings: DDN
    current: Tensor
    radius: Tensor
    aside: Tensor
    """Where an image goes that has no gradient."""
    number: int = 0

    def ascended(self, logits: Tensor) -> Tensor:
        return LOSSES[self.settings.loss](logits, self.task.labels, self.task.target)

    def move(self, slope: Slope, adversarial: Tensor) -> None:
        settings, origin = self.settings, self.task.origin
        length = _falling(settings.length, settings.last_length, self.number / settings.steps)
        gradient = _or_aside(slope.gradient, self.aside)
        self.radius = self.radius * torch.where(adversarial, 1 - settings.shrink, 1 + settings.shrink)
        change = self.current + length * _unit(gradient) - origin
        self.current = (origin + _unit(change) * _wide(self.radius)).clamp_(0, 1)
        self.number += 1


def _falling(first: float, last: float, share: float) -> float:
    """From first to last, as a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def _aside(task: Task, seed: int) -> Tensor:
    return Noise(seed, task.ids, 0).normal(tuple(task.origin.shape[1:]))


def _or_aside(gradient: Tensor, aside: Tensor) -> Tensor:
    """The gradient, or where it is zero all over, a random direction."""
    dead = (gradient == 0).flatten(1).all(dim=1)
    return torch.where(_wide(dead), aside, gradient)


def _unit(changes: Tensor) -> Tensor:
    """Each of Euclidean length 1. Scaled first, as the squares of a distilled model's gradients underflow."""
    scaled = changes / changes.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    lengths: Tensor = torch.linalg.vector_norm(scaled, dim=(1, 2, 3))
    return scaled / _wide(lengths.clamp_min(TINY))


@dataclass(frozen=True, kw_only=True)
class CarliniWagner(GradientAttack):
    """C&W, L2: Adam on ‖x' − x‖² + c · max(0, m + κ), m the margin of the label, x' = (tanh w + 1) / 2.

    searches: how often c is tried, from `first_c`, tenfold until an image falls, then by bisection; steps: of Adam in
    each. A search ends for an image when its loss has not fallen in a tenth of the steps (`abort_early`), and its
    next begins at once. confidence: κ, the margin that is asked for (but of images that are misclassified already).
    With few steps a tenth of them is soon over: `abort_early=False` then finds nearer images.
    Source: Carlini & Wagner 2017, arXiv 1608.04644, and the authors' code.
    """

    confidence: float = 0.0
    searches: int = 9
    steps: int = 10_000
    first_c: float = 1e-3
    learning_rate: float = 0.01
    abort_early: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.searches < 1 or self.steps < 1 or min(self.first_c, self.learning_rate) <= 0 or self.confidence < 0:
            raise InputError(f"{self} cannot run.", "Give 1 or more searches and steps, positive c and learning rate.")

    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:  # noqa: ARG002
        record = Record(model, replace(task, confidence=self.confidence), NORMS["l2"], "nearest")
        rows = record.open()
        if len(rows):
            search = _Tradeoff.begin(record.task[rows], self)
            climb(model, record, search, rows, steps=self.searches * self.steps, samples=self.samples)
            record.polish()
        return record.result()


FIRST_DECAY, SECOND_DECAY, STABILITY = 0.9, 0.999, 1e-8
"""Adam's β₁, β₂, ε."""

SQUEEZE = 0.999999
"""Keeps atanh of a black or white pixel finite: at ±∞ it would never move."""


@dataclass
class _Tradeoff(State):
    """Every image has a clock of its own: `taken` counts its steps in the present search, `tried` its searches."""

    task: Task
    settings: CarliniWagner
    squeezed: Tensor
    """What the origin becomes in the space of w: distances are from there, as in the authors' code."""
    start: Tensor
    hidden: Tensor
    current: Tensor
    first_moment: Tensor
    second_moment: Tensor
    c: Tensor
    low: Tensor
    high: Tensor
    taken: Tensor
    tried: Tensor
    fell: Tensor
    last_loss: Tensor

    @classmethod
    def begin(cls, task: Task, settings: CarliniWagner) -> _Tradeoff:
        start = ((2 * task.origin - 1) * SQUEEZE).atanh()
        each = torch.zeros(len(start), device=start.device)
        count = torch.zeros_like(task.labels)
        return cls(
            task=task,
            settings=settings,
            squeezed=_pixels(start),
            start=start,
            hidden=start,
            current=_pixels(start),
            first_moment=torch.zeros_like(start),
            second_moment=torch.zeros_like(start),
            c=torch.full_like(each, settings.first_c),
            low=each,
            high=torch.full_like(each, torch.inf),
            taken=count,
            tried=count,
            fell=torch.zeros_like(count, dtype=torch.bool),
            last_loss=torch.full_like(each, torch.inf),
        )

    def ascended(self, logits: Tensor) -> Tensor:
        return margin(logits, self.task.labels, self.task.target, confidence=self.settings.confidence)

    def move(self, slope: Slope, adversarial: Tensor) -> Tensor:
        settings = self.settings
        change = self.current - self.squeezed
        # what is lacking of the margin is the confidence less what is ascended, so its gradient has the other sign
        loss = change.square().sum(dim=(1, 2, 3)) + self.c * (settings.confidence - slope.value)
        self.fell = self.fell | adversarial
        ended = self.taken + 1 == settings.steps
        if settings.abort_early:
            look = self.taken % max(1, settings.steps // 10) == 0
            ended = ended | (look & (loss > 0.9999 * self.last_loss))
            self.last_loss = torch.where(look, loss, self.last_loss)
        # the derivative of the pixels, (tanh w + 1) / 2, is 2 x (1 - x)
        self._adam((2 * change - _wide(self.c) * slope.gradient) * 2 * self.current * (1 - self.current))
        self._search_again(ended)
        return self.tried == settings.searches

    def _adam(self, gradient: Tensor) -> None:
        self.taken = self.taken + 1
        self.first_moment = torch.lerp(gradient, self.first_moment, FIRST_DECAY)
        self.second_moment = torch.lerp(gradient.square(), self.second_moment, SECOND_DECAY)
        first = self.first_moment / _wide(1 - FIRST_DECAY**self.taken)
        second = self.second_moment / _wide(1 - SECOND_DECAY**self.taken)
        self.hidden = self.hidden - self.settings.learning_rate * first / (second.sqrt() + STABILITY)
        self.current = _pixels(self.hidden)

    def _search_again(self, ended: Tensor) -> None:
        """For these images: the next c, and a fresh start."""
        low = torch.where(self.fell, self.low, torch.maximum(self.low, self.c))
        high = torch.where(self.fell, torch.minimum(self.high, self.c), self.high)
        c = torch.where(high.isinf(), 10 * self.c, (low + high) / 2)
        self.low, self.high = torch.where(ended, low, self.low), torch.where(ended, high, self.high)
        self.c = torch.where(ended, c, self.c)
        self.tried = self.tried + ended
        self.taken, self.fell = torch.where(ended, 0, self.taken), self.fell & ~ended
        self.last_loss = torch.where(ended, torch.inf, self.last_loss)
        self.hidden = torch.where(_wide(ended), self.start, self.hidden)
        self.current = _pixels(self.hidden)
        self.first_moment = self.first_moment.masked_fill(_wide(ended), 0)
        self.second_moment = self.second_moment.masked_fill(_wide(ended), 0)


def _pixels(hidden: Tensor) -> Tensor:
    return (hidden.tanh() + 1) / 2


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]
