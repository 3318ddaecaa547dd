"""A thief, a response, an objective, a source and a model of another package.

    pip install -e examples/plug_in
    stillproof steal --data stripes --victim zoo:linear --thief-model zoo:linear --queries 5/class \
      --thief kd,stubborn --defence 'shy?by=0.9'
    stillproof distill --data stripes --teacher zoo:linear --student zoo:linear --objective squared
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stillproof
from stillproof.core.sources.source import Facts, Opened, from_sets
from stillproof.theft.thieves import NOTHING


@dataclass(frozen=True, kw_only=True)
class Stubborn:
    """KD without labels that has made up its mind. Fields are options: `stubborn?temperature=2`."""

    temperature: float = 3.0

    needs_labels: ClassVar[bool] = False
    reads: ClassVar[Literal["scores", "label"]] = "scores"
    knows: ClassVar[str] = NOTHING

    @property
    def title(self) -> str:
        """How a report calls it."""
        return f"stubborn, T = {self.temperature:g}"

    def candidates(self) -> tuple[stillproof.Distillation, ...]:
        """What it tries before it settles: one thing."""
        return (stillproof.Distillation(temperature=self.temperature, alpha=1.0),)


@dataclass(frozen=True, kw_only=True)
class Shy(stillproof.Response):
    """Serves answers nearer to uniform."""

    by: float = 0.5

    keeps_argmax: ClassVar[bool] = True  # a promise that is enforced

    def __post_init__(self) -> None:
        if not 0 <= self.by < 1:
            raise stillproof.InputError(f"by={self.by:g} leaves no answer.", "Give 0 to 1, and less than 1.")

    @property
    def title(self) -> str:
        """How a report calls it."""
        return f"shy by {self.by:g}"

    def __call__(self, logits: Tensor, images: Tensor | None = None, state: nn.Module | None = None) -> Tensor:  # noqa: ARG002
        """(N, K) -> (N, K); what is served is the softmax."""
        return logits * (1 - self.by)


@dataclass(frozen=True, kw_only=True)
class Squared:
    """Cross-entropy, and the squared difference of student's and teacher's log-probabilities."""

    weight: float = 0.01

    def __call__(self, student: nn.Module, batch: stillproof.Batch) -> Tensor:
        """A scalar. The teacher's answers are a column, log-probabilities, (n, K)."""
        logits = student(batch.images).float()
        far = F.mse_loss(logits.log_softmax(dim=1), batch.columns["teacher"].clamp(min=-20))
        return F.cross_entropy(logits, batch.known_labels()) + self.weight * far


@dataclass(frozen=True, kw_only=True)
class Stripes(stillproof.Source):
    """Grey 8×8 images of stripes in four directions, with noise."""

    many: int = 800

    def identity(self) -> Mapping[str, object]:
        """Changes whenever the images do."""
        return {"source": "stripes", "many": self.many, "version": 1}

    def facts(self) -> Facts:
        """How many there are, before any is made: training, test, classes."""
        return Facts(self.many, self.many // 4, 4)

    def open(self) -> Opened:
        """All of them, in memory."""
        return from_sets(self._made(self.many, seed=0), self._made(self.many // 4, seed=1))

    def _made(self, many: int, *, seed: int) -> stillproof.ImageSet:
        drawn = torch.Generator().manual_seed(seed)
        labels = torch.arange(many) % 4
        rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        waves = torch.stack([torch.sin(1.6 * way) for way in (rows, columns, rows + columns, rows - columns)])
        noise = torch.randn(many, 8, 8, generator=drawn)
        pixels = (127 + 60 * waves[labels] + 60 * noise).clamp(0, 255).to(torch.uint8)
        return stillproof.ImageSet(pixels[:, None], labels, ("rows", "columns", "up", "down"), "stripes")


def linear(*, channels: int, size: int, classes: int) -> nn.Module:
    """A model of the zoo: images in [0, 1], (N, C, H, W) -> logits, (N, K)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes))
