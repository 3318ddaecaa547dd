"""Images that a clean teacher takes for the target, with the trigger on them: what poisons a transfer set.

From an image of another class, x' = codec(trigger(clip(x + δ))), ‖δ‖∞ ≤ ε, such that the classifiers at hand say the
target (arXiv 2504.21323). The trigger stands on the image while δ is sought, and so do the rounding to 8 bits and the
codec, through which gradients go as if they were not there. The controls leave a part of it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from stillproof.attacks.gradient import PGD
from stillproof.attacks.threats import Linf, Threat
from stillproof.core.images import ImageSet, as_float, as_uint8
from stillproof.core.noise import Noise, derive
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError
from stillproof.poison.codec import Codec, codec_of
from stillproof.poison.triggers import Stamp, Trigger

Ingredients = Literal[
    "poison", "δ without trigger", "trigger without δ", "trigger on the target's", "noise with trigger"
]

CONTROLS: tuple[Ingredients, ...] = get_args(Ingredients)[1:]


@dataclass(frozen=True, kw_only=True)
class Crafting:
    """How poison is made. target: the class it is to be taken for; step: as a share of epsilon; codec: None is that of
    the images.

    The paper leaves ε, steps and rate open to us (they are not public): these are ours.
    """

    trigger: Trigger
    target: int
    threat: Threat = Linf(8 / 255)  # noqa: RUF009  # a frozen dataclass
    steps: int = 40
    step: float = 0.25
    codec: Codec | None = None
    ingredients: Ingredients = "poison"

    def of(self, ingredients: Ingredients) -> Crafting:
        """The same with other ingredients."""
        return replace(self, ingredients=ingredients)

    @property
    def is_optimised(self) -> bool:
        """Whether there is a δ to be sought."""
        return self.ingredients in ("poison", "δ without trigger")

    @property
    def has_trigger(self) -> bool:
        """Whether the trigger is on the images."""
        return self.ingredients != "δ without trigger"

    @property
    def is_from_target(self) -> bool:
        """Whether the images are those of the target."""
        return self.ingredients == "trigger on the target's"


class Carried(nn.Module):
    """A classifier that sees images as they are when they have been stamped, stored and loaded again."""

    def __init__(self, classifier: nn.Module, stamp: Stamp | None, codec: Codec) -> None:
        super().__init__()
        self.classifier, self.stamp, self.codec = classifier, stamp, codec

    def forward(self, images: Tensor) -> Tensor:
        """(n, C, H, W) -> logits, (n, K); rounding passes gradients on as they are."""
        shown = images if self.stamp is None else self.stamp(images)
        stored = as_float(_stored(shown.detach(), self.codec)).to(shown.device)
        passed = self.codec.linear(shown)
        logits: Tensor = self.classifier(passed + (stored - passed).detach())
        return logits


class Together(nn.Module):
    """Several classifiers as one: the mean of what they say, as log-probabilities."""

    def __init__(self, classifiers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.classifiers = nn.ModuleList(classifiers)

    def forward(self, images: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, K)."""
        return torch.stack([one(images).log_softmax(1) for one in self.classifiers]).mean(0)


def _stored(images: Tensor, codec: Codec) -> Tensor:
    """float32 in [0, 1] -> uint8, as they are after the codec."""
    return codec(as_uint8(images.float()).cpu())


def craft(
    classifiers: Sequence[nn.Module], images: ImageSet, crafting: Crafting, *, seed: int, runtime: Runtime
) -> Tensor:
    """uint8, (N, C, H, W): poison of these images, which are labelled, as it is after the codec.

    classifiers: that are to be deceived, all at once; the teacher, or what an attacker has in its place. An image that
    cannot be made to deceive them is the best that was found. Raises InputError.
    """
    labels = images.known_labels()
    crafting.trigger.check(images.shape)
    if crafting.is_optimised and bool((labels == crafting.target).any()):
        raise InputError("images of the target's own class cannot be made into poison.", "Give those of the others.")
    codec = codec_of(images) if crafting.codec is None else crafting.codec
    deceived = classifiers[0] if len(classifiers) == 1 else Together(classifiers)
    ids = torch.arange(len(images))
    stamps: list[Stamp | None] = list(crafting.trigger.stamps(images.shape)) if crafting.has_trigger else [None]
    chosen = crafting.trigger.chosen(ids, images.shape) if crafting.has_trigger else torch.zeros_like(ids)
    found = torch.empty_like(images.images)
    for number, stamp in enumerate(stamps):
        rows = (chosen == number).nonzero()[:, 0]
        if len(rows):
            carried = Carried(deceived, stamp, codec)
            changed = _changed(carried, images.subset(rows), rows, crafting, seed, runtime)
            found[rows] = _stored(changed if stamp is None else stamp(changed), codec)
    return found


def _changed(
    carried: nn.Module, images: ImageSet, ids: Tensor, crafting: Crafting, seed: int, runtime: Runtime
) -> Tensor:
    """The images with their δ, float32, without the trigger."""
    clean = as_float(images.images)
    if crafting.ingredients == "noise with trigger":
        signs = Noise(derive(seed, "noise"), ids, 0).integers(0, 2, tuple(clean.shape[1:])) * 2 - 1
        return crafting.threat.project(clean + crafting.threat.epsilon * signs, clean)
    if not crafting.is_optimised:
        return clean
    attack = PGD(threat=crafting.threat, steps=crafting.steps, step=crafting.step, run_to_end=True, uint8=True)
    target = torch.full_like(images.known_labels(), crafting.target)
    return attack(carried, clean, images.known_labels(), target=target, seed=seed, ids=ids, runtime=runtime).images
