"""ModelGuard-W (Tang et al., USENIX Security 2024): the least informative answer within L1 ε that keeps the argmax.

    min_p' Σ_j log(p_j + 10⁻⁶) p'_j    over probabilities p' with ‖p' − p‖₁ ≤ ε and p'_t ≥ p'_j + margin for j ≠ t

t is the argmax of p. The reference code gives this linear programme to a solver, image by image; here it is solved
exactly, in some microseconds. With p'_t = τ fixed the best others are found greedily: what is likeliest costs most and
is taken away first, what is least likely gets it, up to the cap τ − margin. Sums over the sorted answer make that a few
steps of bisection. The cost as a function of τ is convex and piecewise linear, with a known slope, and its tangents
lead to the minimum (Kelley 1960, in one dimension).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate
from math import exp, inf, isinf, isnan, log, nan
from operator import mul, neg
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from stillproof.errors import InputError
from stillproof.serving.responses import Response, Strength

SMALLEST = 1e-6
"""Added to p before its logarithm, as the reference code does."""

MARGIN = 1e-4
"""What the argmax keeps ahead of every other class, or as much as the answer has and ε allows."""

EXACT = 1e-13
"""How near the tangents' meeting point must come to the cost itself."""

MOST_STEPS = 200


class _Point(NamedTuple):
    """What is best with p'_t = τ: the others by their places, the likeliest first.

    The first `held` lie above the cap and come down to it. Of what that leaves, the first `emptied` lose all, and the
    next loses `taken`; the last `filled` get as much as the cap allows, and the one before them `given`. With budget to
    spare all lose all, and what the argmax does not have lies with the last.
    """

    tau: float
    cost: float
    slope: float
    held: int
    emptied: int
    taken: float
    filled: int
    given: float


class _Programme:
    """The programme for one answer, the argmax apart."""

    __slots__ = ("budget", "cost", "costs", "margin", "mass", "others", "spent", "top", "top_cost")

    def __init__(self, ranked: list[float], epsilon: float) -> None:
        """ranked: the answer, the likeliest first."""
        self.top, *self.others = ranked
        self.top_cost, *self.costs = [log(one + SMALLEST) for one in ranked]
        self.budget = epsilon / 2  # the mass that may move
        self.margin = min(MARGIN, max(self.top - self.others[0], self.budget))
        self.mass = [0.0, *accumulate(self.others)]
        self.cost = [0.0, *accumulate(self.costs)]
        self.spent = [0.0, *accumulate(map(mul, self.others, self.costs))]

    def range(self) -> tuple[float, float]:
        """Between which τ it has a solution."""
        K, margin, budget = len(self.others) + 1, self.margin, self.budget
        low = max(self.top - budget, (1 + (K - 1) * margin) / K)
        for count, other in enumerate(self.others, 1):
            if other + margin <= low:  # neither it nor a less likely one must come down
                break
            capped = self.mass[count] + count * margin
            low = max(low, (capped - budget) / count, (self.top + capped - budget) / (count + 1))
        return low, max(low, min(1.0, self.top + budget))

    def at(self, tau: float) -> _Point:
        """The least cost with this τ, and a slope of it there."""
        cap, m = tau - self.margin, len(self.others)
        held = bisect_left(self.others, -cap, key=neg)
        filled = min(m, int((1 - tau) / cap))
        given = 1 - tau - filled * cap if filled < m else 0.0
        needed = max(tau - self.top, 0.0) + self._room(min(filled, m - held), cap)
        if filled < m:
            needed += max(given - self.others[m - filled - 1], 0.0)
        if needed <= self.budget:
            next_cost, all_filled = self.costs[max(m - filled - 1, 0)], self.cost[m] - self.cost[m - filled]
            cost = self.top_cost * tau + cap * all_filled + given * next_cost
            slope = self.top_cost + all_filled - (filled + 1) * next_cost
            return _Point(tau, cost, slope, held, m, 0.0, filled, given)
        return self._with_the_budget(tau, cap, held)

    def _with_the_budget(self, tau: float, cap: float, held: int) -> _Point:
        """As `at`, where all of the budget is used."""
        m, falls = len(self.others), tau < self.top
        above = self.mass[held] - held * cap
        takeable = max(self.budget - max(self.top - tau, 0.0) - above, 0.0)
        if takeable < held * cap:
            emptied = int(takeable / cap)
            taken = takeable - emptied * cap
            lost = cap * self.cost[emptied]
        else:
            emptied = max(held, min(m, bisect_right(self.mass, takeable + above) - 1))
            taken = max(takeable + above - self.mass[emptied], 0.0)
            lost = cap * self.cost[held] + self.spent[emptied] - self.spent[held]
        givable = max(self.budget - max(tau - self.top, 0.0), 0.0)
        filled = bisect_right(range(m - held + 1), givable, key=lambda count: self._room(count, cap)) - 1
        given = givable - self._room(filled, cap)
        next_taken, next_given = self.costs[min(emptied, m - 1)], self.costs[max(m - filled - 1, 0)]
        got = cap * (self.cost[m] - self.cost[m - filled]) - (self.spent[m] - self.spent[m - filled])
        cost = self.top_cost * tau + cap * self.cost[held] + self.spent[m] - self.spent[held]
        cost += got + given * next_given - lost - taken * next_taken
        # whoever rises with the cap is paid for by the next to take from, or to give to
        lowered = min(emptied, held)
        slope = self.top_cost - (next_taken if falls else next_given)
        slope += self.cost[held] - self.cost[lowered] - (held - lowered) * next_taken
        slope += self.cost[m] - self.cost[m - filled] - filled * next_given
        return _Point(tau, cost, slope, held, emptied, taken, filled, given)

    def _room(self, count: int, cap: float) -> float:
        """What the last so many, none of which is above the cap, could get."""
        return count * cap - (self.mass[-1] - self.mass[len(self.others) - count])

    def answer(self, point: _Point) -> list[float]:
        """p', the argmax first."""
        m, cap = len(self.others), point.tau - self.margin
        found = [cap] * point.held + self.others[point.held :]
        found[: point.emptied] = [0.0] * point.emptied
        if point.emptied < m:
            found[point.emptied] -= point.taken
        if point.filled < m:
            found[m - point.filled - 1] += point.given
        found[m - point.filled :] = [cap] * point.filled
        return [point.tau, *found]

    def minimum(self) -> _Point:
        """Where the cost is least."""
        lowest, highest = self.range()
        low = self.at(lowest)
        if low.slope >= 0:  # a victim that is sure of its answer: all of the budget comes from the argmax
            return low
        high = self.at(highest)
        best = min(low, high, key=lambda point: point.cost)
        for step in range(MOST_STEPS):
            if not low.slope < 0 < high.slope:
                break
            meeting = (low.cost - high.cost - low.slope * low.tau + high.slope * high.tau) / (high.slope - low.slope)
            least = low.cost + low.slope * (meeting - low.tau)
            if step % 3 == 2:  # tangents alone may close in slowly where there are many pieces
                meeting = (low.tau + high.tau) / 2
            point = self.at(min(max(meeting, low.tau), high.tau))
            best = min(best, point, key=lambda one: one.cost)
            if best.cost - least <= EXACT or not low.tau < point.tau < high.tau:
                break
            low, high = (point, high) if point.slope < 0 else (low, point)
        return best


def least_informative(ranked: list[float], epsilon: float) -> list[float]:
    """The solution of the programme for one answer. ranked: its probabilities, the likeliest first."""
    programme = _Programme(ranked, epsilon)
    return programme.answer(programme.minimum())


def _served(logits: list[float], epsilon: float) -> list[float]:
    """log p' of one answer; NaN where that is none."""
    order = sorted(range(len(logits)), key=logits.__getitem__, reverse=True)  # the first among equals stays so
    largest = logits[order[0]]
    if isnan(sum(logits)) or isinf(largest):
        return [nan] * len(logits)
    weights = [exp(logits[place] - largest) for place in order]
    total = sum(weights)
    served = [-inf] * len(logits)
    for place, share in zip(order, least_informative([one / total for one in weights], epsilon), strict=True):
        if share > 0:
            served[place] = log(share)
    return served


@dataclass(frozen=True, kw_only=True)
class ModelGuardW(Response):
    """Serves the probabilities within L1 ε, argmax kept, that say least of the original in Σ log p · p'."""

    epsilon: float = 1.0

    version: ClassVar[int] = 2
    keeps_argmax: ClassVar[bool] = True
    strength: ClassVar[Strength | None] = Strength("epsilon", weakest=0, strongest=2)

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 2:
            raise InputError(f"epsilon={self.epsilon:g} is no L1 distance of probabilities.", "Give 0 to 2.")

    @property
    def title(self) -> str:
        return f"ModelGuard-W (ε = {self.epsilon:g})"

    def __call__(self, logits: Tensor, images: Tensor | None = None, state: nn.Module | None = None) -> Tensor:  # noqa: ARG002
        # in plain floats: a dozen operations on one answer of ten classes would take longer than the solution
        answers = logits.tolist()
        if self.epsilon == 0 or not answers:
            return logits
        return logits.new_tensor([_served(answer, self.epsilon) for answer in answers])
