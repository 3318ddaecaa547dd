"""The thief for whom the scale of an answer, and its shift, say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stillproof.core.distillation import StandardisedDistillation
from stillproof.errors import InputError
from stillproof.theft.thieves import Prospect, Tuned, tried


@dataclass(frozen=True, kw_only=True)
class LogitStd(Tuned):
    """KD of z-scored logits (Sun et al. 2024, arXiv 2403.01427): undoes whatever scales or shifts an answer.

    A class that is served as 0 counts as one of probability 1e-8, or as the least likely of those that are not, if that
    is less. Published: T = 2, weight 9, .1 of CE.
    """

    temperature: float | None = None
    weight: float | None = None

    called: ClassVar[str] = "logit-std"
    signs: ClassVar[Mapping[str, str]] = {"temperature": "T", "weight": "weight"}

    def __post_init__(self) -> None:
        if any(t is not None and t <= 0 for t in (self.temperature, self.weight)):
            raise InputError("the temperature and the weight of logit-std are above 0.", "Mend that option.")

    def why_not(self, prospect: Prospect) -> str:
        """Of two classes z-scores say nothing."""
        return "it z-scores answers, and z-scores of two classes are always ±0.7" if prospect.classes < 3 else ""

    def candidates(self) -> tuple[StandardisedDistillation, ...]:
        temperatures, weights = tried(self.temperature, 0.5, 1.0, 2.0, 4.0, 8.0), tried(self.weight, 1.0, 9.0)
        # what is not the published weight comes with as much of the labels as of the answers
        return tuple(
            StandardisedDistillation(temperature=t, weight=w, label_weight=0.1 if w == 9 else 1.0)
            for t in temperatures
            for w in weights
        )
