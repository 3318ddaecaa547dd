"""What a served classifier does to its answer before anybody sees it, one method a file.

A response takes logits and gives logits, both in the sense that their softmax is what is served: log-probabilities, or
−inf for a class that is hidden. So `first+second` is the second, applied to what the first would have served.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from stillproof.core.plan import Stage
    from stillproof.core.training import Recipe


_DOWNWARDS = torch.tensor(-torch.inf)


@dataclass(frozen=True, slots=True)
class Strength:
    """The option of a response that says how much it changes: the mean L1 distance grows from weakest to strongest."""

    option: str
    weakest: float
    strongest: float


class Response(ABC):
    """A way to change the answers of a served classifier. A frozen dataclass.

    What it needs besides the logits is declared: the images; a helper, that is a network made beforehand; memory of
    earlier queries.
    """

    keeps_argmax: ClassVar[bool] = False
    """Whether it promises that the class `argmax` names stays the same. Ties that float32 alone makes are undone by the
    guard, and between the parts of a joined response."""
    reads_images: ClassVar[bool] = False
    needs_helper: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    """Whether an answer depends on the queries before it."""
    strength: ClassVar[Strength | None] = None
    """What `calibrated` tunes; None where nothing is continuous."""

    @property
    @abstractmethod
    def title(self) -> str:
        """How a report calls it."""

    @abstractmethod
    def __call__(self, logits: Tensor, images: Tensor | None = None, state: nn.Module | None = None) -> Tensor:
        """What is served: float32 logits whose softmax is the answer, (n, K).

        logits: (n, K), finite or −inf; images: float32 in [0, 1], (n, C, H, W), where it reads them; state: what
        `begin` returned.
        """

    def begin(self, helper: nn.Module | None = None) -> nn.Module | None:
        """The state of a fresh server: its helper, its memory, or None."""
        return helper

    def prepare(self, victim: Stage, data: Stage, *, recipe: Recipe, images: int, seed: int) -> Stage | None:  # noqa: ARG002
        """The stage that makes the helper (its artefact is a classifier's); None where none is needed.

        recipe: how the victim was trained; images: how many it is trained on, for the estimate of work.
        """
        return None


def with_winner(logits: Tensor, winner: Tensor) -> Tensor:
    """The logits with `winner`, int64 (n, 1), as the class that argmax names: all others strictly below it.

    Rounding to float32 can make equal what was not: the winner gets the row's largest value, and what is as large one
    unit in the last place less.
    """
    largest = logits.amax(dim=1, keepdim=True)
    return logits.minimum(torch.nextafter(largest, _DOWNWARDS)).scatter_(1, winner, largest)


def winner_of(logits: Tensor) -> Tensor:
    """The class that argmax names, the first among equals: int64, (n, 1)."""
    return logits.argmax(dim=1, keepdim=True)
