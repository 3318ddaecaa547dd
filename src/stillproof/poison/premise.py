"""What every scan rests on: that the teacher is clean. It is checked as far as trusted images can show it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stillproof.core.measurement import Cost
from stillproof.core.plan import Context, job
from stillproof.core.stages import classifier_of
from stillproof.core.store import Artefact
from stillproof.poison.scan_student.bank import AMPLITUDES, Reaction, bank, react, unclaimed, unseen
from stillproof.poison.scanning import held_out, set_of

MOST = 500
"""Trusted images that the bank's triggers are put on."""

NO_LONGER = (
    "agreement and the patterns still find images on which teacher and references part, but what the teacher says of "
    "an image is no longer evidence of anything",
    "a student that is distilled on clean images may take the backdoor over from its teacher: scan it beside the "
    "references, not beside this teacher",
    "leaving flagged images out, consensus and unlearning hold the student to the teacher, and so to its backdoor",
)
"""What does not hold of a teacher that is not clean."""


@job(version=4)
def check_premise(context: Context, teacher: Artefact, trusted: Artefact, references: Sequence[Artefact]) -> Artefact:
    """How the teacher reacts to a bank of triggers, beside references that were distilled on trusted images alone.

    A backdoor of the teacher's is not on images that somebody vouches for, and so does not pass to the references.
    """
    # those that the first reference was not trained on; what the others were trained on they react to less, if anything
    images = held_out(set_of(trusted), 0)
    images = images.subset(torch.arange(min(MOST, len(images))))
    master, first, *others = (classifier_of(one, context) for one in (teacher, *references))
    triggers = bank(images.shape, {}, AMPLITUDES[:-1])  # the loudest stripes tell architectures apart
    reactions = react(master, first, others, images, triggers, runtime=context.runtime)
    values = {
        "reactions": [{field: getattr(one, field) for field in Reaction.__slots__} for one in reactions],
        "triggers": len(triggers),
        "unclaimed": unclaimed([master, first, *others], images, runtime=context.runtime),
    }
    return Artefact(values, {}, Cost(forwards=(1 + len(references)) * len(images) * (2 + len(triggers))))


def doubts(checked: Artefact, classes: Sequence[str]) -> list[str]:
    """What speaks against a clean teacher, and what then no longer holds; nothing where nothing does."""
    reactions = [Reaction(**one) for one in checked.values["reactions"]]
    found = [one for one in reactions if one.is_present]
    if not found:
        return []
    worst = found[0]
    taken, usual = (count / max(1, worst.n) for count in (worst.student, worst.teacher))
    return [
        f"The teacher reacts to a trigger far more than its references do: with {worst.trigger!r} it takes {taken:.1%} "
        f"of trusted images for {classes[worst.target]!r}; a reference that learnt on trusted images alone takes "
        f"{usual:.1%} ({len(found)} of {checked.values['triggers']} triggers).",
        *(f"What no longer holds: {one}." for one in NO_LONGER),
    ]


def held(checked: Artefact, classes: Sequence[str]) -> str:
    """What was looked at, where nothing speaks against the teacher, and of which classes it could have."""
    triggers = checked.values["triggers"]
    missing = unseen(checked.values["unclaimed"], triggers)
    if len(missing) == len(classes):
        n = max(checked.values["unclaimed"])
        return f"Its premise, a clean teacher, could not be checked: {n} trusted images are too few."
    said = (
        f"Its premise, a clean teacher, was checked with {triggers} triggers beside the references: it reacts to none "
        "of them as they do not. A trigger that is not like these would not show"
    )
    few = ", ".join(repr(classes[target]) for target in missing[:5])
    return f"{said}, nor would one for {few}, for which too few trusted images are left." if missing else f"{said}."
