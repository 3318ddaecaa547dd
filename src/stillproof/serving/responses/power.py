"""p^a renormalised: a change of every answer that takes nothing from a thief who tunes the temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from stillproof.errors import InputError
from stillproof.serving.responses import Response, Strength


@dataclass(frozen=True, kw_only=True)
class Power(Response):
    """Serves p^exponent, renormalised: the victim's answer at temperature 1/exponent.

    No defence, a control: what protects against a thief who tries several temperatures must do more than this.
    """

    exponent: float = 1 / 3

    keeps_argmax: ClassVar[bool] = True
    strength: ClassVar[Strength | None] = Strength("exponent", weakest=1, strongest=1e-3)

    def __post_init__(self) -> None:
        if not 0 < self.exponent <= 100:
            raise InputError(f"exponent={self.exponent:g} keeps no order of the classes.", "Give up to 100, above 0.")

    @property
    def title(self) -> str:
        return f"p^{self.exponent:.3g}"

    def __call__(self, logits: Tensor, images: Tensor | None = None, state: nn.Module | None = None) -> Tensor:  # noqa: ARG002
        return logits * self.exponent
