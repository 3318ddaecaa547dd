"""The thief who asks about other people's images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stillproof.core.carving import carve
from stillproof.core.distillation import Distillation
from stillproof.core.images import ImageSet
from stillproof.core.noise import derive, permutation
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.store import Artefact
from stillproof.errors import InputError
from stillproof.theft.asking import Questioning, Situation
from stillproof.theft.stages import CHOOSES_ONLY
from stillproof.theft.thieves import PEOPLES, TEMPERATURES, titled, tried


def fitted(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images, uint8, (N, C, H, W), in another shape: resized bilinearly, grey repeated, colours averaged to grey."""
    channels, height, width = shape
    if images.shape[1] != channels:
        images = images.expand(-1, channels, -1, -1) if images.shape[1] == 1 else _grey(images)
    if images.shape[2:] != (height, width):
        sized = F.interpolate(images.float(), (height, width), mode="bilinear", antialias=True)
        images = sized.round().clamp(0, 255).to(torch.uint8)
    return images.contiguous()


def _grey(images: Tensor) -> Tensor:
    return images.float().mean(dim=1, keepdim=True).round().to(torch.uint8)


@job(version=3)
def ask_about_others(context: Context, drawn: Artefact, others: Artefact, *, seed: int, **serving: Any) -> Artefact:
    """Ask about random images of another set, in the victim's shape; those of the shared draw only choose.

    If the thief has labels of its own images, the others are labelled with the answers' classes.
    """
    work = Questioning(context, drawn, seed, **serving)
    there = carve(others).training
    if len(there) < work.left:
        raise InputError(
            f"{work.left} queries are left for other people's images, and {there.name!r} has {len(there)}.",
            "Give a larger --query-data, or fewer --queries.",
        )
    rows = permutation(len(there), derive(seed, "other images"))[: work.left].sort().values
    classes = work.images.classes
    asked = ImageSet(fitted(there.images[rows], work.images.shape), None, classes, f"queries from {there.name}")
    answers = work.asked(asked)
    labels = None if work.images.labels is None else answers.argmax(dim=1)
    work.keep(ImageSet(asked.images, labels, classes, asked.name), answers)
    made = work.artefact()
    return replace(made, values={**made.values, CHOOSES_ONLY: True})


@dataclass(frozen=True, kw_only=True)
class Knockoff:
    """KnockoffNets (Orekondy et al. 2019, arXiv 1812.02766) with random queries: soft cross-entropy to the answers.

    The queries are --query-data; the fifth that it chooses among candidates by are images of the victim's own kind, of
    which its student learns none. The paper's temperature is 1.
    """

    temperature: float | None = None

    needs_labels: ClassVar[bool] = False
    reads: ClassVar[Literal["scores", "label"]] = "scores"
    knows: ClassVar[str] = PEOPLES
    wants_others: ClassVar[bool] = True
    chooses_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.candidates()

    @property
    def title(self) -> str:
        return titled("KnockoffNets", {"T": self.temperature})

    @property
    def substitutes(self) -> int:
        return 0

    def transfer(self, label: str, situation: Situation) -> Stage:
        """The stage that asks."""
        return stage(
            ask_about_others,
            label,
            passes=situation.queries,
            drawn=situation.drawn,
            others=situation.others,
            seed=situation.seed,
            **situation.serving,
        )

    def candidates(self) -> tuple[Distillation, ...]:
        return tuple(Distillation(temperature=t, alpha=1.0) for t in tried(self.temperature, *TEMPERATURES))
