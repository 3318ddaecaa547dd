"""A classifier behind a response: what production serves, and what every measurement of a response asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from stillproof.core.spec import Spec
from stillproof.errors import InputError
from stillproof.serving.responses import Response, winner_of, with_winner
from stillproof.serving.responses.joined import Joined, parts_of, response_of

LEAST = math.log(torch.finfo(torch.float32).tiny)
"""What stands for the logarithm of a probability 0 where a finite number is needed."""


class Guard(nn.Module):
    """Serves the guarded answer: log-probabilities, (N, K), −inf for a class that is hidden.

    Its weights are those of the classifier and of the helpers; what a response remembers lives as long as the guard.
    """

    def __init__(self, model: nn.Module, response: Response, state: nn.Module | None) -> None:
        super().__init__()
        self.model, self.response, self.state = model, response, state

    def train(self, mode: bool = True) -> Self:
        """Trains the classifier, if it is asked to, and never the helpers."""
        super().train(mode)
        if self.state is not None:
            self.state.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """float32 in [0, 1], (N, C, H, W) -> log-probabilities, (N, K)."""
        logits = self.model(images).float()
        answer = self.response(logits, images, self.state)
        if answer.shape != logits.shape:
            shapes = f"{tuple(answer.shape)} for logits of {tuple(logits.shape)}"
            raise InputError(f"the response {self.response.title} answers {shapes}.", "It must return logits, (N, K).")
        served = answer.log_softmax(dim=1)
        return with_winner(served, winner_of(logits)) if self.response.keeps_argmax else served


def guard(model: nn.Module, response: Response | str, helpers: Sequence[nn.Module] = ()) -> Guard:
    """A module that serves a classifier's answers through a response, for production.

    model: images to logits, (N, K). response: a Response, or a SPEC such as `top?k=3+round?decimals=2`. helpers: a
    network for each part of the response that needs one, in order (MAD: a surrogate; adaptive misinformation: one that
    is trained to be wrong); they are put into eval mode, and need no gradients any more. Raises InputError.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"a {type(model).__name__} cannot be guarded.", "Give a torch.nn.Module.")
    chosen = response_of(Spec.parse_joined(response)) if isinstance(response, str) else response
    if not isinstance(chosen, Response):
        raise InputError(f"a {type(chosen).__name__} is no response.", "Give a SPEC such as round?decimals=2.")
    waiting = list(helpers)
    states: list[nn.Module | None] = []
    for part in parts_of(chosen):
        if part.needs_helper and not waiting:
            raise InputError(f"{part.title} needs a network made beforehand.", "Give it as one of helpers=[…].")
        states.append(part.begin(waiting.pop(0).eval().requires_grad_(False) if part.needs_helper else None))
    if waiting:
        raise InputError(f"{chosen.title} has no use for {len(waiting)} of the helpers.", "Leave them out.")
    if not isinstance(chosen, Joined):
        return Guard(model, chosen, states[0]).train(model.training)
    kept = nn.ModuleList([nn.Identity() if state is None else state for state in states])
    return Guard(model, chosen, kept).train(model.training)


def defined(served: Tensor) -> Tensor:
    """Served log-probabilities, or logits, as they are. Raises InputError for NaN."""
    if served.isnan().any():
        raise InputError("what is served holds NaN.", "Mend the classifier, or the response before it.")
    return served


def finite(served: Tensor) -> Tensor:
    """Served log-probabilities, or logits, with LEAST in place of −inf, so that distances can be measured.

    Raises InputError for NaN.
    """
    return defined(served).nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=LEAST)
