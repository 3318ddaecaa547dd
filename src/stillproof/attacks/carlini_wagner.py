"""C&W, which looks for the smallest change that is adversarial, patiently.

It ends with a few passes in fp32 along the line to the nearest image found (`Record.polish`), which the paper has not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stillproof.attacks.attack import GradientAttack
from stillproof.attacks.driver import State, climb
from stillproof.attacks.frozen import Frozen, Slope
from stillproof.attacks.losses import margin
from stillproof.attacks.record import AttackResult, Record, Task
from stillproof.attacks.threats import NORMS, per_image
from stillproof.errors import InputError


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
        self._adam((2 * change - per_image(self.c) * slope.gradient) * 2 * self.current * (1 - self.current))
        self._search_again(ended)
        return self.tried == settings.searches

    def _adam(self, gradient: Tensor) -> None:
        self.taken = self.taken + 1
        self.first_moment = torch.lerp(gradient, self.first_moment, FIRST_DECAY)
        self.second_moment = torch.lerp(gradient.square(), self.second_moment, SECOND_DECAY)
        first = self.first_moment / per_image(1 - FIRST_DECAY**self.taken)
        second = self.second_moment / per_image(1 - SECOND_DECAY**self.taken)
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
        self.hidden = torch.where(per_image(ended), self.start, self.hidden)
        self.current = _pixels(self.hidden)
        self.first_moment = self.first_moment.masked_fill(per_image(ended), 0)
        self.second_moment = self.second_moment.masked_fill(per_image(ended), 0)


def _pixels(hidden: Tensor) -> Tensor:
    return (hidden.tanh() + 1) / 2
