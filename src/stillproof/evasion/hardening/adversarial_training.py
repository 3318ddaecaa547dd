"""PGD training: each batch is learnt as the worst of its surroundings (Madry et al. 2018, arXiv 1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.attacks.gradient import perturbed
from stillproof.attacks.threats import parse_threat
from stillproof.core.distillation import Batch
from stillproof.core.training import freely
from stillproof.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining:
    """CE(f(x'), y), x' the last of `steps` of PGD from a random start; f in eval mode while x' is looked for.

    step: as a share of epsilon. The defaults are the paper's for CIFAR-10: 8/255, 7 steps of 2/255.
    """

    threat: str = "linf:8/255"
    steps: int = 7
    step: float = 0.25

    def __post_init__(self) -> None:
        parse_threat(self.threat)
        if self.steps < 1 or self.step <= 0:
            raise InputError(f"{self} cannot train.", "Give 1 or more steps, of positive size.")

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        labels = batch.known_labels()
        threat = parse_threat(self.threat)
        answers = freely(student.eval())
        worst = perturbed(
            lambda images: F.cross_entropy(answers(images), labels, reduction="sum"),
            batch.images,
            threat.random_start(batch.images, batch.noise),
            threat=threat,
            steps=self.steps,
            step=self.step,
        )
        student.train()
        return F.cross_entropy(student(worst), labels)
