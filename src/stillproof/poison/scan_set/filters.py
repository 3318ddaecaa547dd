"""Filters for what suspicious images of a class share. One that is scored on the images that it was made of finds
itself: each image is scored by a filter of the other half of the set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from stillproof.core.noise import derive
from stillproof.poison.scan_set.agreement import agreement
from stillproof.poison.scan_set.sight import Scores, Sight, p_values

Filter = TypeVar("Filter")


@dataclass(frozen=True, slots=True)
class Patterns:
    """scores, and for some classes what their suspicious images have and the others have not: (C, H, W), signed."""

    scores: Scores
    shown: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PatternScanner(ABC):
    """A scanner that begins with what another suspects. seed: of the halves, and of what else is drawn."""

    seed: int = 0

    def __call__(self, suspects: Sight, trusted: Sight) -> Scores:
        """How much of what suspicious images of its predicted class share each image holds."""
        return self.look(suspects, trusted).scores

    def look(self, suspects: Sight, trusted: Sight, doubts: Scores | None = None) -> Patterns:
        """The scores, and the patterns by class. doubts: what makes an image suspicious; None: D1."""
        seen = agreement(suspects, trusted) if doubts is None else doubts
        return self.patterns(suspects, trusted, torch.from_numpy(p_values(seen)))

    @abstractmethod
    def patterns(self, suspects: Sight, trusted: Sight, p: Tensor) -> Patterns:
        """The same, from how suspicious the suspects are. p: float64, (N,)."""


def crosswise(
    suspects: Sight,
    trusted: Sight,
    seed: int,
    made: Callable[[Tensor], Mapping[int, Filter]],
    match: Callable[[Filter, Tensor], Tensor],
) -> tuple[np.ndarray, np.ndarray, list[Mapping[int, Filter]]]:
    """How much of the filter of its predicted class each image holds, and the filters of both halves.

    made: some suspects, bool (N,), to a filter for each class for which there can be one; match: a filter and images,
    uint8 (n, C, H, W), to scores, (n,). Returns float64 for suspects and for trusted images, 0 where the class has no
    filter. Halves are drawn for both alike, so that clean images of either are scored alike.
    """
    halves = [sight.parts(2, derive(seed, name)) for name, sight in (("s", suspects), ("t", trusted))]
    scores = np.zeros(len(suspects)), np.zeros(len(trusted))
    filters: list[Mapping[int, Filter]] = []
    seen = [(sight.images, sight.guessed) for sight in (suspects, trusted)]
    for half in (0, 1):
        filters.append(made(halves[0] != half))
        for score, (images, guessed), own in zip(scores, seen, halves, strict=True):
            for index, one in filters[half].items():
                rows = ((own == half) & (guessed == index)).nonzero()[:, 0]
                score[rows.numpy()] = match(one, images[rows]).double().numpy()
    return *scores, filters
