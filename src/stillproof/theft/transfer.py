"""What a thief has in hand: its queries, and the answers turned into log-probabilities of all classes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from stillproof.core.images import ImageSet
from stillproof.core.noise import derive, permutation
from stillproof.errors import InputError
from stillproof.serving.guard import defined
from stillproof.serving.oracle import Answer, Reveal

TINY = 1e-8
"""What a class gets that a partial answer gives probability 0: below a float's rounding of 1."""

ZERO = 2 * torch.finfo(torch.float32).tiny
"""A probability below this was served as 0: a classifier that returns probabilities has float32's smallest for it."""


@dataclass(frozen=True, slots=True)
class Queries:
    """How many images a thief asks about: `500`, or `50/class`."""

    count: int
    per_class: bool

    @classmethod
    def parse(cls, text: str) -> Queries:
        """Raises InputError."""
        found = re.fullmatch(r"\s*(\d{1,9})\s*(/\s*class)?\s*", text)
        if not found or int(found[1]) < 1:
            raise InputError(f"{text!r} is no number of queries.", "Write 500, or 50/class.")
        return cls(int(found[1]), found[2] is not None)

    def total(self, classes: int) -> int:
        """How many that is."""
        return self.count * (classes if self.per_class else 1)

    def draw(self, images: ImageSet, seed: int) -> ImageSet:
        """Random images of a set, without replacement. Raises InputError if there are fewer."""
        if self.per_class:
            return images.subset(images.per_class(self.count, seed), f"queries from {images.name}")
        if self.count > len(images):
            raise InputError(
                f"{self.count} queries are asked for, and {images.name!r} has {len(images)} images.",
                f"Ask for at most {len(images)}.",
            )
        rows = permutation(len(images), derive(seed, "queries"))[: self.count].sort().values
        return images.subset(rows, f"queries from {images.name}")


def log_probabilities(answer: Answer, reveal: Reveal, classes: int) -> Tensor:
    """What a thief makes of an answer: float32 log-probabilities of all classes, (n, K).

    All logits or probabilities: as they are; −inf for a class that is served as 0: what that counts as is for each
    thief to say. The k largest probabilities: what is missing to 1 is spread evenly over the classes that were not
    revealed. The class alone: probability 1, all others TINY. Raises InputError for NaN.
    """
    if reveal.kind == "logits" and answer.scores is not None:
        return defined(answer.scores.log_softmax(dim=1))
    if answer.scores is None:
        probabilities = torch.zeros(len(answer.classes), classes)
        revealed = torch.ones(answer.classes.shape)
    else:
        missing = (1 - answer.scores.sum(dim=1, keepdim=True)).clamp_min(0)
        hidden = max(classes - answer.classes.shape[1], 1)
        probabilities = (missing / hidden).expand(-1, classes).clone()
        revealed = answer.scores
    probabilities = probabilities.scatter(1, answer.classes, revealed)
    if answer.scores is not None and answer.classes.shape[1] == classes:  # a small probability is what it says
        logarithms = probabilities.masked_fill(probabilities < ZERO, 0).log()
        return defined(logarithms.log_softmax(dim=1))
    return probabilities.clamp_min(TINY).log().log_softmax(dim=1)
