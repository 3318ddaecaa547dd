"""The oracle: a classifier as those who query it see it. It reveals what it is told to, counts, and refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stillproof.core.classifiers import predict
from stillproof.core.images import ImageSet
from stillproof.core.runtime import Runtime
from stillproof.errors import BudgetExceeded, InputError, nearest
from stillproof.serving.guard import defined, guard
from stillproof.serving.responses import Response

Kind = Literal["logits", "probabilities", "top", "label"]


@dataclass(frozen=True, slots=True)
class Reveal:
    """What an answer holds: all logits, all probabilities, the k largest probabilities, or the class alone."""

    kind: Kind
    k: int = 1

    @classmethod
    def parse(cls, text: str) -> Reveal:
        """`logits`, `probabilities`, `top-3`, `label`. Raises InputError."""
        head, _, count = text.partition("-")
        if head == "top" and count.isdecimal() and len(count) < 10 and int(count) > 0:
            return cls("top", int(count))
        if text in ("logits", "probabilities", "label"):
            return cls(text)  # type: ignore[arg-type]  # one of the three was just found
        raise InputError(
            f"an oracle cannot reveal {text!r}.", nearest(text, ["logits", "probabilities", "top-3", "label"])
        )

    def __str__(self) -> str:
        return f"top-{self.k}" if self.kind == "top" else self.kind

    def bits(self, classes: int) -> float:
        """Bits in one answer: 32 for a float, log2 K for a class."""
        name = math.log2(classes)
        return {
            "logits": 32.0 * classes,
            "probabilities": 32.0 * classes,
            "top": min(self.k, classes) * (32 + name),
            "label": name,
        }[self.kind]


@dataclass(frozen=True, slots=True)
class Answer:
    """classes: int64, (n, k), the most likely first; scores: float32, (n, k), of those classes, or None.

    Logits or probabilities as the oracle reveals them; with all K revealed the classes are 0 to K − 1.
    """

    classes: Tensor
    scores: Tensor | None


def shown(logits: Tensor, reveal: Reveal) -> Answer:
    """What an oracle shows of its logits, (n, K). Raises InputError for NaN."""
    logits = defined(logits)
    everything = torch.arange(logits.shape[1]).expand_as(logits)
    if reveal.kind == "logits":
        return Answer(everything, logits)
    probabilities = logits.softmax(dim=1)
    if reveal.kind == "probabilities":
        return Answer(everything, probabilities)
    k = 1 if reveal.kind == "label" else min(reveal.k, logits.shape[1])
    top = probabilities.topk(k, dim=1)
    return Answer(top.indices, None if reveal.kind == "label" else top.values)


class Oracle:
    """Answers questions about images; every image asked about is one query, an augmented view as well.

    A batch that would go beyond the budget is refused whole with BudgetExceeded. A response (serving.responses)
    changes the answers before anything of them is revealed; helpers: the networks that it needs.
    """

    def __init__(
        self,
        classifier: nn.Module,
        reveal: Reveal,
        runtime: Runtime,
        *,
        budget: int | None = None,
        response: Response | None = None,
        helpers: Sequence[nn.Module] = (),
    ) -> None:
        self._classifier = classifier if response is None else guard(classifier, response, helpers)
        self._runtime = runtime
        self.reveal = reveal
        self.budget = budget
        self.queries = 0
        self.bits = 0.0

    def ask(self, images: ImageSet) -> Answer:
        """The answers about some images."""
        if self.budget is not None and self.queries + len(images) > self.budget:
            raise BudgetExceeded(
                f"the oracle has answered {self.queries} of {self.budget} queries and was asked {len(images)} more.",
                "Ask about fewer images, or raise the budget.",
            )
        self.queries += len(images)
        logits = predict(self._classifier, images, self._runtime)
        self.bits += len(images) * self.reveal.bits(logits.shape[1])
        return shown(logits, self.reveal)
