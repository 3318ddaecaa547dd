"""The thief who learns answers and no labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stillproof.core.distillation import Distillation
from stillproof.theft.thieves import TEMPERATURES, Tuned, tried


@dataclass(frozen=True, kw_only=True)
class KDUnlabelled(Tuned):
    """Knowledge distillation from the answers alone: α = 1."""

    temperature: float | None = None

    called: ClassVar[str] = "KD unlabelled"
    signs: ClassVar[Mapping[str, str]] = {"temperature": "T"}
    needs_labels: ClassVar[bool] = False

    def candidates(self) -> tuple[Distillation, ...]:
        return tuple(Distillation(temperature=t, alpha=1.0) for t in tried(self.temperature, *TEMPERATURES))
