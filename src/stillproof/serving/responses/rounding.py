"""Rounded probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from stillproof.errors import InputError
from stillproof.serving.responses import Response, Strength


@dataclass(frozen=True, kw_only=True)
class Round(Response):
    """Serves probabilities as multiples of 10^−decimals, renormalised.

    A row in which everything rounds to 0 (a hundred classes alike, at two decimals) has nothing left to say, and is
    served as uniform. Rounding makes ties, and argmax then names the first of the tied: it is not promised. A fraction
    of a decimal is a step in between: decimals=0.7 rounds to multiples of 0.2.
    """

    decimals: float = 2

    strength: ClassVar[Strength | None] = Strength("decimals", weakest=6, strongest=0)

    def __post_init__(self) -> None:
        if not 0 <= self.decimals <= 12:
            raise InputError(f"decimals={self.decimals:g} cannot be rounded to.", "Give 0 to 12.")

    @property
    def title(self) -> str:
        return f"rounded to {self.decimals:g} decimals"

    def __call__(self, logits: Tensor, images: Tensor | None = None, state: nn.Module | None = None) -> Tensor:  # noqa: ARG002
        steps_in_one = float(10**self.decimals)  # the reciprocal of the step: exact where the step is not
        probabilities = logits.double().softmax(dim=1)  # in float32 eight decimals are below a rounding of 1
        counts = (probabilities * steps_in_one).round()
        empty = (counts.amax(dim=1, keepdim=True) == 0).to(counts.dtype)
        return (counts + empty).log().float()
