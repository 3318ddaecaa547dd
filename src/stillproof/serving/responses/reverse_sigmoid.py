"""Reverse sigmoid (Lee et al. 2018, arXiv 1806.00054): one served answer stands for several true ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from stillproof.errors import InputError
from stillproof.serving.responses import Response, Strength

MOST = 1e6
"""Of γ and β: with more, float32 overflows."""


def reverse_sigmoid(log_probabilities: Tensor, beta: float, gamma: float) -> Tensor:
    """p − β(σ(γ·logit p) − ½), not below 0, (n, K); not normalised.

    log_probabilities: (n, K). No row is all 0: of every row at least one class has p ≤ ½, to which it adds.
    """
    p = log_probabilities.exp()
    odds = log_probabilities - (-log_probabilities.expm1()).log()  # −inf at p = 0, +inf at p = 1
    return (p - beta * ((gamma * odds).sigmoid() - 0.5)).clamp_min(0)


@dataclass(frozen=True, kw_only=True)
class ReverseSigmoid(Response):
    """Serves p' ∝ p − β(σ(γ·logit p) − ½).

    γ .2 with β .02 (CIFAR-10) or .008 (Caltech-256), as ModelGuard's reference code sets them. argmax is kept where
    the two largest probabilities differ by more than β, and not promised.
    """

    gamma: float = 0.2
    beta: float = 0.02

    strength: ClassVar[Strength | None] = Strength("beta", weakest=0, strongest=8)

    def __post_init__(self) -> None:
        if not (0 < self.gamma <= MOST and 0 <= self.beta <= MOST):
            raise InputError(
                f"gamma={self.gamma:g}, beta={self.beta:g} is no reverse sigmoid.",
                f"gamma above 0, beta 0 or more, both at most {MOST:g}.",
            )

    @property
    def title(self) -> str:
        return f"reverse sigmoid (γ = {self.gamma:g}, β = {self.beta:g})"

    def __call__(self, logits: Tensor, images: Tensor | None = None, state: nn.Module | None = None) -> Tensor:  # noqa: ARG002
        if self.beta == 0:  # through probabilities the smallest logits would underflow
            return logits
        return reverse_sigmoid(logits.log_softmax(dim=1), self.beta, self.gamma).log()
