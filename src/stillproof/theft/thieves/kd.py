"""The thief who knows the labels of its queries and distils the answers beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from stillproof.core.distillation import Distillation
from stillproof.theft.thieves import TEMPERATURES, Tuned, tried


@dataclass(frozen=True, kw_only=True)
class KD(Tuned):
    """Knowledge distillation with labels: αT²·KL + (1 − α)·CE (Hinton et al. 2015, arXiv 1503.02531).

    `kd?temperature=4&alpha=0.9` is the fixed thief of the Nasty Teacher and AST papers on CIFAR-10.
    """

    temperature: float | None = None
    alpha: float | None = None

    called: ClassVar[str] = "KD"
    signs: ClassVar[Mapping[str, str]] = {"temperature": "T", "alpha": "α"}

    def candidates(self) -> tuple[Distillation, ...]:
        tries = product(tried(self.temperature, *TEMPERATURES), tried(self.alpha, 0.5, 0.9))
        return tuple(Distillation(temperature=t, alpha=a) for t, a in tries)
