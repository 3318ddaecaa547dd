"""The thief who has images and no labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stillproof.core.distillation import Distillation
from stillproof.theft.thieves import TEMPERATURES, Tuned


@dataclass(frozen=True, kw_only=True)
class KDUnlabelled(Tuned):
    """Knowledge distillation from the answers alone: α = 1."""

    temperature: float | None = None

    called: ClassVar[str] = "KD unlabelled"
    signs: ClassVar[Mapping[str, str]] = {"temperature": "T"}
    needs_labels: ClassVar[bool] = False

    def candidates(self) -> tuple[Distillation, ...]:
        temperatures = TEMPERATURES if self.temperature is None else (self.temperature,)
        return tuple(Distillation(temperature=t, alpha=1.0) for t in temperatures)
