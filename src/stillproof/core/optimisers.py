"""How weights move: SGD with Nesterov momentum, and Muon for the convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

STEPS = 3
"""Newton-Schulz iterations, as for small images (Jordan 2024); language models take five."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a·x + b·x³ + c·x⁵ that blows small singular values up and keeps large ones near 1 (Jordan 2024)."""


def orthogonalised(updates: Tensor) -> Tensor:
    """About U·Vᵀ of the singular value decomposition of each matrix: its directions, all of about one length.

    updates: (n, r, c). Singular values of more than about a thirtieth of the Frobenius norm come out between .5 and
    1.4; smaller ones grow fortyfold. Computed in bf16.
    """
    a, b, c = COEFFICIENTS
    tall = updates.shape[1] > updates.shape[2]
    wide = (updates.mT if tall else updates).bfloat16()
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    found: Tensor = (wide.mT if tall else wide).to(updates.dtype)
    return found


class NesterovMuon(Optimizer):
    """SGD with Nesterov momentum; in groups with `orthogonal=True` (convolutions), each step is orthogonalised (Muon).

    A kernel, (out, in, h, w), counts as a matrix of `out` rows. Weight decay is added to the gradient; in orthogonal
    groups it is taken off the weight instead.
    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float) -> None:
        super().__init__(groups, {"momentum": momentum, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One step. The closure of torch's protocol is not used."""
        for group in self.param_groups:
            rate, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            if decay and not group["orthogonal"]:
                gradients = list(torch._foreach_add(gradients, weights, alpha=decay))
            velocities = [self._velocity(weight) for weight in weights]
            torch._foreach_mul_(velocities, momentum)
            torch._foreach_add_(velocities, gradients)
            updates = list(torch._foreach_add(gradients, velocities, alpha=momentum))
            if group["orthogonal"]:
                updates = _all_orthogonalised(updates)
                torch._foreach_mul_(weights, 1 - rate * decay)
            torch._foreach_add_(weights, updates, alpha=-rate)

    def _velocity(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(weight)
        velocity: Tensor = state["velocity"]
        return velocity


def _all_orthogonalised(kernels: Iterable[Tensor]) -> list[Tensor]:
    """Each kernel, those of one shape together. In the order of channels_last, which costs no copy there."""
    found: list[Tensor] = []
    for shape, alike in groupby(kernels, key=lambda kernel: kernel.shape):
        rows, inputs, height, width = shape
        matrices = torch.stack([kernel.permute(0, 2, 3, 1).flatten(1) for kernel in alike])
        for matrix in orthogonalised(matrices):
            found.append(matrix.view(rows, height, width, inputs).permute(0, 3, 1, 2))
    return found
