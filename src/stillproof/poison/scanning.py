"""The jobs of a scan: read a set as it is, train references on what is trusted, look at every image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stillproof.core.classifiers import Model, admit, predict
from stillproof.core.distillation import TEACHER, Distillation
from stillproof.core.images import ImageSet
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive, permutation
from stillproof.core.plan import Context, job
from stillproof.core.sources import Opened, Source, Split
from stillproof.core.stages import classifier_artefact, classifier_of, train_fresh, trained_artefact
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import InputError
from stillproof.poison.scan_set.agreement import agreement
from stillproof.poison.scan_set.combined import combined
from stillproof.poison.scan_set.shared_pattern import SharedPattern
from stillproof.poison.scan_set.sight import Scores, Sight, folds, p_values

REFERENCES = 4
"""References, each trained on all trusted images but a quarter, which it then judges."""

FEWEST_TRUSTED = 100
"""Trusted images, for a false alarm rate of a hundredth."""

COMBINED = "combined"

Part = Literal["training", "test"]


@job(version=1)
def load_set(context: Context, *, source: Source, part: Part, limit: int | None) -> Artefact:
    """`images` and `labels` of a source, whole and in its order; the rows that were kept, if there is a limit.

    Where a source has no test images of its own, its training part is all that it has. Raises InputError.
    """
    opened = source.open()
    splits = _splits(opened, part)
    total = sum(len(split.labels) for split in splits)
    wanted = torch.arange(total)
    if limit is not None and limit < total:
        wanted = permutation(total, derive(0, "limit"))[:limit].sort().values
    images = context.allocate("images", (len(wanted), *opened.train.shape))
    labels = torch.cat([split.labels for split in splits])[wanted]
    done = start = 0
    for split in splits:
        rows = wanted[(wanted >= start) & (wanted < start + len(split.labels))] - start
        for chunk in split.read(rows):
            images[done : done + len(chunk)] = chunk
            done += len(chunk)
            if context.advance is not None:
                context.advance(done, len(wanted), "images read")
        start += len(split.labels)
    values = {"name": opened.name, "classes": list(opened.classes), "notes": list(opened.notes)}
    return Artefact(values, {"images": images, "labels": labels, "rows": wanted})


def _splits(opened: Opened, part: Part) -> list[Split]:
    if part == "training":
        return [opened.train] if opened.has_own_test else [opened.train, opened.test]
    if not opened.has_own_test:
        raise InputError(
            f"{opened.name!r} has no test images of its own to trust.",
            "Name images that you vouch for: --trusted SPEC.",
        )
    return [opened.test]


def set_of(loaded: Artefact) -> ImageSet:
    """What `load_set` read."""
    tensors, values = loaded.tensors, loaded.values
    return ImageSet(tensors["images"], tensors["labels"], tuple(values["classes"]), values["name"])


@job(version=1)
def bring_for(context: Context, trusted: Artefact, suspects: Artefact, *, model: Model) -> Artefact:
    """A classifier that brings its own weights, for these images. Raises InputError if they do not fit together."""
    some = set_of(trusted)
    _check(set_of(suspects), some)
    made, facts = admit(model.build(some.shape, len(some.classes)), some, model.text)
    accuracy = float((predict(made, some, context.runtime).argmax(1) == some.known_labels()).double().mean())
    return classifier_artefact(
        made, model, some, deterministic=facts.deterministic, accuracy=accuracy, cost=Cost(forwards=len(some))
    )


@job(version=1)
def train_reference(
    context: Context, teacher: Artefact, trusted: Artefact, *, model: Model, fold: int, recipe: Recipe, seed: int
) -> Artefact:
    """A reference: distilled from the teacher on the trusted images of all folds but one. It needs no labels."""
    images = set_of(trusted)
    rows = (trusted_folds(images) != fold).nonzero()[:, 0]
    some = images.subset(rows)
    answers = predict(classifier_of(teacher, context), some, context.runtime)
    student, trained = train_fresh(
        context, some, Distillation(alpha=1.0), model=model, recipe=recipe, seed=seed, columns={TEACHER: answers}
    )
    made = trained_artefact(student, trained, model, some)
    return Artefact(made.values, made.tensors, made.cost + Cost(forwards=len(some)))


def trusted_folds(images: ImageSet) -> Tensor:
    """Which reference was not trained on each trusted image."""
    return folds(len(images), REFERENCES, derive(0, "trusted folds"))


@job(version=2)
def scan_set(
    context: Context,
    teacher: Artefact,
    suspects: Artefact,
    trusted: Artefact,
    references: Sequence[Artefact],
    *,
    false_alarms: float,
) -> Artefact:
    """Scores of every scanner, and which images are flagged at this rate of false alarms."""
    images, known = set_of(suspects), set_of(trusted)
    master = classifier_of(teacher, context)
    judges = [classifier_of(one, context) for one in references]
    seen = _sight(context, master, judges, images, folds(len(images), REFERENCES, derive(0, "suspect folds")))
    usual = _sight(context, master, judges, known, trusted_folds(known))
    doubts = agreement(seen, usual)
    patterns = SharedPattern().look(seen, usual, doubts)
    found = {"agreement": doubts, "shared pattern": patterns.scores}
    found[COMBINED] = combined(found)
    p = p_values(found[COMBINED])
    tensors = {
        f"{name}.{part}": torch.from_numpy(getattr(scores, part)) for name, scores in found.items() for part in PARTS
    }
    tensors |= {f"pattern.{index}": one for index, one in patterns.shown.items()}
    tensors |= {
        "p": torch.from_numpy(p),
        "flagged": torch.from_numpy(p <= false_alarms),
        "guessed": seen.guessed,
        "usual": usual.guessed,
        "suspicious": torch.from_numpy(p_values(doubts) <= SharedPattern().suspicion),
    }
    values = {"scanners": list(found), "classes": list(images.classes), "patterns": sorted(patterns.shown)}
    return Artefact(values, tensors, Cost(forwards=2 * (len(images) + len(known))))


PARTS = ("suspects", "trusted")


def scores_of(scanned: Artefact) -> dict[str, Scores]:
    """The scores of each scanner, and of all together."""
    return {
        name: Scores(scanned.tensors[f"{name}.suspects"].numpy(), scanned.tensors[f"{name}.trusted"].numpy())
        for name in scanned.values["scanners"]
    }


def _sight(
    context: Context, teacher: torch.nn.Module, references: Sequence[torch.nn.Module], images: ImageSet, fold: Tensor
) -> Sight:
    """Each image is shown to the teacher, and to the reference of its fold."""
    said = predict(teacher, images, context.runtime)
    answers = torch.empty_like(said)
    for number, reference in enumerate(references):
        rows = (fold == number).nonzero()[:, 0]
        if len(rows):
            answers[rows] = predict(reference, images.subset(rows), context.runtime)
    return Sight(images.images, said, answers, fold)


def _check(images: ImageSet, trusted: ImageSet) -> None:
    if images.shape != trusted.shape or images.classes != trusted.classes:
        raise InputError(
            f"the transfer set {images.name!r} is {images.shape} of {len(images.classes)} classes, the trusted one "
            f"{trusted.shape} of {len(trusted.classes)}.",
            "Both must be images of one kind; name all classes in one order.",
        )
    if len(trusted) < FEWEST_TRUSTED:
        raise InputError(
            f"{len(trusted)} trusted images are too few to say what is usual.", f"Give {FEWEST_TRUSTED} or more."
        )
