"""Several responses, each applied to what the one before it would have served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stillproof.core.plugins import build
from stillproof.core.spec import Spec
from stillproof.errors import InputError
from stillproof.serving.responses import Response, winner_of, with_winner


@dataclass(frozen=True)
class Joined(Response):
    """`first+second+…`; the same as its parts one after the other. Promises the argmax where all its parts do."""

    parts: tuple[Response, ...]

    @property
    def keeps_argmax(self) -> bool:  # type: ignore[override]  # its parts decide
        return all(part.keeps_argmax for part in self.parts)

    @property
    def reads_images(self) -> bool:  # type: ignore[override]
        return any(part.reads_images for part in self.parts)

    @property
    def needs_helper(self) -> bool:  # type: ignore[override]
        return any(part.needs_helper for part in self.parts)

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return any(part.remembers for part in self.parts)

    @property
    def title(self) -> str:
        return ", then ".join(part.title for part in self.parts)

    def __call__(self, logits: Tensor, images: Tensor | None = None, state: nn.Module | None = None) -> Tensor:
        states = list(state) if isinstance(state, nn.ModuleList) else [None] * len(self.parts)
        for part, own in zip(self.parts, states, strict=True):
            served = part(logits, images, own)
            logits = with_winner(served, winner_of(logits)) if part.keeps_argmax else served
        return logits


def response_of(specs: Sequence[Spec]) -> Response:
    """The response that SPECs name, one or several joined. Raises InputError."""
    parts: tuple[Response, ...] = tuple(build("response", spec) for spec in specs)
    if not parts:
        raise InputError("no response is named.", "Name one: round?decimals=2, or several: top?k=3+round.")
    return parts[0] if len(parts) == 1 else Joined(parts)


def parts_of(response: Response) -> tuple[Response, ...]:
    """The responses that a response consists of."""
    return response.parts if isinstance(response, Joined) else (response,)
