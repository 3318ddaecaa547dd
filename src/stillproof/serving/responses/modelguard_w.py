"""ModelGuard-W (Tang et al., USENIX Security 2024): the least informative answer within L1 ε that keeps the argmax.

    min_p' Σ_j log(p_j + 10⁻⁶) p'_j    over probabilities p' with ‖p' − p‖₁ ≤ ε and p'_t ≥ p'_j + margin for j ≠ t

t is the argmax of p. The reference code gives this linear programme to a solver, image by image. Here it is solved for
the whole batch. With p'_t = τ fixed the best others are found greedily: what is likeliest costs most and is taken away
first, what is least likely gets it, up to the cap τ − margin. The cost as a function of τ is convex and piecewise
linear, with a known slope, and its tangents lead to the minimum (Kelley 1960, in one dimension).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stillproof.errors import InputError
from stillproof.serving.responses import Response, Strength, winner_of

Array = npt.NDArray[Any]

SMALLEST = 1e-6
"""Added to p before its logarithm, as the reference code does."""

MARGIN = 1e-4
"""What the argmax keeps ahead of every other class, or as much as the answer has and ε allows."""

EXACT = 1e-13
"""How near the tangents' meeting point must come to the cost itself."""

MOST_STEPS = 200


@dataclass(frozen=True, slots=True)
class _Rows:
    """Answers with the argmax apart: float64."""

    top: Array
    """(n, 1)."""
    others: Array
    """The likeliest first, (n, K − 1)."""
    top_cost: Array
    costs: Array
    margin: Array
    budget: float
    """ε/2: the mass that may move."""

    def range(self) -> tuple[Array, Array]:
        """Between which τ the programme has a solution, (n, 1) each."""
        K = self.others.shape[1] + 1
        capped = np.cumsum(self.others + self.margin, axis=1)  # what the c likeliest must come down to τ − margin from
        counts = np.arange(1, K)
        from_others = ((capped - self.budget) / counts).max(axis=1, keepdims=True)
        with_top = ((self.top + capped - self.budget) / (counts + 1)).max(axis=1, keepdims=True)
        room = (1 + (K - 1) * self.margin) / K
        low = np.maximum.reduce([from_others, with_top, self.top - self.budget, room])
        return low, np.maximum(low, np.minimum(1.0, self.top + self.budget))

    def solve(self, tau: Array) -> tuple[Array, Array, Array]:
        """The best others for τ, (n, K − 1); the cost, and a slope of it there, (n, 1) each."""
        cap = tau - self.margin
        level, room = np.minimum(self.others, cap), np.maximum(cap - self.others, 0)
        down, up = np.maximum(self.top - tau, 0), np.maximum(tau - self.top, 0)
        takeable = self.budget - down - (self.others - level).sum(axis=1, keepdims=True)
        taken = np.minimum(np.maximum(takeable - (level.cumsum(axis=1) - level), 0), level)
        filled_before = room[:, ::-1].cumsum(axis=1)[:, ::-1] - room
        given = np.minimum(np.maximum(self.budget - up - filled_before, 0), room)
        # with budget to spare everything lies with the least likely classes, as full as the cap allows
        after = np.arange(self.others.shape[1] - 1, -1, -1)
        spare = np.minimum(np.maximum(1 - tau - cap * after, 0), cap)
        needed = up + np.maximum(spare - self.others, 0).sum(axis=1, keepdims=True)
        enough = needed <= self.budget
        best = np.where(enough, spare, level - taken + given)
        cost = self.top_cost * tau + (self.costs * best).sum(axis=1, keepdims=True)
        return best, cost, np.where(enough, self._slope_spare(spare, cap), self._slope(tau, level, taken, room, given))

    def _slope(self, tau: Array, level: Array, taken: Array, room: Array, given: Array) -> Array:
        """All of the budget is used: who rises with the cap is paid for by the next to take from, or to give to."""
        next_taken = self._cost_at((taken < level).argmax(axis=1))
        next_given = self._cost_at(self.costs.shape[1] - 1 - (given < room)[:, ::-1].argmax(axis=1))
        held_down = (level < self.others) & (taken == 0)
        full = (given == room) & (room > 0)
        rising = held_down * (self.costs - next_taken) + full * (self.costs - next_given)
        slope: Array = (
            self.top_cost - np.where(tau < self.top, next_taken, next_given) + rising.sum(axis=1, keepdims=True)
        )
        return slope

    def _slope_spare(self, spare: Array, cap: Array) -> Array:
        full = spare >= cap
        last = np.maximum(self.costs.shape[1] - 1 - full.sum(axis=1), 0)
        next_filled = self._cost_at(last)
        slope: Array = self.top_cost - next_filled + (full * (self.costs - next_filled)).sum(axis=1, keepdims=True)
        return slope

    def _cost_at(self, index: Array) -> Array:
        return np.take_along_axis(self.costs, index[:, None], axis=1)


def least_informative(p: Array, winner: Array, epsilon: float) -> Array:
    """The solution of the programme for every row: float64, (n, K).

    p: probabilities, float64, (n, K); winner: the argmax of each row, int, (n, 1).
    """
    n = np.arange(len(p))[:, None]
    first = p.copy()
    np.put_along_axis(first, winner, np.inf, axis=1)
    order = np.argsort(-first, axis=1, kind="stable")
    ranked = np.take_along_axis(p, order, axis=1)
    costs = np.log(ranked + SMALLEST)
    lead = np.maximum(ranked[:, :1] - ranked[:, 1:2], epsilon / 2)
    rows = _Rows(ranked[:, :1], ranked[:, 1:], costs[:, :1], costs[:, 1:], np.minimum(MARGIN, lead), epsilon / 2)
    tau, others = _minimum(rows)
    solved = np.empty_like(p)
    solved[n, order] = np.concatenate([tau, others], axis=1)
    return solved


def _minimum(rows: _Rows) -> tuple[Array, Array]:
    """τ and the others where the cost is least."""
    low, high = rows.range()
    at_low, cost_low, slope_low = rows.solve(low)
    if (slope_low >= 0).all():  # a victim that is sure of its answer: all of the budget comes from the argmax
        return low, at_low
    at_high, cost_high, slope_high = rows.solve(high)
    is_low = (slope_low >= 0) | (cost_low <= cost_high)  # row by row, whatever else is in the batch
    tau, best, cost = (
        np.where(is_low, low, high),
        np.where(is_low, at_low, at_high),
        np.where(is_low, cost_low, cost_high),
    )
    open_rows = (slope_low < 0) & (slope_high > 0)
    for step in range(MOST_STEPS):
        if not open_rows.any():
            break
        steepening = np.where(open_rows, slope_high - slope_low, 1.0)
        meeting = (cost_low - cost_high - slope_low * low + slope_high * high) / steepening
        least = cost_low + slope_low * (meeting - low)
        if step % 3 == 2:  # tangents alone may close in slowly where there are many pieces
            meeting = (low + high) / 2
        middle = np.where(open_rows, np.clip(meeting, low, high), tau)
        at, found, slope = rows.solve(middle)
        better = open_rows & (found < cost)
        tau, cost, best = np.where(better, middle, tau), np.where(better, found, cost), np.where(better, at, best)
        open_rows &= (cost - least > EXACT) & (slope != 0) & (middle > low) & (middle < high)
        falling = slope < 0
        low, high = np.where(falling, middle, low), np.where(falling, high, middle)
        cost_low, cost_high = np.where(falling, found, cost_low), np.where(falling, cost_high, found)
        slope_low, slope_high = np.where(falling, slope, slope_low), np.where(falling, slope_high, slope)
    return tau, best


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
        if self.epsilon == 0:
            return logits
        winner = winner_of(logits)
        p = logits.detach().double().softmax(dim=1).cpu().numpy()
        solved = torch.from_numpy(least_informative(p, winner.cpu().numpy(), self.epsilon)).to(logits.device)
        return solved.clamp_min(0).log().float()
