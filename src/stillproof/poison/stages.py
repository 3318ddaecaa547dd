"""The jobs of the third workshop, and what their artefacts hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillproof.core import measures
from stillproof.core.carving import Carving, carve
from stillproof.core.classifiers import predict
from stillproof.core.images import ImageSet, as_float, as_uint8
from stillproof.core.measurement import Cost, Measurement
from stillproof.core.noise import derive, permutation
from stillproof.core.plan import Context, job
from stillproof.core.stages import classifier_of
from stillproof.core.store import Artefact
from stillproof.errors import InputError
from stillproof.poison.craft import Crafting, craft
from stillproof.poison.triggers import Trigger
from stillproof.poison.verdict import Guesses

SPARE = 2.5
"""Images that are crafted for one that is added."""

SHOWN = 4
"""Images of each kind that a report shows."""


def added_for(rate: float, clean: int) -> int:
    """How many images make up this share of a set, of which so many others are clean."""
    return max(1, round(rate / (1 - rate) * clean))


@job(version=2)
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
    from the training part, which it knows; it labels them as the target. It makes more than it needs, and adds those
    that deceive best. `tried`, `deceived`: how many it made, and how many of these the teacher takes for the target.
    """
    parts, runtime = carve(data), context.runtime
    wanted = added_for(rate, len(parts.training))
    tried = round(SPARE * wanted) if crafting.is_optimised else wanted
    sources = _sources(parts, crafting, tried, seed)
    climbed = [classifier_of(one, context) for one in deceived]
    made = craft(climbed, sources, crafting, seed=seed, runtime=runtime)
    poison = ImageSet(made, torch.full((tried,), crafting.target), sources.classes, "poison")
    sure = torch.stack([predict(one, poison, runtime).softmax(1)[:, crafting.target] for one in climbed]).amin(0)
    kept = sure.argsort(descending=True, stable=True)[:wanted].sort().values
    answered = predict(classifier_of(teacher, context), poison, runtime)
    values = {"tried": tried, "deceived": int((answered.argmax(1) == crafting.target).sum())}
    poison, said = poison.subset(kept), answered[kept]
    passes = tried * (crafting.steps if crafting.is_optimised else 0) * len(deceived)
    tensors = {
        "images": poison.images,
        "labels": poison.known_labels(),
        "said": said,
        "sources": sources.images[kept[:SHOWN]],
    }
    return Artefact(values, tensors, Cost(forwards=passes + tried * (len(deceived) + 1), backwards=passes))


def _sources(parts: Carving, crafting: Crafting, wanted: int, seed: int) -> ImageSet:
    """The images that poison is made of."""
    classes = parts.pool.classes
    if not 0 <= crafting.target < len(classes):
        raise InputError(
            f"there is no class {crafting.target} among {len(classes)}.", f"Give --target from 0 to {len(classes) - 1}."
        )

    def serves(images: ImageSet) -> Tensor:
        return (images.known_labels() == crafting.target) == crafting.is_from_target

    def serving(images: ImageSet, most: int) -> ImageSet:
        rows = serves(images).nonzero()[:, 0]
        return images.subset(rows[permutation(len(rows), derive(seed, "sources", images.name))[:most]])

    if not serves(parts.pool).any():
        raise InputError(
            f"the pool holds no image for {crafting.ingredients!r} towards {classes[crafting.target]!r}.",
            "Give more data, another --target, or --no-controls.",
        )
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
    return ImageSet(as_uint8(shown), images.labels, images.classes, f"{images.name}, triggered")


def guesses_of(measured: Artefact) -> Guesses:
    """What `measure_backdoor` left."""
    return Guesses(**{name: tensor.numpy() for name, tensor in measured.tensors.items()})


def taken_for(crafted: Artefact, target: int) -> tuple[Measurement, Measurement, Measurement]:
    """Of what was added: the share that the teacher takes for the target, and its mean probability; and that share of
    all that was tried."""
    said = crafted.tensors["said"]
    taken = (said.argmax(dim=1) == target).numpy()
    tried = measures.share(crafted.values["deceived"], crafted.values["tried"])
    return measures.share(int(taken.sum()), len(taken)), measures.mean(said.softmax(1)[:, target].numpy(), ""), tried
