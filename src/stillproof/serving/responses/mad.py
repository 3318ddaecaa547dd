"""MAD, prediction poisoning (Orekondy et al. 2020, arXiv 1906.10908): turn the thief's gradient as far as L1 allows.

A thief who minimises Σ_k −p'_k log q_k(x; w) steps along Gᵀp', where row k of G is the gradient of −log q_k. MAD
serves the p' that maximises ‖Gᵀp'/‖Gᵀp'‖ − Gᵀp/‖Gᵀp‖‖², w being the weights of the last layer of a surrogate of the
thief's network. There row k is (q − e_k) ⊗ h with the layer's input h, so Gᵀp' = (q − p') ⊗ h, and h cancels: all that
the objective needs of the surrogate is its answer q. The reference code finds the same by automatic differentiation,
image by image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from stillproof.core.adapters import logits_of
from stillproof.core.carving import carve
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.stages import classifier_artefact, fresh_student, model_of
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import InputError
from stillproof.serving.responses import Response, Strength, winner_of, with_winner

EXHAUSTIVE = 10
"""Classes up to which all subsets that hold the argmax are tried; beyond, they are grown one class at a time."""

LEAD = 1e-5
"""What the argmax has more than the others of its subset, before normalisation."""

ALIKE = 1e-9
"""Difference of two values of the objective that is rounding."""

SMALL = 1e-30


def turned(p: Tensor, target: Tensor, q: Tensor) -> Tensor:
    """½‖u/‖u‖ − v/‖v‖‖² of u = q − target and v = q − p: 1 − cos, (n, m).

    p, q: probabilities, (n, K); target: (n, m, K).
    """
    v = (q - p)[:, None]
    u = q[:, None] - target
    cosine: Tensor = (u * v).sum(dim=2) / (u.norm(dim=2) * v.norm(dim=2)).clamp_min(SMALL)
    return 1 - cosine


def extreme(p: Tensor, q: Tensor) -> Tensor:
    """The one-hot answer that turns the gradient most, (n, K)."""
    corners = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    return _best(p, q, corners.expand(len(p), -1, -1))[0]


def extreme_keeping(p: Tensor, q: Tensor, winner: Tensor) -> Tensor:
    """The answer, uniform over some classes with the winner among them, that turns the gradient most, (n, K)."""
    K = p.shape[1]
    first = torch.zeros_like(p).scatter(1, winner, 1.0)
    if K <= EXHAUSTIVE:
        numbers = torch.arange(2**K, device=p.device)
        subsets = ((numbers[:, None] >> torch.arange(K, device=p.device)) & 1).to(p.dtype)
        candidates = subsets[None].maximum(first[:, None])  # each subset twice, with its winner added: no matter
        return _best(p, q, _led(candidates, first))[0]
    chosen, found = first, _led(first[:, None], first)
    value = turned(p, found, q)[:, 0]
    found = found[:, 0]
    for _ in range(K - 1):  # as the reference code does; it stops after 1024 tries, this at all classes
        grown = chosen[:, None] + torch.eye(K, dtype=p.dtype, device=p.device)
        answer, reached = _best(p, q, _led(grown.clamp(max=1), first), chosen.bool())
        better = reached > value
        found = torch.where(better[:, None], answer, found)
        value = torch.where(better, reached, value)
        chosen = (answer > 0).to(p.dtype)
    return found


def _led(subsets: Tensor, first: Tensor) -> Tensor:
    answers = subsets + LEAD * first[:, None]
    return answers / answers.sum(dim=2, keepdim=True)


def _best(p: Tensor, q: Tensor, candidates: Tensor, taken: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best candidate of each row and its value, of equal ones the nearest to p; `taken`, bool (n, m), are none.

    Of two classes all answers turn the gradient by nothing or right round: without a rule rounding would decide.
    """
    values = turned(p, candidates, q)
    values = values if taken is None else values.masked_fill(taken, -torch.inf)
    value = values.amax(dim=1)
    distance = (candidates - p[:, None]).abs().sum(dim=2)
    index = distance.masked_fill(values < value[:, None] - ALIKE, torch.inf).argmin(dim=1)
    return candidates[torch.arange(len(p), device=p.device), index], value


@dataclass(frozen=True, kw_only=True)
class MAD(Response):
    """Serves (1 − a)p + a·p*, p* turning the gradient most and a as large as ‖p' − p‖₁ ≤ ε lets it be.

    argmax=true searches p* among the answers, uniform over a subset, that keep the argmax; argmax=false among the
    one-hots. The surrogate is a fresh network of the victim's architecture, as ModelGuard's evaluation of MAD has it;
    ε 1 is from there too.
    """

    epsilon: float = 1.0
    argmax: bool = True

    version: ClassVar[int] = 3
    reads_images: ClassVar[bool] = True
    needs_helper: ClassVar[bool] = True
    strength: ClassVar[Strength | None] = Strength("epsilon", weakest=0, strongest=2)

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 2:
            raise InputError(f"epsilon={self.epsilon:g} is no L1 distance of probabilities.", "Give 0 to 2.")

    @property
    def keeps_argmax(self) -> bool:  # type: ignore[override]  # an option decides
        return self.argmax

    @property
    def title(self) -> str:
        return f"MAD (ε = {self.epsilon:g}, argmax {'kept' if self.argmax else 'not kept'})"

    def __call__(self, logits: Tensor, images: Tensor | None = None, state: nn.Module | None = None) -> Tensor:
        if images is None or state is None:
            raise InputError("MAD turns the gradient of a surrogate network at an image.", "Give images and a helper.")
        if self.epsilon == 0:
            return logits
        winner = winner_of(logits)
        p, q = logits.double().softmax(dim=1), state(images).double().softmax(dim=1)
        target = extreme_keeping(p, q, winner) if self.argmax else extreme(p, q)
        turns = turned(p, target[:, None], q) > ALIKE
        target = torch.where(turns, target, p)  # what turns nothing is not worth a change
        distance = (target - p).abs().sum(dim=1, keepdim=True)
        a = (self.epsilon / distance.clamp_min(SMALL)).clamp(max=1)
        served = logits_of(p + a * (target - p)).float()
        return with_winner(served, winner) if self.argmax else served

    def prepare(self, victim: Stage, data: Stage, *, recipe: Recipe, images: int, seed: int) -> Stage | None:  # noqa: ARG002
        return stage(
            fresh_surrogate,
            f"a fresh surrogate for MAD, seed {seed}",
            victim=victim,
            data=data,
            seed=derive(seed, "surrogate"),  # neither the victim's beginning nor the thief's
        )


@job(version=1)
def fresh_surrogate(context: Context, victim: Artefact, data: Artefact, *, seed: int) -> Artefact:
    """A network of the victim's architecture with fresh weights."""
    model, training = model_of(victim, context), carve(data).training
    return classifier_artefact(fresh_student(training, model, seed).eval(), model.untrained, training, cost=Cost())
