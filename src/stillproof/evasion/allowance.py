"""How much an audit may spend, and how much of what is left to do fits in."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Budget:
    """Where an audit must stop, if not at its end. passes: forward and backward, of one image each."""

    passes: int | None = None
    seconds: float | None = None


@dataclass(slots=True)
class Allowance:
    """A budget being spent. passes, seconds: spent before, by a run that this one goes on from."""

    budget: Budget = Budget()
    passes: int = 0
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit at all."""
        return self.budget != Budget()

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left."""
        return self._left(self.budget.passes, self.passes) <= 0 or self._left(self.budget.seconds, self._lasted) <= 0

    @property
    def passes_left(self) -> float:
        """Infinite where they are not limited."""
        return self._left(self.budget.passes, self.passes)

    def room(self, passes: float, seconds: float, images: int) -> int:
        """How many images more may be begun, of which so many took so much: at least 1, and 1 where none did yet."""
        if not images:
            return 1
        fits = [
            left * images / took
            for left, took in ((self.passes_left, passes), (self._left(self.budget.seconds, self._lasted), seconds))
            if took > 0
        ]
        most = min(fits, default=1.0)
        return max(1, int(min(most, 1e9)))

    @property
    def _lasted(self) -> float:
        return self.seconds + time.monotonic() - self.began

    @staticmethod
    def _left(limit: float | None, spent: float) -> float:
        return float("inf") if limit is None else limit - spent
