"""Random images of the ball: what falls to them never needed an attack."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from stillproof.attacks.attack import QueryAttack
from stillproof.attacks.driver import State, climb
from stillproof.attacks.frozen import Frozen, Slope
from stillproof.attacks.losses import margin
from stillproof.attacks.record import AttackResult, Record, Task
from stillproof.attacks.threats import L2, Linf, Threat, unit
from stillproof.core.noise import Noise, derive
from stillproof.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RandomDraws(QueryAttack):
    """Random corners of the ball (Linf), or points of its surface (L2), one query each.

    It is no attack to be reckoned with, and therefore a sign: where it wins and a gradient attack does not, the
    gradients mislead (Athalye et al. 2018, arXiv 1802.00420).
    """

    threat: Threat = field(default_factory=lambda: Linf(8 / 255))
    queries: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threat, Linf | L2):
            raise InputError(f"{self} cannot run.", "Give linf or l2.")

    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        record = Record(model, task, self.threat, "first", queries=self.queries)
        rows = record.open()
        rows = rows[~record.spent(rows)]
        if len(rows):
            climb(model, record, _Draws.begin(task[rows], self, derive(seed, "draws")), rows, steps=self.queries)
        return record.result()


@dataclass
class _Draws(State):
    task: Task
    settings: RandomDraws
    seed: int
    current: Tensor
    number: int = 0

    @classmethod
    def begin(cls, task: Task, settings: RandomDraws, seed: int) -> _Draws:
        search = cls(task, settings, seed, task.origin)
        search.current = search.drawn()
        return search

    def ascended(self, logits: Tensor) -> Tensor:
        return margin(logits, self.task.labels, self.task.target)

    def move(self, slope: Slope, adversarial: Tensor) -> None:  # noqa: ARG002
        self.number += 1
        self.current = self.drawn()

    def drawn(self) -> Tensor:
        noise, shape = Noise(self.seed, self.task.ids, self.number), tuple(self.task.origin.shape[1:])
        if isinstance(self.settings.threat, Linf):
            direction = noise.integers(0, 2, shape).to(torch.float32) * 2 - 1
        else:
            direction = unit(noise.normal(shape))
        moved = self.task.origin + self.settings.threat.epsilon * direction
        return self.settings.threat.project(moved, self.task.origin)
