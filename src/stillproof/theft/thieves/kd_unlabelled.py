"""The thief who has images and no labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from stillproof.core.distillation import Distillation
from stillproof.theft.thieves import NOTHING, TEMPERATURES


@dataclass(frozen=True, kw_only=True)
class KDUnlabelled:
    """Knowledge distillation from the answers alone: α = 1."""

    temperature: float | None = None

    needs_labels: ClassVar[bool] = False
    reads: ClassVar[Literal["scores", "label"]] = "scores"
    knows: ClassVar[str] = NOTHING

    def __post_init__(self) -> None:
        self.candidates()

    @property
    def title(self) -> str:
        return "KD unlabelled" + ("" if self.temperature is None else f", fixed T = {self.temperature:g}")

    def candidates(self) -> tuple[Distillation, ...]:
        temperatures = TEMPERATURES if self.temperature is None else (self.temperature,)
        return tuple(Distillation(temperature=t, alpha=1.0) for t in temperatures)
