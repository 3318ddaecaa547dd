"""The thief who makes new queries out of old ones, where its own student changes its mind fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillproof.core.classifiers import Model
from stillproof.core.images import ImageSet, as_float, as_uint8, batches
from stillproof.core.noise import derive, permutation
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import InputError
from stillproof.theft.asking import LearnsByKD, Questioning, Situation, shares
from stillproof.theft.lesson import BUDGET
from stillproof.theft.thieves import titled


def augmented(student: nn.Module, images: ImageSet, classes: Tensor, epsilon: float) -> ImageSet:
    """x + ε·sign(∂f_y/∂x), clipped to [0, 1] and rounded to 8 bits; labels stay.

    student: in eval mode, on the CPU; classes: y, what the oracle said, int64, (n,).
    """
    made = []
    for rows in batches(len(images), 256):
        views = as_float(images.images[rows]).requires_grad_()
        (gradient,) = torch.autograd.grad(student(views).gather(1, classes[rows][:, None]).sum(), views)
        moved = (views.detach() + epsilon * gradient.sign()).clamp(0, 1)
        made.append(as_uint8(moved))
    return ImageSet(torch.cat(made), images.labels, images.classes, f"augmented {images.name}")


@job(version=3)
def ask_augmented(
    context: Context,
    drawn: Artefact,
    *,
    rounds: int,
    epsilon: float,
    views: float,
    model: Model,
    recipe: Recipe,
    seed: int,
    **serving: Any,
) -> Artefact:
    """Seeds, then in each round a student of all so far and views of some of it: a share `views` of what is left."""
    work = Questioning(context, drawn, seed, **serving)
    work.begin(work.left - int(views * work.left), seed)
    for number, many in enumerate(shares(work.left, rounds)):
        if not many:
            continue
        student = work.substitute(model, recipe, derive(seed, "substitute", number))
        images, answers = work.known()
        rows = permutation(len(images), derive(seed, "augmented", number))[:many]
        moved = augmented(student, images.subset(rows), answers[rows].argmax(dim=1), epsilon)
        work.keep(moved, work.asked(moved))
    return work.artefact()


@dataclass(frozen=True, kw_only=True)
class Jacobian(LearnsByKD):
    """Jacobian-based augmentation (Papernot et al. 2017, arXiv 1602.02697): views x + ε·sign(∂f_y/∂x) of the thief's f.

    The paper begins with few seeds and doubles its set in each round. Here images are not scarce, and a thief who asks
    about views instead of images falls behind KD (on digits by about a point where a fifth of all images is given up).
    Of what it may ask besides the held-out fifth, a share `views` is views, in equal rounds, of images drawn from all
    so far. A view is one query; its label is taken to be its seed's.
    """

    epsilon: float = 0.1
    rounds: int = 4
    views: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1 or not 1 <= self.rounds < BUDGET or not 0 < self.views < 1:
            raise InputError(
                f"epsilon={self.epsilon:g}, rounds={self.rounds}, views={self.views:g} is no augmentation.",
                f"ε is above 0 and at most 1, the rounds 1 to {BUDGET - 1}, the share of views in (0, 1).",
            )
        super().__post_init__()

    @property
    def title(self) -> str:
        return titled(f"Jacobian, ε = {self.epsilon:g}", {"T": self.temperature, "α": self.alpha})

    @property
    def substitutes(self) -> int:
        return self.rounds

    def transfer(self, label: str, situation: Situation) -> Stage:
        """The stage that asks."""
        return stage(
            ask_augmented,
            label,
            passes=situation.queries * (1 + 3 * self.rounds * situation.recipe.epochs),
            drawn=situation.drawn,
            rounds=self.rounds,
            epsilon=self.epsilon,
            views=self.views,
            **situation.training,
            **situation.serving,
        )
