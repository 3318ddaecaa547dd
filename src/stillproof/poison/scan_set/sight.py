"""What a scanner sees, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sight:
    """Some images, and what the classifiers at hand say about them.

    images: uint8, (N, C, H, W); teacher, reference: logits, float32, (N, K). Each image was shown to one of several
    references, none of which had been trained on it: fold, int64, (N,), says to which. like: int64, (N,), the row of
    the first image that each is nearly a copy of; None where there are no copies.
    """

    images: Tensor
    teacher: Tensor
    reference: Tensor
    fold: Tensor
    like: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def guessed(self) -> Tensor:
        """The class that the teacher sees: int64, (N,)."""
        return self.teacher.argmax(dim=1)

    def parts(self, count: int, seed: int) -> Tensor:
        """A random part for each image, all alike and copies together: int64, (N,)."""
        drawn = folds(len(self), count, seed)
        return drawn if self.like is None else drawn[self.like]


@dataclass(frozen=True, slots=True)
class Scores:
    """How suspicious each image is, float64; higher is more. Those of the trusted images say what is usual.

    least: a difference between scores that is never rare, where trusted images are all alike.
    """

    suspects: np.ndarray
    trusted: np.ndarray
    least: float = 1e-12


class Scanner(Protocol):
    """A scanner of transfer sets."""

    def __call__(self, suspects: Sight, trusted: Sight) -> Scores:
        """Scores of both. A clean suspect and a trusted image must be scored alike."""


def p_values(scores: Scores) -> np.ndarray:
    """Conformal p-values of the suspects, (N,): (1 + trusted images that score as much) / (1 + all of them).

    A clean image has p ≤ α with a probability of at most α, if it is like the trusted ones (Vovk et al. 2005).
    """
    order = np.sort(scores.trusted)
    above = len(order) - np.searchsorted(order, scores.suspects, side="left")
    found: np.ndarray = (1 + above) / (1 + len(order))
    return found


def folds(n: int, count: int, seed: int) -> Tensor:
    """A random fold for each of n images, all folds alike: int64, (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % count
