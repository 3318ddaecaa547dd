"""The k most likely classes, and nothing about the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from stillproof.errors import InputError
from stillproof.serving.responses import Response


def largest_kept(logits: Tensor, keep: int) -> Tensor:
    """The `keep` largest logits of each row, all others −inf; among equals the first ones. logits: (n, K)."""
    if keep >= logits.shape[1]:
        return logits
    order = logits.argsort(dim=1, descending=True, stable=True)
    return logits.scatter(1, order[:, keep:], -torch.inf)


@dataclass(frozen=True, kw_only=True)
class Top(Response):
    """Serves the k largest probabilities, renormalised; every other class has probability 0.

    The oracle's own `--reveal top-3` leaves the three as they are, and so tells how much the others have together.
    """

    k: int = 3

    keeps_argmax: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"k={self.k} serves nothing.", "Give 1 or more.")

    @property
    def title(self) -> str:
        return f"top-{self.k}"

    def __call__(self, logits: Tensor, images: Tensor | None = None, state: nn.Module | None = None) -> Tensor:  # noqa: ARG002
        return largest_kept(logits, self.k)
