"""What a measured number is: a value, its interval, how both were obtained; and what it cost. Imports no NumPy."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LEVEL = 0.95
"""Of every interval."""

Whole = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
"""An integer that any program can show."""


class Measurement(BaseModel):
    """A value, its interval, and how both were obtained. None stands for what could not be measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float | None
    low: float | None = None
    high: float | None = None
    n: Whole
    unit: str = "fraction"
    level: float = LEVEL
    method: str


class Cost(BaseModel):
    """What something took. forwards, backwards: passes counted in images; queries: answers asked of an oracle;
    peak_bytes: the most memory the process had held by then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queries: Whole = 0
    forwards: Whole = 0
    backwards: Whole = 0
    seconds: float = 0.0
    peak_bytes: Whole = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            queries=self.queries + other.queries,
            forwards=self.forwards + other.forwards,
            backwards=self.backwards + other.backwards,
            seconds=self.seconds + other.seconds,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
        )
