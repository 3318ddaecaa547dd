"""The job of a student's scan: the bank of triggers and the inversion, beside clean students of the same kind."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from stillproof.core.classifiers import predict
from stillproof.core.compression import CALIBRATED_ON, Quantised, calibration_of
from stillproof.core.images import ImageSet, as_float
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive, permutation
from stillproof.core.plan import Context, job
from stillproof.core.runtime import Runtime
from stillproof.core.stages import classifier_of
from stillproof.core.store import Artefact
from stillproof.poison.scan_set.verdict import SURE
from stillproof.poison.scan_student.bank import Reaction, bank, react
from stillproof.poison.scan_student.inversion import FEWEST, Family, Inversion, Inverted, invert
from stillproof.poison.scan_student.suspicion import Sought
from stillproof.poison.scan_student.verdict import Inspected
from stillproof.poison.scanning import scanned_set, set_of, trusted_folds

HELD_OUT = 0
"""The fold of the trusted images that neither the student nor the clean ones were trained on."""

FLAGGED = 0.01
"""Rate of false alarms at which a class of the transfer set must stand out for its pattern to join the bank."""

MOST = 500
"""Trusted images that a change is sought on, and judged on."""

FAMILIES: tuple[Family, ...] = ("mask", "bounded")


@job(version=2)
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

    clean: students that were distilled on the trusted images but the fold HELD_OUT, on which all are looked at: they
    say what is usual; scanned: of its transfer set, whose patterns join the bank where they stand out; epochs: of the
    search.
    """
    runtime, known = context.runtime, set_of(trusted)
    images = known.subset((trusted_folds(known) == HELD_OUT).nonzero()[:, 0])
    master, suspect = classifier_of(teacher, context), classifier_of(student, context)
    usual = [_deployed_as(suspect, classifier_of(one, context), known) for one in clean]
    classes = images.classes
    shown = [] if scanned is None else _standing_out(scanned)
    found = {index: scanned.tensors[f"pattern.{index}"] for index in shown} if scanned else {}
    recovered = {f"{classes[index]} ({index})": pattern for index, pattern in found.items()}
    triggers = bank(images.shape, recovered)
    reactions = react(suspect, master, usual, images, triggers, runtime=runtime)
    strongest = triggers[reactions[0].trigger]
    order = permutation(len(images), derive(0, "inverted"))[:MOST]
    some = as_float(images.images[order])
    said = predict(master, images, runtime).argmax(1)[order]
    models = {"student": suspect} | {f"clean {number}": model for number, model in enumerate(usual)}
    sought: list[Sought] = []
    tensors = {"strongest.keep": strongest.keep, "strongest.add": strongest.add}
    todo = [(family, target, name) for family in FAMILIES for target in range(len(classes)) for name in models]
    for number, (family, target, name) in enumerate(todo):
        if context.advance is not None:
            context.advance(number, len(todo), f"{family} for {classes[target]!r} in the {name}")
        settings = Inversion(family=family, epochs=epochs)
        if int((said != target).sum()) < FEWEST:
            continue  # nearly all trusted images are of this class: there is nothing to seek it from
        inverted = invert(models[name], master, some, target, settings, runtime=runtime, seed=derive(seed, target))
        sought.append(_noted(inverted, name))
        if name == "student":
            tensors |= {f"{family}.{target}.keep": inverted.stamp.keep, f"{family}.{target}.add": inverted.stamp.add}
    values = {
        "reactions": [{field: getattr(one, field) for field in Reaction.__slots__} for one in reactions],
        "sought": [{field: getattr(one, field) for field in Sought.__slots__} for one in sought],
        "classes": list(classes),
        "alike": [_alike(model, master, images, runtime) for model in models.values()],
    }
    asked = (2 + len(usual)) * len(images) * (1 + len(triggers))
    passes = 2 * epochs * len(some) // 2 * len(todo)
    return Artefact(values, tensors, Cost(forwards=asked + passes, backwards=passes))


def _standing_out(scanned: Artefact) -> list[int]:
    """The classes of which so much is flagged that what it shares may be a trigger: every class has some pattern."""
    gathered = scanned_set(scanned, FLAGGED).gathered()
    return [index for index in scanned.values["patterns"] if gathered[index] < SURE]


def _deployed_as(suspect: nn.Module, clean: nn.Module, known: ImageSet) -> nn.Module:
    """The clean student, in INT8 where the suspect is; its ranges are of trusted images, not of the suspect's file."""
    return clean if calibration_of(suspect) is None else Quantised(clean, known.images[:CALIBRATED_ON]).eval()


def _alike(model: nn.Module, teacher: nn.Module, images: ImageSet, runtime: Runtime) -> float:
    same = predict(model, images, runtime).argmax(1) == predict(teacher, images, runtime).argmax(1)
    return float(same.double().mean())


def _noted(found: Inverted, model: str) -> Sought:
    return Sought(
        model,
        found.family,
        found.target,
        float(found.student_hits.double().mean()),
        float(found.teacher_hits.double().mean()),
        found.size,
    )


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
    )
