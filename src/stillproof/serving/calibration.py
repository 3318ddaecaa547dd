"""Responses at equal cost: the strength at which the served probabilities differ as much as is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from stillproof.core.images import batches
from stillproof.errors import InputError
from stillproof.serving.guard import Guard, guard
from stillproof.serving.responses import Response
from stillproof.serving.responses.joined import parts_of

STEPS, LOOKS = 40, 12
"""Of the bisection; and of the look at all strengths before it."""

AT_ONCE = 256
"""Answers that are changed at once."""

NEAR, NOTHING = 0.02, 1e-5
"""How near the L1 distance must come, as a share of what was wanted: rounding goes in leaps. What is no distance."""


class _Given(nn.Module):
    """Serves answers that are known already: those of `rows`, whatever the images."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.rows = logits, slice(0, len(logits))

    def forward(self, _images: Tensor) -> Tensor:
        return self.logits[self.rows]


def mean_l1(guarded: Guard, images: Tensor, given: Sequence[_Given]) -> float:
    """Mean over the images of ‖p' − p‖₁: p the softmax of the first's answers, p' what is served. In [0, 2].

    given: what stands for the classifier, and for the helpers.
    """
    total = 0.0
    for rows in batches(len(images), AT_ONCE):
        for one in given:
            one.rows = rows
        served = guarded(images[rows]).double().exp()
        total += float((served - given[0](images).double().softmax(dim=1)).abs().sum())
    return total / max(1, len(images))


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A response, and the mean L1 distance that it has on the answers it was tuned on."""

    response: Response
    l1: float

    def misses(self, wanted: float) -> bool:
        """Whether that is not what was wanted."""
        return abs(self.l1 - wanted) > max(NEAR * wanted, NOTHING)


@torch.no_grad()
def nearest_to(
    response: Response,
    logits: Tensor,
    l1: float,
    *,
    images: Tensor | None = None,
    helpers: Sequence[nn.Module] = (),
) -> Calibrated:
    """The same as `calibrated`; where the distance cannot be reached, the strength that comes nearest.

    Raises InputError where no option is continuous.
    """
    if response.strength is None or len(parts_of(response)) > 1:
        raise InputError(
            f"{response.title} has no strength that could be tuned to an L1 distance.",
            "Tune one response: round, power, reverse-sigmoid, mad, adaptive-misinformation, modelguard-w or -s.",
        )
    if not 0 <= l1 <= 2:  # NaN is outside
        raise InputError(f"{l1:g} is no L1 distance of probabilities.", "Give 0 to 2.")
    if response.reads_images and images is None:
        raise InputError(f"{response.title} reads the images.", "Give them as images=.")
    seen = logits.new_zeros(len(logits), 0) if images is None else images
    option = response.strength.option
    asked = [  # once, not at every strength
        _Given(torch.cat([helper(images[rows]) for rows in batches(len(images), AT_ONCE)]))
        for helper in helpers
        if images is not None
    ]

    def at(value: float) -> Response:
        return cast(Response, replace(cast(Any, response), **{option: value}))

    def distance(value: float) -> float:
        served = _Given(logits)
        return mean_l1(guard(served, at(value), asked), seen, [served, *asked])

    weakest, strongest = response.strength.weakest, response.strength.strongest
    looked = [weakest + (strongest - weakest) * part / LOOKS for part in range(LOOKS + 1)]
    tried = {value: distance(value) for value in looked}
    # rounding does not only grow with its strength: the first interval, from the weak end, that holds the distance
    crossed = (pair for pair in pairwise(looked) if tried[pair[0]] <= l1 <= tried[pair[1]])
    weak, strong = next(crossed, (weakest, weakest))
    for _ in range(STEPS if strong != weak else 0):
        middle = (weak + strong) / 2
        tried[middle] = distance(middle)
        weak, strong = (middle, strong) if tried[middle] < l1 else (weak, middle)
    best = min(tried, key=lambda value: (abs(tried[value] - l1), value))
    return Calibrated(at(best), tried[best])


def calibrated(
    response: Response,
    logits: Tensor,
    l1: float,
    *,
    images: Tensor | None = None,
    helpers: Sequence[nn.Module] = (),
) -> Response:
    """The same response with its strength (β, ε, decimals, …) set so that mean ‖p' − p‖₁ over the answers is `l1`.

    logits: of the undefended classifier, (n, K). images: float32, (n, C, H, W), and helpers, in eval mode: for a
    response that needs them. By bisection; of a joined response no strength is tuned. Raises InputError where the
    distance cannot be reached, or no option is continuous.
    """
    found = nearest_to(response, logits, l1, images=images, helpers=helpers)
    if found.misses(l1):
        raise InputError(
            f"{response.title} cannot change these answers by L1 {l1:g} on average: the nearest is {found.l1:.3g}.",
            "Give another distance, or, where it leaps, more images.",
        )
    return found.response
