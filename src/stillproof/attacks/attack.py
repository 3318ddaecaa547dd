"""What all attacks are: a frozen dataclass of settings that is called with a classifier and images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from stillproof.attacks.driver import in_batches
from stillproof.attacks.frozen import Classifier, Frozen
from stillproof.attacks.record import AttackResult, Task
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """batch_size: images at once (None: as suits the device).

    uint8: hand back images of 8 bits, and let only what is adversarial there succeed.
    """

    needs_gradients: ClassVar[bool] = True
    samples: ClassVar[int] = 1

    batch_size: int | None = None
    uint8: bool = False

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"{self} cannot run.", "Give a batch size of 1 or more.")

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
        through: nn.Module | None = None,
    ) -> AttackResult:
        """Attack images, float32 in [0, 1], (N, C, H, W), with labels (or towards targets), int64, (N,).

        classifier: a module; for a QueryAttack anything that answers images with logits, (n, K), or labels, (n,).
        ids: what identifies each image for its random numbers (default: its position). through: what is climbed
        instead, where the classifier has no useful gradient (BPDA, Athalye et al. 2018, arXiv 1802.00420): it takes the
        same images, returns logits of the same classes, and the classifier judges what is found. Raises InputError.
        """
        if self.needs_gradients and not isinstance(classifier, nn.Module):
            raise InputError(
                f"{type(self).__name__} follows gradients, and a {type(classifier).__name__} has none.",
                "Give a torch.nn.Module, or attack with Square, HopSkipJump or Transfer.",
            )
        if through is not None and not self.needs_gradients:
            raise InputError(f"{type(self).__name__} follows no gradients.", "Leave `through` out.")
        with torch.inference_mode(mode=False), torch.no_grad():
            given = [images, labels, *(() if target is None else (target,)), *(() if ids is None else (ids,))]
            images, labels, *rest = (tensor.clone() if tensor.is_inference() else tensor.detach() for tensor in given)
            target = None if target is None else rest[0]
            ids = torch.arange(len(images)) if ids is None else rest[-1]
            runtime = runtime or Runtime.choose()
            return in_batches(
                classifier,
                Task(images, labels, target, ids, uint8=self.uint8),
                self.batch_size or runtime.images_at_once,
                runtime,
                lambda model, task: self.attack(model.averaged(self.samples), task, seed),
                through,
            )

    @abstractmethod
    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        """Attack one batch, which is on the model's device."""


@dataclass(frozen=True, kw_only=True)
class GradientAttack(Attack):
    """An attack that follows the gradient of a module.

    samples: passes that are averaged a look, for randomised classifiers (EOT, Athalye et al. 2018, arXiv 1802.00420);
    a success is then what the mean of as many fresh passes in fp32 says.
    """

    samples: int = 1  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise InputError(f"{self} cannot run.", "Give samples of 1 or more.")


@dataclass(frozen=True, kw_only=True)
class QueryAttack(Attack):
    """An attack that only asks. queries: the most that it asks about one image."""

    needs_gradients: ClassVar[bool] = False

    queries: int = 5000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 1:
            raise InputError(f"{self} cannot run.", "Give a budget of 1 or more queries.")
