"""What robust objectives share: the worst images around those of a batch, as the student sees them now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from stillproof.attacks.gradient import perturbed
from stillproof.attacks.threats import parse_threat
from stillproof.core.distillation import Batch
from stillproof.core.training import freely
from stillproof.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """The inner maximisation: the last of `steps` of PGD from a random start. step: as a share of epsilon."""

    threat: str = "linf:8/255"
    steps: int = 7
    step: float = 0.25

    def __post_init__(self) -> None:
        parse_threat(self.threat)
        if self.steps < 1 or self.step <= 0:
            raise InputError(f"{self} cannot train.", "Give 1 or more steps, of positive size.")

    def worst(self, student: nn.Module, batch: Batch, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The images that a loss of the student's logits, a sum over the batch, ascends to; (n, C, H, W).

        The student is in eval mode meanwhile, and in training mode afterwards.
        """
        threat = parse_threat(self.threat)
        answers = freely(student.eval())
        found = perturbed(
            lambda images: loss(answers(images)),
            batch.images,
            threat.random_start(batch.images, batch.noise),
            threat=threat,
            steps=self.steps,
            step=self.step,
        )
        student.train()
        return found
