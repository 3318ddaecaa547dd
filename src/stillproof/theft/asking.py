"""Asking an oracle otherwise than about each image of the shared draw once: what such a thief works with.

A thief chooses its queries within the same budget. A fifth of it goes to the fifth of the shared draw by which all
thieves choose among their candidates: what is scored by other images could not be compared with the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from stillproof.core.classifiers import Model
from stillproof.core.distillation import TEACHER, Distillation
from stillproof.core.images import ImageSet
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive, permutation
from stillproof.core.plan import Context, Stage
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.serving.oracle import Reveal
from stillproof.theft.lesson import BUDGET, Lesson, taught
from stillproof.theft.stages import HELD, HELD_OUT, Origin, images_of, opened
from stillproof.theft.thieves import TEMPERATURES, tried
from stillproof.theft.transfer import log_probabilities


@dataclass(frozen=True)
class Situation:
    """What a thief's plan of asking is made from."""

    serving: Mapping[str, object]
    """What `opened` needs: the served classifier's stage, what it reveals, and the response before it."""
    drawn: Stage
    """The shared draw: as many images as there are queries."""
    data: Stage
    others: Stage | None
    """Other people's images (--query-data), if there are any."""
    queries: int
    origin: Origin
    model: Model
    recipe: Recipe
    seed: int

    @property
    def training(self) -> Mapping[str, object]:
        """What a substitute is trained with, as settings of a stage."""
        return {"model": self.model, "recipe": self.recipe, "seed": self.seed}


@runtime_checkable
class ChoosesQueries(Protocol):
    """A thief that does not ask about the shared draw as it is, or does not learn from what it was answered."""

    wants_others: ClassVar[bool]
    """Whether it asks about other people's images."""

    @property
    def chooses_labels(self) -> bool:
        """Whether it chooses which images it learns the true labels of. The reference does not: what such a choice is
        worth is then part of the thief's net gain, and no finding is decided by it."""

    @property
    def substitutes(self) -> int:
        """How many students it trains in order to choose; they count in the budget of trainings."""

    def transfer(self, label: str, situation: Situation) -> Stage:
        """The stage that asks. Its artefact is that of theft.stages.ask, with the rows to choose by marked `held`, or,
        where the images are those of the shared draw, with the answers as they were `served`."""


class Questioning:
    """Asks within a budget, and keeps the images with the answers."""

    def __init__(self, context: Context, drawn: Artefact, seed: int, **serving: Any) -> None:
        self.context, self.images = context, images_of(drawn)
        self._reveal: Reveal = serving["reveal"]
        self.oracle = opened(context, len(self.images), **serving)
        self._passes = 1 + len(serving.get("helpers", ()))
        rest, held = self.images.split((1 - HELD_OUT, HELD_OUT), seed)
        self._values = drawn.values
        self._sets: list[ImageSet] = []
        self._answers: list[Tensor] = []
        self._held: list[Tensor] = []
        self.cost = Cost()
        self.rest = self.images.subset(rest)
        """What of the shared draw may be asked about besides."""
        chosen_by = self.images.subset(held)
        self.keep(chosen_by, self.asked(chosen_by), held=True)

    @property
    def left(self) -> int:
        """Queries that are left."""
        return len(self.images) - self.oracle.queries

    def all_asked(self) -> ImageSet:
        """All images that were kept, those that are held out as well."""
        return self._all()[0]

    def asked(self, images: ImageSet) -> Tensor:
        """Log-probabilities, (n, K), at one query an image."""
        return log_probabilities(self.oracle.ask(images), self._reveal, len(self.images.classes))

    def keep(self, images: ImageSet, answers: Tensor, *, held: bool = False) -> None:
        """Put images with their answers into the transfer set."""
        self._sets.append(images)
        self._answers.append(answers)
        self._held.append(torch.full((len(images),), held))

    def begin(self, many: int, seed: int) -> None:
        """Ask about so many random images of the rest, and at least two: a substitute cannot learn from fewer."""
        images = self.rest.subset(portion(self.rest, min(max(many, 2), self.left), seed))
        self.keep(images, self.asked(images))

    def known(self) -> tuple[ImageSet, Tensor]:
        """All images that may be learnt from so far, and their answers; what is held out is not among them."""
        images, answers, held = self._all()
        rows = (~held).nonzero().flatten()
        return images.subset(rows), answers[rows]

    def substitute(self, model: Model, recipe: Recipe, seed: int) -> torch.nn.Module:
        """A student of what is known so far: KD at T = 1 from the answers alone. In eval mode, on the CPU."""
        images, answers = self.known()
        unwatched = Context(self.context.runtime, advance=self.context.advance)  # a checkpoint holds one student
        lesson = Lesson(unwatched, images, {TEACHER: answers}, model, recipe, seed)
        student, trained = taught(lesson, Distillation(temperature=1.0, alpha=1.0))
        self.cost += Cost(forwards=trained.forwards, backwards=trained.backwards)
        return student

    def artefact(self) -> Artefact:
        """The transfer set."""
        images, answers, held = self._all()
        oracle = self.oracle
        values = {**self._values, "queries": oracle.queries, "bits": oracle.bits}
        labels = {} if images.labels is None else {"labels": images.labels}
        tensors = {"images": images.images, **labels, TEACHER: answers, HELD: held}
        return Artefact(
            values, tensors, self.cost + Cost(queries=oracle.queries, forwards=oracle.queries * self._passes)
        )

    def _all(self) -> tuple[ImageSet, Tensor, Tensor]:
        images = self._sets[0]
        for more in self._sets[1:]:
            images = images.with_more(more)
        return images, torch.cat(self._answers), torch.cat(self._held)


def portion(images: ImageSet, many: int, seed: int) -> Tensor:
    """Rows of so many random images, of all classes alike as far as they are known: int64, (many,)."""
    share = min(1.0, many / len(images))
    first, rest = images.split((share, 1 - share), seed)
    mixed = [rows[permutation(len(rows), derive(seed, "portion"))] for rows in (first, rest)]
    return torch.cat(mixed)[:many]


def shares(total: int, parts: int) -> Sequence[int]:
    """A total in so many nearly equal parts."""
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]


def spread(tries: Sequence[Distillation], many: int) -> tuple[Distillation, ...]:
    """So many of them, evenly along their order; all where there are no more."""
    many = min(many, len(tries))
    return tuple(tries[(2 * place + 1) * len(tries) // (2 * many)] for place in range(many))


@dataclass(frozen=True, kw_only=True)
class LearnsByKD:
    """What thieves have in common that differ from `kd` in what they ask alone: a base of theirs."""

    temperature: float | None = None
    alpha: float | None = None

    reads: ClassVar[Literal["scores", "label"]] = "scores"
    knows: ClassVar[str] = "nothing; chooses its queries among unlabelled images"
    wants_others: ClassVar[bool] = False
    chooses_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.candidates()

    @property
    def needs_labels(self) -> bool:
        """Whether the labels of its queries have a part in what it learns."""
        return self.alpha != 1

    @property
    def substitutes(self) -> int:
        """How many students it trains in order to choose."""
        return 0

    def grid(self) -> tuple[Distillation, ...]:
        """What KD tries (thieves.kd), the least softened first."""
        tries = ((t, a) for t in tried(self.temperature, *TEMPERATURES) for a in tried(self.alpha, 0.9, 0.5))
        return tuple(Distillation(temperature=t, alpha=a) for t, a in tries)

    def candidates(self) -> tuple[Distillation, ...]:
        """What KD tries, from the least to the most softened, as many as the budget of trainings has room for."""
        return spread(self.grid(), BUDGET - self.substitutes)
