"""Stingy Teacher (Ma et al., ICLR workshop 2022): sparse logits.

N/K is .2 with 10 classes and .1 with 100. The reference code sparsifies inside the thief's loss, at T = 20; here the
served answer is sparse, whatever the thief does with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from stillproof.errors import InputError
from stillproof.serving.responses import Response
from stillproof.serving.responses.top import largest_kept


@dataclass(frozen=True, kw_only=True)
class Stingy(Response):
    """Serves the largest logits, a share of all, at least one; the rest −inf."""

    share: float = 0.2
    """N/K."""

    keeps_argmax: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share={self.share:g} is no share of the classes.", "Give more than 0, at most 1.")

    @property
    def title(self) -> str:
        return f"stingy (N/K = {self.share:g})"

    def __call__(self, logits: Tensor, images: Tensor | None = None, state: nn.Module | None = None) -> Tensor:  # noqa: ARG002
        return largest_kept(logits, max(1, round(self.share * logits.shape[1])))
