"""The thief who asks next about what its student knows least."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from stillproof.core.carving import carve
from stillproof.core.classifiers import Model, predict
from stillproof.core.images import ImageSet
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import InputError
from stillproof.theft.asking import LearnsByKD, Questioning, Situation, shares
from stillproof.theft.lesson import BUDGET
from stillproof.theft.stages import Origin
from stillproof.theft.thieves import titled

Choice = Literal["entropy", "k-centre"]


def most_uncertain(probabilities: Tensor, many: int) -> Tensor:
    """Rows of the largest entropies: int64, (many,). probabilities: (n, K)."""
    entropy = -(probabilities * probabilities.clamp(min=1e-12).log()).sum(dim=1)
    return entropy.argsort(descending=True, stable=True)[:many]


def farthest_first(probabilities: Tensor, known: Tensor, many: int) -> Tensor:
    """k-centre, greedily: rows each of which is farthest from what is known and from those before it, (many,).

    probabilities: (n, K), known: (m, K): what the student says of the images to choose from, and of those it has.
    """
    nearest = torch.cdist(probabilities, known).amin(dim=1)
    chosen = []
    for _ in range(min(many, len(probabilities))):
        row = int(nearest.argmax())
        chosen.append(row)
        nearest = torch.minimum(nearest, torch.cdist(probabilities, probabilities[row : row + 1])[:, 0])
        nearest[row] = -1
    return torch.tensor(chosen, dtype=torch.int64)


@job(version=3)
def ask_actively(
    context: Context,
    drawn: Artefact,
    data: Artefact,
    *,
    choose: Choice,
    rounds: int,
    origin: Origin,
    model: Model,
    recipe: Recipe,
    seed: int,
    **serving: Any,
) -> Artefact:
    """Half of what is left for images of the shared draw, then in each round a student, and what it chooses."""
    work = Questioning(context, drawn, seed, **serving)
    work.begin(work.left - work.left // 2, seed)
    parts = carve(data)
    there = parts.pool if origin == "outside" else parts.training
    if work.images.labels is None:
        there = replace(there, labels=None)
    for number, many in enumerate(shares(work.left, rounds)):
        if not many:
            continue
        left = _others(there, work.all_asked())
        if not len(left):  # all that there is are copies of what was asked
            break
        unasked = there.subset(left)
        student = work.substitute(model, recipe, derive(seed, "substitute", number))
        said = predict(student, unasked, context.runtime).softmax(dim=1)
        if choose == "entropy":
            rows = most_uncertain(said, many)
        else:
            images, _ = work.known()
            rows = farthest_first(said, predict(student, images, context.runtime).softmax(dim=1), many)
        work.cost += Cost(forwards=len(unasked))
        asked = unasked.subset(rows)
        work.keep(asked, work.asked(asked))
    return work.artefact()


def _others(images: ImageSet, known_ones: ImageSet) -> Tensor:
    """The rows of those images that are not among the known ones: int64."""
    known = {image.numpy().tobytes() for image in known_ones.images}
    rows = [row for row, image in enumerate(images.images) if image.numpy().tobytes() not in known]
    return torch.tensor(rows, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class Active(LearnsByKD):
    """Active learning of the queries (ActiveThief, Pal et al. 2020): entropy, or k-centre, of the student's answers.

    It chooses from all images of the part that queries are drawn from, so it has those, unlabelled, besides; it learns
    the labels of what it asks about, if the thief has labels, and has no more of them than the others.
    """

    choose: Choice = "entropy"
    rounds: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.rounds < BUDGET:
            raise InputError(f"rounds={self.rounds} is no active learning.", f"Use 1 to {BUDGET - 1}.")
        super().__post_init__()

    @property
    def title(self) -> str:
        return titled(f"active, {self.choose}", {"T": self.temperature, "α": self.alpha})

    @property
    def knows(self) -> str:  # type: ignore[override]  # an option decides
        """What it has beside its queries."""
        chooses = ", and chooses which of them it learns the labels of"
        return "nothing; has unlabelled images" + self.chooses_labels * chooses

    @property
    def chooses_labels(self) -> bool:  # type: ignore[override]  # an option decides
        """Whether the labels have a part in what it learns."""
        return self.needs_labels

    @property
    def substitutes(self) -> int:
        return self.rounds

    def transfer(self, label: str, situation: Situation) -> Stage:
        """The stage that asks."""
        return stage(
            ask_actively,
            label,
            passes=situation.queries * (1 + 3 * self.rounds * situation.recipe.epochs),
            drawn=situation.drawn,
            data=situation.data,
            choose=self.choose,
            rounds=self.rounds,
            origin=situation.origin,
            **situation.training,
            **situation.serving,
        )
