"""How weights move: SGD with Nesterov momentum, and Muon for the convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

STEPS = 3
"""Newton-Schulz iterations, as for small images (Jordan 2024); language models take five."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a·x + b·x³ + c·x⁵ that blows small singular values up and keeps large ones near 1 (Jordan 2024)."""


def orthogonalised(updates: Sequence[Tensor]) -> list[Tensor]:
    """About U·Vᵀ of the singular value decomposition of each matrix: its directions, all of about one length.

    updates: matrices, (r, c), of any sizes. Singular values of more than about a thirtieth of the Frobenius norm come
    out between .5 and 1.4; smaller ones grow fortyfold.

    A polynomial of X that is odd is a polynomial of X·Xᵀ times X, so the iteration runs on the smaller Gram matrices,
    those of one size together, and in fp32, as rounding errors of small eigenvalues would grow (Zhang et al. 2026,
    "Gram Newton-Schulz").
    """
    by_size: dict[int, list[int]] = {}
    for number, update in enumerate(updates):
        by_size.setdefault(min(update.shape), []).append(number)
    lengths = torch._foreach_norm(list(updates))
    found: list[Tensor] = list(updates)
    for size, numbers in by_size.items():
        grams = updates[numbers[0]].new_empty(len(numbers), size, size)
        for gram, number in zip(grams, numbers, strict=True):
            narrow = _narrow(updates[number])
            torch.mm(narrow.mT, narrow, out=gram)
        scale = 1 / (torch.stack([lengths[number] for number in numbers]) + 1e-7)[:, None, None]
        factors = _factors(grams * scale**2) * scale
        for factor, number in zip(factors, numbers, strict=True):
            update = updates[number]
            found[number] = update @ factor if _is_tall(update) else factor @ update
    return found


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _narrow(matrix: Tensor) -> Tensor:
    return matrix if _is_tall(matrix) else matrix.mT


def _factors(grams: Tensor) -> Tensor:
    """What X is to be multiplied by, from its Gram matrix: (n, s, s), with eigenvalues in [0, 1]."""
    factors = polynomials = _polynomials(grams)
    for _ in range(STEPS - 1):
        grams = polynomials @ grams @ polynomials
        polynomials = _polynomials(grams)
        factors = polynomials @ factors
    return factors


def _polynomials(grams: Tensor) -> Tensor:
    """a + b·G + c·G², the factor of one step."""
    a, b, c = COEFFICIENTS
    found = torch.baddbmm(grams, grams, grams, beta=b, alpha=c)
    found.diagonal(dim1=1, dim2=2).add_(a)
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
                updates = _orthogonalised_kernels(updates)
                torch._foreach_mul_(weights, 1 - rate * decay)
            torch._foreach_add_(weights, updates, alpha=-rate)

    def _velocity(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(weight)
        velocity: Tensor = state["velocity"]
        return velocity


def _orthogonalised_kernels(kernels: Sequence[Tensor]) -> list[Tensor]:
    """Each kernel, (out, in, h, w), as a matrix of `out` rows; in the order of channels_last, where that is no copy."""
    matrices = orthogonalised([kernel.permute(0, 2, 3, 1).flatten(1) for kernel in kernels])
    found: list[Tensor] = []
    for matrix, kernel in zip(matrices, kernels, strict=True):
        rows, inputs, height, width = kernel.shape
        found.append(matrix.view(rows, height, width, inputs).permute(0, 3, 1, 2))
    return found
