"""How a thief trains a student: one objective in one `fit`, or a course that says itself how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from stillproof.core.classifiers import Model
from stillproof.core.distillation import Objective
from stillproof.core.images import ImageSet
from stillproof.core.noise import derive
from stillproof.core.plan import Context
from stillproof.core.stages import begun_student
from stillproof.core.training import Fit, Recipe, fit

BUDGET = 10
"""Trainings that a thief, and the independent reference, may spend on choosing among candidates."""


@dataclass(frozen=True)
class Lesson:
    """What one student is trained with."""

    context: Context
    images: ImageSet
    answers: Mapping[str, Tensor]
    """The columns of answers, one row an image; none for the reference."""
    model: Model
    recipe: Recipe
    seed: int

    def student(self, what: str = "") -> nn.Module:
        """Fresh weights, or those that the model brings. what: names one that a course needs besides its last."""
        return begun_student(self.images, self.model, derive(self.seed, what) if what else self.seed)

    def fit(
        self,
        student: nn.Module,
        objective: Objective,
        columns: Mapping[str, Tensor] | None = None,
        *,
        last: bool = True,
    ) -> Fit:
        """Train it. columns: instead of the answers. last: whether it is the one that the course ends with; the
        others leave no checkpoint."""
        return fit(
            student,
            objective,
            self.images,
            recipe=self.recipe,
            runtime=self.context.runtime,
            seed=self.seed,
            columns=self.answers if columns is None else columns,
            checkpoint=self.context.checkpoint if last else None,
            checkpoint_seconds=self.context.checkpoint_seconds,
            advance=self.context.advance,
        )


@runtime_checkable
class Course(Protocol):
    """A candidate that is more than a loss: several students, or parts that are trained and thrown away."""

    @property
    def trainings(self) -> int:
        """How many students it trains: each counts in the budget."""

    def train(self, lesson: Lesson) -> tuple[nn.Module, Fit]:
        """The student that is kept, and what all trainings took. Raises InputError, TrainingDiverged."""


Candidate = Objective | Course
"""What a thief may try. A frozen dataclass of plain values, or something with an identity(); str() names it."""


def taught(lesson: Lesson, candidate: Candidate) -> tuple[nn.Module, Fit]:
    """The student that a candidate makes. Raises what `fit` does."""
    if isinstance(candidate, Course):
        return candidate.train(lesson)
    student = lesson.student()
    return student, lesson.fit(student, candidate)


def trainings(candidate: Candidate) -> int:
    """How many students a candidate trains."""
    return candidate.trainings if isinstance(candidate, Course) else 1
