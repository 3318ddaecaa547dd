"""Transfer: adversarial examples of models that one has, shown to a model that one can only ask."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stillproof.attacks.attack import QueryAttack
from stillproof.attacks.frozen import Frozen, frozen
from stillproof.attacks.losses import margin
from stillproof.attacks.record import AttackResult, Record, Task
from stillproof.attacks.threats import Linf, Threat
from stillproof.core.noise import Noise, derive
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Transfer(QueryAttack):
    """Images that a surrogate is sure of being another class, its last iterate, one query each.

    surrogates: classifiers of the same classes, an undistilled twin or any other; each is climbed to the end of `steps`
    along its margin, as high confidence is what transfers (Carlini & Wagner 2017, arXiv 1608.04644), with momentum
    (Dong et al. 2018, arXiv 1710.06081). step: as a share of epsilon. Passes of the surrogates are not counted.
    """

    surrogates: tuple[nn.Module, ...]
    threat: Threat = field(default_factory=lambda: Linf(8 / 255))
    steps: int = 40
    step: float = 0.1
    momentum: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.surrogates or self.steps < 1 or self.step <= 0 or self.momentum < 0:
            raise InputError("a transfer attack without surrogates, steps or a step.", "Give 1 or more of each.")

    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        record = Record(model, task, self.threat, "first", queries=self.queries)
        for number, surrogate in enumerate(self.surrogates):
            rows = record.open()
            rows = rows[~record.spent(rows)]
            if not len(rows):
                break
            left = task[rows]
            images = self._crafted(surrogate, left, derive(seed, "transfer", number), model.runtime)
            logits = model.answer(images)
            record.see(rows, left, images, margin(logits, left.labels, left.target), logits, (1, 0))
        return record.result()

    def _crafted(self, surrogate: nn.Module, task: Task, seed: int, runtime: Runtime) -> Tensor:
        images = self.threat.random_start(task.origin, Noise(seed, task.ids, 0))
        velocity = torch.zeros_like(images)
        with frozen(surrogate, task.origin, runtime) as prepared:
            for _ in range(self.steps):
                slope = prepared.slope(images, lambda logits: margin(logits, task.labels, task.target))
                length = slope.gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
                velocity = self.momentum * velocity + slope.gradient / length.clamp_min(torch.finfo(torch.float32).tiny)
                moved = images + self.step * self.threat.epsilon * self.threat.steepest(velocity)
                images = self.threat.project(moved, task.origin)
        return images
