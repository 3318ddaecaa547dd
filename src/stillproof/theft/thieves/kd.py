"""The thief who knows the labels of its queries and distils the answers beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from stillproof.core.distillation import Distillation
from stillproof.theft.thieves import NOTHING, TEMPERATURES


@dataclass(frozen=True, kw_only=True)
class KD:
    """Knowledge distillation with labels: αT²·KL + (1 − α)·CE (Hinton et al. 2015, arXiv 1503.02531).

    `kd?temperature=4&alpha=0.9` is the fixed thief of the Nasty Teacher and AST papers on CIFAR-10.
    """

    temperature: float | None = None
    alpha: float | None = None

    needs_labels: ClassVar[bool] = True
    reads: ClassVar[Literal["scores", "label"]] = "scores"
    knows: ClassVar[str] = NOTHING

    def __post_init__(self) -> None:
        self.candidates()  # raises for what no candidate can be built from

    @property
    def title(self) -> str:
        fixed = [
            f"{sign} = {value:g}" for sign, value in (("T", self.temperature), ("α", self.alpha)) if value is not None
        ]
        return f"KD, fixed {', '.join(fixed)}" if fixed else "KD"

    def candidates(self) -> tuple[Distillation, ...]:
        temperatures = TEMPERATURES if self.temperature is None else (self.temperature,)
        alphas = (0.5, 0.9) if self.alpha is None else (self.alpha,)
        return tuple(Distillation(temperature=t, alpha=a) for t in temperatures for a in alphas)
