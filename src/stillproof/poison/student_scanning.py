"""The job of a student's scan: the bank of triggers and the inversion, beside clean students of the same kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from torch import Tensor, nn

from stillproof.core import measures
from stillproof.core.classifiers import predict
from stillproof.core.compression import CALIBRATED_ON, Quantised, calibration_of
from stillproof.core.images import ImageSet, as_float
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive, permutation
from stillproof.core.plan import Context, job
from stillproof.core.runtime import Runtime
from stillproof.core.stages import classifier_of
from stillproof.core.store import Artefact
from stillproof.errors import InputError
from stillproof.poison.scan_set.verdict import SURE
from stillproof.poison.scan_student.bank import Reaction, bank, react, unclaimed
from stillproof.poison.scan_student.inversion import FEWEST, Family, Inversion, Inverted, invert
from stillproof.poison.scan_student.suspicion import Sought
from stillproof.poison.scan_student.verdict import Inspected
from stillproof.poison.scanning import PATTERNS, held_out, pattern_of, scanned_set, set_of

HELD_OUT = 0
"""The fold of the trusted images that neither the student nor the clean ones were trained on."""

FLAGGED = 0.01
"""Rate of false alarms at which a class of the transfer set must stand out for its pattern to join the bank."""

MOST = 500
"""Trusted images that a change is sought on, and judged on."""

FAMILIES: tuple[Family, ...] = ("mask", "bounded")


@job(version=2)
def invert_clean(
    context: Context,
    teacher: Artefact,
    trusted: Artefact,
    clean: Sequence[Artefact],
    *,
    quantised: bool,
    epochs: int,
    seed: int,
) -> Artefact:
    """What is sought and found in clean students: it says what is usual, whichever student is scanned.

    quantised: whether they are looked at in INT8, as the student is deployed; the rest as `scan_student`.
    """
    known = set_of(trusted)
    images = held_out(known, HELD_OUT)
    models = {
        f"clean {number}": _deployed(classifier_of(one, context), known, quantised=quantised)
        for number, one in enumerate(clean)
    }
    found = _search(context, models, classifier_of(teacher, context), images, epochs, seed)
    sought = [_noted(one, name) for name, one in found]
    return Artefact({"sought": sought, "quantised": quantised}, {}, _cost_of(found, images, epochs))


@job(version=5)
def scan_student(
    context: Context,
    teacher: Artefact,
    student: Artefact,
    trusted: Artefact,
    clean: Sequence[Artefact],
    usual: Artefact,
    scanned: Artefact | None = None,
    *,
    epochs: int,
    seed: int,
) -> Artefact:
    """How the student reacts to a bank of triggers, and to the change that is sought for each class.

    clean: students that were distilled on the trusted images but the fold HELD_OUT, on which all are looked at; usual:
    of `invert_clean`; scanned: of its transfer set, whose patterns join the bank where they stand out; epochs: of the
    search. Raises InputError where those were not looked at in INT8, and it is.
    """
    runtime, known = context.runtime, set_of(trusted)
    images = held_out(known, HELD_OUT)
    master, suspect = classifier_of(teacher, context), classifier_of(student, context)
    quantised = calibration_of(suspect) is not None
    if quantised != usual.values["quantised"]:
        raise InputError(
            "the student answers in INT8, and its SPEC does not say so.", "Name the file that `poison --compress` left."
        )
    others = [_deployed(classifier_of(one, context), known, quantised=quantised) for one in clean]
    classes = images.classes
    triggers = bank(images.shape, {} if scanned is None else _recovered(scanned))
    reactions = react(suspect, master, others, images, triggers, runtime=runtime)
    strongest = triggers[reactions[0].trigger]
    inverted = _search(context, {"student": suspect}, master, images, epochs, seed)
    tensors = {"strongest.keep": strongest.keep, "strongest.add": strongest.add}
    for _, one in inverted:
        tensors |= {f"{one.family}.{one.target}.keep": one.stamp.keep, f"{one.family}.{one.target}.add": one.stamp.add}
    values = {
        "reactions": [{field: getattr(one, field) for field in Reaction.__slots__} for one in reactions],
        "sought": [_noted(one, name) for name, one in inverted] + usual.values["sought"],
        "classes": list(classes),
        "alike": [_alike(model, master, images, runtime) for model in (suspect, *others)],
        "unclaimed": unclaimed([suspect, master, *others], images, runtime=runtime),
    }
    asked = Cost(forwards=(2 + len(others)) * len(images) * (2 + len(triggers)))
    return Artefact(values, tensors, asked + _cost_of(inverted, images, epochs))


def _search(
    context: Context, models: Mapping[str, nn.Module], teacher: nn.Module, images: ImageSet, epochs: int, seed: int
) -> list[tuple[str, Inverted]]:
    """What is found in each model, by its name, for every family of changes and every class."""
    order = permutation(len(images), derive(0, "inverted"))[:MOST]
    some = as_float(images.images[order])
    said = predict(teacher, images, context.runtime).argmax(1)[order]
    found: list[tuple[str, Inverted]] = []
    todo = [(family, target, name) for family in FAMILIES for target in range(len(images.classes)) for name in models]
    for number, (family, target, name) in enumerate(todo):
        if context.advance is not None:
            context.advance(number, len(todo), f"{family} for {images.classes[target]!r} in the {name}")
        if int((said != target).sum()) < FEWEST:
            continue  # nearly all trusted images are of this class: there is nothing to seek it from
        settings, own = Inversion(family=family, epochs=epochs), derive(seed, target)
        found.append((name, invert(models[name], teacher, some, target, settings, runtime=context.runtime, seed=own)))
    return found


def _cost_of(found: Sequence[object], images: ImageSet, epochs: int) -> Cost:
    """Of searches: half of the images are optimised on, by the model and its teacher."""
    passes = 2 * epochs * (min(MOST, len(images)) // 2) * len(found)
    return Cost(forwards=passes, backwards=passes)


def _recovered(scanned: Artefact) -> dict[str, Tensor]:
    """What images share of the classes of which so much is flagged that it may be a trigger: most classes have some."""
    gathered, found = scanned_set(scanned, FLAGGED).gathered(), {}
    for (index, name), scanner in product(enumerate(scanned.values["classes"]), PATTERNS):
        pattern = pattern_of(scanned, scanner, index)
        if pattern is not None and gathered[index] < SURE:
            found[f"{name} ({index}, {scanner})"] = pattern
    return found


def _deployed(clean: nn.Module, known: ImageSet, *, quantised: bool) -> nn.Module:
    """The clean student, in INT8 where the suspect is; its ranges are of trusted images, not of the suspect's file."""
    return Quantised(clean, known.images[:CALIBRATED_ON]).eval() if quantised else clean


def _alike(model: nn.Module, teacher: nn.Module, images: ImageSet, runtime: Runtime) -> float:
    same = predict(model, images, runtime).argmax(1) == predict(teacher, images, runtime).argmax(1)
    return float(same.double().mean())


def _noted(found: Inverted, model: str) -> dict[str, Any]:
    sought = Sought(
        model,
        found.family,
        found.target,
        float(found.student_hits.double().mean()),
        float(found.teacher_hits.double().mean()),
        found.size,
        measures.mcnemar(found.student_hits.numpy(), found.teacher_hits.numpy()),
    )
    return {field: getattr(sought, field) for field in Sought.__slots__}


def inspected(scanned: Artefact) -> Inspected:
    """What `scan_student` left, for a verdict."""
    values = scanned.values
    student, *clean = values["alike"]
    return Inspected(
        [Reaction(**one) for one in values["reactions"]],
        [Sought(**one) for one in values["sought"]],
        tuple(values["classes"]),
        student,
        clean,
        values["unclaimed"],
    )
