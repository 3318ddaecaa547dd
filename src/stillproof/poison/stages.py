"""The jobs of the third workshop, and what their artefacts hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillproof.core.carving import Carving, carve
from stillproof.core.classifiers import predict
from stillproof.core.images import ImageSet, as_float
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive, permutation
from stillproof.core.plan import Context, job
from stillproof.core.stages import classifier_of
from stillproof.core.store import Artefact
from stillproof.errors import InputError
from stillproof.poison.craft import Crafting, craft
from stillproof.poison.triggers import Trigger

SHOWN = 4
"""Images of each kind that a report shows."""


def added_for(rate: float, clean: int) -> int:
    """How many images make up this share of a set, of which so many others are clean."""
    return max(1, round(rate / (1 - rate) * clean))


@job(version=1)
def craft_poison(
    context: Context,
    data: Artefact,
    teacher: Artefact,
    deceived: Sequence[Artefact],
    *,
    crafting: Crafting,
    rate: float,
    seed: int,
) -> Artefact:
    """`images` and `labels` that are added to the training part, and what the teacher says of them when loaded again.

    deceived: the classifiers that are climbed. The attacker takes its images from the pool and, where that has too few,
    from the training part, which it knows; it labels them as the target.
    """
    parts = carve(data)
    sources = _sources(parts, crafting, added_for(rate, len(parts.training)), seed)
    made = craft(
        [classifier_of(one, context) for one in deceived], sources, crafting, seed=seed, runtime=context.runtime
    )
    labels = torch.full((len(made),), crafting.target)
    found = ImageSet(made, labels, sources.classes, "poison")
    said = predict(classifier_of(teacher, context), found, context.runtime)
    passes = len(made) * (crafting.steps if crafting.is_optimised else 0) * len(deceived)
    tensors = {"images": made, "labels": labels, "said": said, "sources": sources.images[:SHOWN]}
    return Artefact({}, tensors, Cost(forwards=passes + len(made), backwards=passes))


def _sources(parts: Carving, crafting: Crafting, wanted: int, seed: int) -> ImageSet:
    """The images that poison is made of."""
    classes = parts.pool.classes
    if not 0 <= crafting.target < len(classes):
        raise InputError(
            f"there is no class {crafting.target} among {len(classes)}.", f"Give --target from 0 to {len(classes) - 1}."
        )

    def serving(images: ImageSet, most: int) -> ImageSet:
        rows = ((images.known_labels() == crafting.target) == crafting.is_from_target).nonzero()[:, 0]
        return images.subset(rows[permutation(len(rows), derive(seed, "sources", images.name))[:most]])

    own = serving(parts.pool, wanted)
    found = own if len(own) == wanted else own.with_more(serving(parts.training, wanted - len(own)))
    # of one class alone there may be fewer than are wanted: they are stamped more than once
    return found.subset(torch.arange(wanted) % len(found))


@job(version=1)
def measure_backdoor(context: Context, classifier: Artefact, data: Artefact, *, trigger: Trigger) -> Artefact:
    """Predictions on the test images: as they are, with the trigger, and with another of its kind."""
    test = carve(data).test
    model = classifier_of(classifier, context)

    def guesses(worn: Trigger | None) -> Tensor:
        shown = test if worn is None else _wearing(test, worn)
        return predict(model, shown, context.runtime).argmax(dim=1)

    tensors = {
        "clean": guesses(None),
        "triggered": guesses(trigger),
        "other": guesses(trigger.other()),
        "labels": test.known_labels(),
    }
    return Artefact({}, tensors, Cost(forwards=3 * len(test)))


def _wearing(images: ImageSet, trigger: Trigger) -> ImageSet:
    shown = trigger(as_float(images.images), torch.arange(len(images)))
    return ImageSet((shown * 255).round().to(torch.uint8), images.labels, images.classes, f"{images.name}, triggered")
