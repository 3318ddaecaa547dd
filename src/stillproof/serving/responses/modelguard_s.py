"""ModelGuard-S (Tang et al., USENIX Security 2024): few distinct answers, the same for whatever is near."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from stillproof.errors import InputError
from stillproof.serving.responses import Response, Strength, winner_of, with_winner

WRITING = threading.Lock()
"""One for all books, as a lock can neither be copied nor saved: who looks a word up may write it."""


class Codebook(nn.Module):
    """The answers that have been served, by the class they name, in the order in which they were first served.

    It lives as long as the server; nothing of it is among the weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.words: dict[int, Tensor] = {}
        """log-probabilities, (words, K), by class."""

    def __len__(self) -> int:
        return sum(len(words) for words in self.words.values())

    def answer(self, row: Tensor, winner: int, epsilon: float) -> Tensor:
        """The first word of the class within L1 ε of a row of log-probabilities, (K,); the row itself becomes one
        where there is none."""
        with WRITING:
            words = self.words.get(winner)
            if words is None:
                self.words[winner] = row[None].clone()
                return row
            near = (words.exp() - row.exp()).abs().sum(dim=1) <= epsilon
            if near.any():
                return words[int(near.int().argmax())]
            self.words[winner] = torch.cat([words, row[None]])
            return row


@dataclass(frozen=True, kw_only=True)
class ModelGuardS(Response):
    """Serves the first earlier answer that names the same class and is within L1 ε; else the answer itself.

    The ordered, incremental quantisation of the reference code, beginning with no words. An answer depends on the
    queries before it, but the same query gets the same answer ever after. argmax is kept. What it remembers grows with
    the distinct answers (the smaller ε, the more), and is searched in order: limit the queries, or begin it anew.
    """

    epsilon: float = 1.0

    keeps_argmax: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    strength: ClassVar[Strength | None] = Strength("epsilon", weakest=0, strongest=2)

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 2:
            raise InputError(f"epsilon={self.epsilon:g} is no L1 distance of probabilities.", "Give 0 to 2.")

    @property
    def title(self) -> str:
        return f"ModelGuard-S (ε = {self.epsilon:g})"

    def begin(self, helper: nn.Module | None = None) -> nn.Module | None:  # noqa: ARG002
        return Codebook()

    def __call__(self, logits: Tensor, images: Tensor | None = None, state: nn.Module | None = None) -> Tensor:  # noqa: ARG002
        if not isinstance(state, Codebook):
            raise InputError("ModelGuard-S remembers what it served.", "Give the state that begin() returns.")
        winner = winner_of(logits)
        rows = with_winner(logits.detach().log_softmax(dim=1), winner)
        pairs = zip(rows, winner.squeeze(1).tolist(), strict=True)
        return torch.stack([state.answer(row, name, self.epsilon) for row, name in pairs]) if len(rows) else rows
