"""CMIM: a teacher whose soft answers say of an image no more than its class, at every temperature.

Source: Ye, Hamidi & Yang 2025, arXiv 2507.00012. From the paper: the loss, cross-entropy plus λ times the conditional
mutual information of the image and the temperature-scaled answer, given the label, over the temperature spectrum. Its
code could not be read. Not known, and chosen here: λ, the temperatures and how they are averaged (plainly, without a
factor T²), and how the class means are followed (the same authors' code for arXiv 2401.08732 keeps running means too).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.carving import carve
from stillproof.core.distillation import Batch
from stillproof.core.noise import derive
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.stages import model_of
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import InputError
from stillproof.theft.hardening.outcome import train_hardened


def class_means(probabilities: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean answer to the images of each class, (..., classes, K); zeros for a class that has none here.

    probabilities: (..., N, K); labels: int64, (N,).
    """
    members = F.one_hot(labels, classes).to(probabilities.dtype)
    return members.T @ probabilities / members.sum(dim=0).clamp_min(1)[:, None]


def divergence_from(means: Tensor, log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """KL(p ‖ m_y) in nats, mean over images and whatever dimensions stand before.

    means: m, (..., classes, K); log_probabilities: log p, (..., N, K); labels: y, int64, (N,). Returns a scalar.
    """
    tiny = torch.finfo(means.dtype).tiny  # a mean may underflow where the logarithm of a p does not
    expected = means[..., labels, :].clamp_min(tiny).log()
    return (log_probabilities.exp() * (log_probabilities - expected)).sum(dim=-1).mean()


def conditional_information(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """I(X; Ŷ | Y) of a batch in nats, Ŷ drawn from softmax(z/T): how far answers are from the mean of their class.

        Σ_y P(y) mean_{x of y} KL(p(x) ‖ m_y),   m_y = mean_{x of y} p(x)

    logits: z, (N, K); labels: int64, (N,). Returns a scalar: 0 where all images of a class get one answer.
    It is the smallest that the sum can be over all m: any other m gives more. softmax(z/T) is the power transform
    p^(1/T), renormalised. Source: Ye et al. 2025, arXiv 2507.00012.
    """
    logs = F.log_softmax(logits / temperature, dim=1)
    return divergence_from(class_means(logs.exp(), labels, int(labels.max()) + 1), logs, labels)


@dataclass(frozen=True, kw_only=True)
class CMIM:
    """L = CE + λ · mean over T of I(X; Ŷ^(1/T) | Y), Ŷ^(1/T) = softmax(z/T).

    T runs from 1 to `hottest` in equal ratios (1, 2, 4, 8, 16). Each class has a running mean of its answers at each T,
    held fixed within a step: at the true mean the information does not change with it, so nothing is lost of the
    gradient. See the head of this file for what is not the paper's.
    """

    weight: float = 5.0
    """λ. On digits 5 leaves a quarter of the information at T = 4, and costs up to two points of accuracy."""
    hottest: float = 16.0
    """The largest T."""
    points: int = 5
    """How many temperatures."""
    memory: float = 0.98
    """What a class's running mean keeps when an image of it is seen; with 0 it is the batch's mean."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.hottest < 1 or self.points < 1 or not 0 <= self.memory < 1:
            raise InputError(
                f"weight={self.weight:g}, hottest={self.hottest:g}, points={self.points}, "
                f"memory={self.memory:g} is no CMIM.",
                "weight 0 or more, hottest and points 1 or more, memory in [0, 1).",
            )

    @property
    def title(self) -> str:
        changed = [
            f"{name}={getattr(self, name):g}"
            for name, field in self.__dataclass_fields__.items()
            if getattr(self, name) != field.default
        ]
        return f"cmim ({', '.join(changed)})" if changed else "cmim"

    @property
    def temperatures(self) -> tuple[float, ...]:
        """T: from 1 to the hottest, in equal ratios."""
        steps = max(self.points - 1, 1)
        return tuple(self.hottest ** (number / steps) for number in range(self.points))

    def stage(self, victim: Stage, data: Stage, *, recipe: Recipe, images: int, seed: int) -> Stage:
        return stage(
            train_concentrated,
            f"harden: {self.title}, seed {seed}",
            passes=images * 3 * recipe.epochs,
            victim=victim,
            data=data,
            method=self,
            recipe=recipe,
            seed=derive(seed, "hardening"),  # not the victim's: a retraining is what the gate compares with
        )


class Concentration(nn.Module):
    """The objective of CMIM, with the running means of each class at each temperature: (temperatures, K, K)."""

    temperatures: Tensor
    means: Tensor
    seen: Tensor

    def __init__(self, method: CMIM, classes: int) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("temperatures", torch.tensor(method.temperatures)[:, None, None])
        self.register_buffer("means", torch.full((method.points, classes, classes), 1 / classes))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    def forward(self, teacher: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar."""
        output, labels = teacher(batch.images), batch.known_labels()
        logs = F.log_softmax(output / self.temperatures, dim=2)
        self._follow(logs.detach().exp(), labels)
        information = divergence_from(self.means, logs, labels)
        return F.cross_entropy(output, labels) + self.method.weight * information

    @torch.no_grad()
    def _follow(self, probabilities: Tensor, labels: Tensor) -> None:
        """Move each class's means towards what was answered to its images, the further the more of them there were."""
        classes = len(self.seen)
        counts = F.one_hot(labels, classes).sum(dim=0)
        kept = torch.where(self.seen, self.method.memory ** counts.float(), (counts == 0).float())
        now = class_means(probabilities, labels, classes)
        self.means.mul_(kept[:, None]).add_((1 - kept)[:, None] * now)
        self.seen |= counts > 0


@job(version=1)
def train_concentrated(
    context: Context, victim: Artefact, data: Artefact, *, method: CMIM, recipe: Recipe, seed: int
) -> Artefact:
    """A fresh classifier of the victim's architecture, trained towards answers that are one for each class."""
    parts = carve(data)
    objective = Concentration(method, len(parts.training.classes))
    return train_hardened(context, parts, objective, model=model_of(victim, context), recipe=recipe, seed=seed)
