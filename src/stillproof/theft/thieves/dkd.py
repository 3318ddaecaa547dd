"""The thief who weighs what an answer says about the label apart from what it says about all else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stillproof.core import distillation
from stillproof.theft.thieves import Tuned, tried


@dataclass(frozen=True, kw_only=True)
class DKD(Tuned):
    """Decoupled KD: CE + TCKD + β·NCKD (Zhao et al. 2022, arXiv 2203.08679).

    The published β = 8 amplifies the mass among the other classes, which is what AST, Nasty and Stingy corrupt: β is
    searched down to 0, where the thief reads of an answer no more than the probability of the label.
    """

    temperature: float | None = None
    beta: float | None = None

    called: ClassVar[str] = "DKD"
    signs: ClassVar[Mapping[str, str]] = {"temperature": "T", "beta": "β"}

    def candidates(self) -> tuple[distillation.DKD, ...]:
        temperatures, betas = tried(self.temperature, 1.0, 4.0), tried(self.beta, 0.0, 0.5, 1.0, 2.0, 8.0)
        return tuple(distillation.DKD(temperature=t, beta=b) for t in temperatures for b in betas)
