"""How weights move: SGD with Nesterov momentum, and Muon for the convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

STEPS = 3
"""Newton-Schulz iterations: enough to bring the singular values near 1; five change no accuracy here."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a·x + b·x³ + c·x⁵ whose slope at 0 is the steepest that keeps [0, 1] near 1. Source: Jordan 2024."""


def orthogonalised(update: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows or columns: U·Vᵀ of its singular value decomposition.

    update: (r, c); its singular values become about 1 (between .7 and 1.2), its singular vectors stay. bf16 inside.
    """
    a, b, c = COEFFICIENTS
    wide = update.bfloat16() if update.shape[0] <= update.shape[1] else update.bfloat16().T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    found: Tensor = (wide if update.shape[0] <= update.shape[1] else wide.T).to(update.dtype)
    return found


class NesterovMuon(Optimizer):
    """SGD with Nesterov momentum; in groups with `orthogonal=True`, each step is orthogonalised first (Muon).

    A parameter of more than two dimensions is a matrix of its first against all others. Weight decay is added to the
    gradient, and in orthogonal groups taken off the weight (decoupled).
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One step. The closure of torch's protocol is not used."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group)

    def _move(self, weight: Tensor, group: dict[str, Any]) -> None:
        rate, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
        gradient = weight.grad if group["orthogonal"] or not decay else weight.grad.add(weight, alpha=decay)  # type: ignore[union-attr]
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        velocity = state["momentum"].mul_(momentum).add_(gradient)
        update = gradient.add(velocity, alpha=momentum)  # type: ignore[union-attr]
        if group["orthogonal"]:
            update = orthogonalised(update.flatten(1)).view_as(update)
            weight.mul_(1 - rate * decay)
        weight.sub_(update, alpha=rate)
