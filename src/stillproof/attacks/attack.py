"""What all attacks are: a frozen dataclass of settings that is called with a classifier and images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillproof.attacks.driver import AttackResult, Task, in_batches
from stillproof.attacks.frozen import Frozen
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack with a gradient. batch_size: images at once; samples: passes that are averaged a look, for randomised
    classifiers (EOT, Athalye et al. 2018, arXiv 1802.00420)."""

    batch_size: int = 512
    samples: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.samples < 1:
            raise InputError(f"{self} cannot run.", "Give a batch size and samples of 1 or more.")

    def __call__(
        self,
        classifier: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        target: Tensor | None = None,
        seed: int = 0,
        ids: Tensor | None = None,
        runtime: Runtime | None = None,
    ) -> AttackResult:
        """Attack images, float32 in [0, 1], (N, C, H, W), with labels (or towards targets), int64, (N,).

        ids: what identifies each image for its random numbers (default: its position). Raises InputError.
        """
        ids = torch.arange(len(images)) if ids is None else ids
        task = Task(images, labels, target, ids)
        return in_batches(
            classifier,
            task,
            self.batch_size,
            runtime or Runtime.choose(),
            lambda model, batch: self.attack(model, batch, seed),
        )

    @abstractmethod
    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        """Attack one batch, which is on the model's device."""
