"""The job of a student's scan: the bank of triggers and the inversion, beside clean students of the same kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stillproof.core.images import as_float
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive, permutation
from stillproof.core.plan import Context, job
from stillproof.core.stages import classifier_of
from stillproof.core.store import Artefact
from stillproof.poison.scan_student.bank import Reaction, bank, react
from stillproof.poison.scan_student.inversion import Family, Inversion, Inverted, invert
from stillproof.poison.scan_student.suspicion import Sought
from stillproof.poison.scanning import set_of

MOST = 500
"""Trusted images that a change is sought on, and judged on."""

FAMILIES: tuple[Family, ...] = ("mask", "bounded")


@job(version=1)
def scan_student(
    context: Context,
    teacher: Artefact,
    student: Artefact,
    trusted: Artefact,
    clean: Sequence[Artefact],
    scanned: Artefact | None = None,
    *,
    epochs: int,
    seed: int,
) -> Artefact:
    """How the student reacts to a bank of triggers, and to the change that is sought for each class.

    clean: students that were distilled on the trusted images alone, which say what is usual; scanned: of its transfer
    set, whose recovered patterns join the bank; epochs: of the search.
    """
    runtime, images = context.runtime, set_of(trusted)
    master, suspect = classifier_of(teacher, context), classifier_of(student, context)
    usual = [classifier_of(one, context) for one in clean]
    classes = images.classes
    recovered = (
        {}
        if scanned is None
        else {classes[index]: scanned.tensors[f"pattern.{index}"] for index in scanned.values["patterns"]}
    )
    triggers = bank(images.shape, recovered)
    reactions = react(suspect, master, usual, images, triggers, runtime=runtime)
    some = as_float(images.images[permutation(len(images), derive(0, "inverted"))[:MOST]])
    models = {"student": suspect} | {f"clean {number}": model for number, model in enumerate(usual)}
    sought: list[Sought] = []
    tensors: dict[str, torch.Tensor] = {}
    todo = [(family, target, name) for family in FAMILIES for target in range(len(classes)) for name in models]
    for number, (family, target, name) in enumerate(todo):
        if context.advance is not None:
            context.advance(number, len(todo), f"{family} for {classes[target]!r} in the {name}")
        settings = Inversion(family=family, epochs=epochs)
        found = invert(models[name], master, some, target, settings, runtime=runtime, seed=derive(seed, target))
        sought.append(_noted(found, name))
        if name == "student":
            tensors |= {f"{family}.{target}.keep": found.stamp.keep, f"{family}.{target}.add": found.stamp.add}
    values = {
        "reactions": [{field: getattr(one, field) for field in Reaction.__slots__} for one in reactions],
        "sought": [{field: getattr(one, field) for field in Sought.__slots__} for one in sought],
        "classes": list(classes),
    }
    asked = (2 + len(usual)) * len(images) * (1 + len(triggers))
    passes = 2 * epochs * len(some) // 2 * len(todo)
    return Artefact(values, tensors, Cost(forwards=asked + passes, backwards=passes))


def _noted(found: Inverted, model: str) -> Sought:
    return Sought(
        model,
        found.family,
        found.target,
        float(found.student_hits.double().mean()),
        float(found.teacher_hits.double().mean()),
        found.size,
    )


def reactions_of(scanned: Artefact) -> list[Reaction]:
    """How the student reacts to the bank, most first."""
    return [Reaction(**one) for one in scanned.values["reactions"]]


def sought_of(scanned: Artefact) -> list[Sought]:
    """What was sought in the student and in clean ones."""
    return [Sought(**one) for one in scanned.values["sought"]]
