"""Responses at equal cost: the strength at which the served probabilities differ as much as is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from stillproof.errors import InputError
from stillproof.serving.guard import Guard, guard
from stillproof.serving.responses import Response
from stillproof.serving.responses.joined import parts_of

STEPS = 40

NEAR = 0.02
"""How near the L1 distance must come, as a share of what was wanted: rounding goes in leaps."""


class _Given(nn.Module):
    """Serves answers that are known already, whatever the images."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, _images: Tensor) -> Tensor:
        return self.logits


def mean_l1(guarded: Guard, logits: Tensor, images: Tensor) -> float:
    """Mean over the images of ‖p' − p‖₁: p the softmax of the logits, p' what is served. In [0, 2]."""
    served = guarded(images).double().exp()
    return float((served - logits.double().softmax(dim=1)).abs().sum(dim=1).mean())


@torch.no_grad()
def calibrated(
    response: Response,
    logits: Tensor,
    l1: float,
    *,
    images: Tensor | None = None,
    helpers: Sequence[nn.Module] = (),
) -> Response:
    """The same response with its strength (β, ε, decimals, …) set so that mean ‖p' − p‖₁ over the answers is `l1`.

    logits: of the undefended classifier, (n, K). images: float32, (n, C, H, W), and helpers: for a response that needs
    them. By bisection; of a joined response no strength is tuned. Raises InputError where the distance cannot be
    reached, or no option is continuous.
    """
    if response.strength is None or len(parts_of(response)) > 1:
        raise InputError(
            f"{response.title} has no strength that could be tuned to an L1 distance.",
            "Tune one response: round, power, reverse-sigmoid, mad, adaptive-misinformation, modelguard-w or -s.",
        )
    if response.reads_images and images is None:
        raise InputError(f"{response.title} reads the images.", "Give them as images=.")
    seen = logits.new_zeros(len(logits), 0) if images is None else images
    option = response.strength.option

    def at(value: float) -> Response:
        return cast(Response, replace(cast(Any, response), **{option: value}))

    def distance(value: float) -> float:
        return mean_l1(guard(_Given(logits), at(value), helpers), logits, seen)

    weak, strong = response.strength.weakest, response.strength.strongest
    most, best = distance(strong), (abs(distance(weak) - l1), weak)
    if not 0 <= l1 <= most + NEAR * l1:
        raise InputError(
            f"{response.title} cannot change these answers by L1 {l1:g} on average.",
            f"At its strongest ({option}={strong:g}) it reaches {most:.3g}.",
        )
    best = min(best, (abs(most - l1), strong))
    for _ in range(STEPS):
        middle = (weak + strong) / 2
        found = distance(middle)
        best = min(best, (abs(found - l1), middle))
        weak, strong = (middle, strong) if found < l1 else (weak, middle)
    if best[0] > NEAR * max(l1, 1e-9):
        raise InputError(
            f"{response.title} leaps over L1 {l1:g} on these answers: the nearest is {best[0]:.3g} away.",
            "Give more images, or another distance.",
        )
    return at(best[1])
