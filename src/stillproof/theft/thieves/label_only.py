"""The thief whom no softening of the answers can mislead: it reads the argmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from stillproof.core.distillation import TeacherLabel
from stillproof.theft.thieves import NOTHING


@dataclass(frozen=True, kw_only=True)
class LabelOnly:
    """Cross-entropy to the revealed argmax: the floor under every defence that keeps top-1 on the queries."""

    needs_labels: ClassVar[bool] = False
    reads: ClassVar[Literal["scores", "label"]] = "label"
    knows: ClassVar[str] = NOTHING

    @property
    def title(self) -> str:
        return "label only"

    def candidates(self) -> tuple[TeacherLabel, ...]:
        return tuple(TeacherLabel(label_smoothing=smoothing) for smoothing in (0.0, 0.1, 0.2))
