"""What all attacks are: a frozen dataclass of settings that is called with a classifier and images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillproof.attacks.driver import in_batches
from stillproof.attacks.frozen import Classifier, Frozen
from stillproof.attacks.record import AttackResult, Task
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError


@dataclass(frozen=True, kw_only=True)
class _Called(ABC):
    """batch_size: images at once; uint8: hand back images of 8 bits, and let only what is adversarial there succeed."""

    batch_size: int = 512
    uint8: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"{self} cannot run.", "Give a batch size of 1 or more.")

    def _run(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        target: Tensor | None,
        seed: int,
        ids: Tensor | None,
        runtime: Runtime | None,
    ) -> AttackResult:
        ids = torch.arange(len(images)) if ids is None else ids
        task = Task(images, labels, target, ids, uint8=self.uint8)
        chosen = runtime or Runtime.choose()
        return in_batches(classifier, task, self.batch_size, chosen, lambda model, some: self.attack(model, some, seed))

    @abstractmethod
    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        """Attack one batch, which is on the model's device."""


@dataclass(frozen=True, kw_only=True)
class Attack(_Called):
    """An attack that follows the gradient of a module.

    batch_size: images at once; samples: passes that are averaged a look, for randomised classifiers (EOT, Athalye et
    al. 2018, arXiv 1802.00420).
    """

    samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise InputError(f"{self} cannot run.", "Give samples of 1 or more.")

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
        return self._run(classifier, images, labels, target, seed, ids, runtime)


@dataclass(frozen=True, kw_only=True)
class QueryAttack(_Called):
    """An attack that only asks. batch_size: images at once; queries: the most that it asks about one image."""

    queries: int = 5000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 1:
            raise InputError(f"{self} cannot run.", "Give a budget of 1 or more queries.")

    def __call__(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        *,
        target: Tensor | None = None,
        seed: int = 0,
        ids: Tensor | None = None,
        runtime: Runtime | None = None,
    ) -> AttackResult:
        """Attack images as `Attack` does; the classifier is a module, or anything that answers images.

        An answer is logits, (n, K), or labels, (n,). Raises InputError.
        """
        return self._run(classifier, images, labels, target, seed, ids, runtime)
