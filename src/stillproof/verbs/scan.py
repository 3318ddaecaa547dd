"""`stillproof scan`: does a transfer set hold images that do not belong?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from stillproof.findings import Finding, Result, worst
from stillproof.verbs import Verb
from stillproof.verbs.settings import BY_PROFILE, Profile, VerbSettings, Words, merged, settings_as_json

if TYPE_CHECKING:
    from stillproof.core.classifiers import Model
    from stillproof.core.images import ImageSet
    from stillproof.core.plan import Plan, Stage
    from stillproof.core.runtime import Runtime
    from stillproof.core.sources.source import Source
    from stillproof.core.store import Artefact
    from stillproof.poison.scan_set.verdict import Scanned
    from stillproof.runs.image_sets import WrittenSet

FALSE_ALARMS = 0.01
"""At which a verdict is given, unless the user asks for another."""

UNVOUCHED = (
    "The test images of the transfer set's own source were trusted: whoever wrote the one may have written the other. "
    "Name images that you vouch for: --trusted."
)

SAMPLED = (
    "{looked} images of {of}, drawn at random, were looked at (--limit): what is said of the set is said of these, and "
    "the cleaned set holds no others."
)

SHAKEN = "Nothing was found beside a teacher that may have a backdoor itself"

LEARNING: Mapping[Profile, Mapping[str, Any]] = {
    "smoke": {"epochs": 30, "inversion_epochs": 20},
    "standard": {"epochs": 60, "inversion_epochs": 20},
    "thorough": {"epochs": 120, "inversion_epochs": 80},
}
"""How long a profile trains the references: trusted images are few."""


class ScanSettings(VerbSettings):
    """Settings of `scan`."""

    by_profile: ClassVar[Mapping[Profile, Mapping[str, Any]]] = merged(LEARNING)

    transfer_set: str = Field(..., description="Data SPEC of the transfer set; its training images.")
    teacher: str = Field(..., description="Model SPEC of the teacher, with its weights. The scan trusts it.")
    trusted: str | None = Field(
        None, description="Data SPEC of images that you vouch for; else the test images of the transfer set's source."
    )
    reference: str = Field("zoo:cnn?width=32", description="Model SPEC of the references; not the teacher's.")
    student: str | None = Field(
        None, description="Model SPEC, with weights, of a student to scan for a backdoor, relative to its teacher."
    )
    inversion_epochs: int = Field(20, ge=1, description=f"Epochs of the search for a student's trigger. {BY_PROFILE}")
    also: Words = Field(
        (),
        description="Further scanners to report beside, without a say in the verdict: stability, two-groups, … or all.",
    )
    false_alarms: float = Field(FALSE_ALARMS, gt=0, lt=0.5, description="Share of clean images that may be flagged.")
    epochs: int = Field(60, ge=1, description=f"Epochs of the references. {BY_PROFILE}")


def plan(settings: ScanSettings, runtime: Runtime) -> Plan:
    """The graph of stages. Raises InputError."""
    from stillproof.core.plan import Plan

    found = stages(settings)
    if settings.student is not None:
        found |= _of_the_student(settings, found)
    return Plan(found, runtime)


def _of_the_student(settings: ScanSettings, found: Mapping[str, Stage]) -> dict[str, Stage]:
    """The stages of the student's scan. Raises InputError."""
    from stillproof.core.classifiers import Model
    from stillproof.errors import InputError
    from stillproof.poison.pipeline import Inspecting

    student = Model(str(settings.student))
    student.identity()
    if not student.is_trained:
        raise InputError(f"the student {settings.student!r} has no weights.", "Name the file that it was saved in.")
    suspect = _brought("the student", student, found["trusted"])
    inspecting = Inspecting(
        student.untrained, student.is_quantised, settings.epochs, settings.inversion_epochs, settings.seed
    )
    scanned = inspecting.stage(found["teacher"], suspect, found["trusted"], found["scan"])
    return {"student": suspect, "student/scan": scanned}


def _training_images(source: Source) -> int:
    """As `load_set` reads them: where a source has no test images of its own, all are."""
    opened = source.open()
    return len(opened.train.labels) + (0 if opened.has_own_test else len(opened.test.labels))


def _brought(what: str, model: Model, trusted: Stage) -> Stage:
    """The stage that looks at a classifier with its weights: the same whatever set is scanned. Raises InputError."""
    from stillproof.core.plan import stage
    from stillproof.core.stages import brought
    from stillproof.poison.scanning import bring_for

    return stage(bring_for, f"look at {what}", trusted=trusted, model=model, **brought(model, trusted))


def stages(settings: ScanSettings) -> dict[str, Stage]:
    """Both sets, the teacher, and the scan. Raises InputError."""
    from stillproof.core.classifiers import Model
    from stillproof.core.plan import stage
    from stillproof.core.sources import open_source
    from stillproof.errors import InputError
    from stillproof.poison.further_scanning import further_named
    from stillproof.poison.pipeline import Looking
    from stillproof.poison.scanning import check_enough, check_kinds, check_rate, check_trusted, load_set

    teacher = Model(settings.teacher)
    teacher.identity()
    if not teacher.is_trained:
        raise InputError(
            f"the teacher {settings.teacher!r} has no weights, and a scan trusts what the teacher says.",
            "Name its weights: zoo:resnet18?weights=teacher.safetensors, or the file alone.",
        )
    source = open_source(settings.transfer_set)
    facts = source.facts()
    vouched = source if settings.trusted is None else open_source(settings.trusted)
    part, known = ("test", facts.test) if settings.trusted is None else ("training", _training_images(vouched))
    check_enough(known)
    check_rate(settings.false_alarms, known)
    if settings.trusted is not None:
        check_kinds(source.open(), vouched.open())
    suspects = stage(load_set, "read the transfer set", source=source, part="training", limit=settings.limit)
    trusted = stage(load_set, "read the trusted set", source=vouched, part=part, limit=None)
    checked = stage(check_trusted, "count the trusted images", trusted=trusted)
    master = _brought("the teacher", teacher, trusted)
    looking = Looking(settings.reference, settings.epochs, settings.false_alarms, settings.seed)
    scanned = looking.stage(master, suspects, trusted, images=facts.train, known=known)
    found = {"checked": checked, "suspects": suspects, "teacher": master, "trusted": trusted, "scan": scanned}
    found["premise"] = looking.premise(scanned)
    names = further_named(settings.also)
    if names:
        found["further"] = looking.further(master, suspects, trusted, names, images=facts.train, known=known)
    return found


def scanned_of(values: Mapping[str, Artefact], rate: float | None = None) -> Scanned:
    """What the scan showed at a rate of false alarms, for a verdict."""
    from stillproof.poison.scanning import scanned_set

    return scanned_set(values["scan"], FALSE_ALARMS if rate is None else rate)


def finding(settings: ScanSettings, values: Mapping[str, Artefact], rate: float | None = None) -> Finding:
    """SP-P2, at a rate of false alarms."""
    from stillproof.poison.premise import doubts, held
    from stillproof.poison.scan_set.verdict import of_the_set

    said = of_the_set(settings.transfer_set, scanned_of(values, rate))
    classes = values["trusted"].values["classes"]
    against = doubts(values["premise"], classes)
    said = said.model_copy(update={"evidence": [*said.evidence, *(against or [held(values["premise"], classes)])]})
    if against and said.status == "pass":
        said = said.model_copy(update={"status": "inconclusive", "title": SHAKEN, "advice": "Get a teacher to trust."})
    if settings.trusted is not None or said.status == "fail":
        return said
    return said.model_copy(update={"evidence": [*said.evidence, UNVOUCHED]})


def conclude(settings: ScanSettings, values: Mapping[str, Artefact]) -> Result:
    """Which images do not belong, and how sure that is."""
    from stillproof.poison import account, pictures
    from stillproof.poison.premise import doubts
    from stillproof.poison.scan_student.verdict import of_the_student
    from stillproof.poison.scanning import COMBINED, scores_of, set_of
    from stillproof.poison.student_scanning import inspected

    scanned, suspects = values["scan"], set_of(values["suspects"])
    rate = settings.false_alarms
    further = scores_of(values["further"]) if "further" in values else {}
    scores, found, said = scores_of(scanned), scanned_of(values, rate), finding(settings, values, rate)
    rows = values["suspects"].tensors["rows"].numpy()
    findings, tables, shown = [said], [], []
    against = doubts(values["premise"], suspects.classes)
    if settings.student is not None:
        seen = inspected(values["student/scan"])
        findings.append(of_the_student(settings.student, seen, against))
        shown = pictures.recovered(values["student/scan"], seen)
        tables = [
            account.student_classes_table(seen),
            account.reactions_table(seen.reactions, suspects.classes),
            account.inversions_table(seen.sought, suspects.classes),
        ]
    notes = [] if settings.trusted is not None else [UNVOUCHED]
    if len(suspects) < values["suspects"].values["of"]:
        notes.append(SAMPLED.format(looked=len(suspects), of=values["suspects"].values["of"]))
    notes += _of_the_references(settings)
    notes += against
    shared = scanned.values["shared"]
    if shared:
        notes.append(f"{shared} images of the transfer set are trusted as well, or nearly, and taken for clean.")
    if scanned.values["copies"]:
        notes.append(f"{scanned.values['copies']} images are copies of others, byte by byte: each was looked at once.")
    if scanned.values["near copies"]:
        notes.append(f"{scanned.values['near copies']} images are nearly copies of others: each group counts once.")
    notes += _contradicted(values, suspects)
    return Result(
        verb="scan",
        status=worst(one.status for one in findings),
        summary=f"{found.share.value:.1%} of {len(suspects)} images are flagged at a rate of false alarms of "
        f"{settings.false_alarms:.1%}.",
        notes=notes,
        findings=findings,
        tables=[
            account.scanners_table(scores | further, settings.false_alarms),
            account.classes_table(found, scanned.tensors["suspicious"].numpy()),
            account.flagged_table(found, scanned.tensors["p"].numpy(), scores, rows),
            *tables,
        ],
        curves=[account.histogram(scores[COMBINED])],
        images=[*pictures.found_by(scanned, suspects), *shown],
        settings=settings_as_json(settings),
    )


def _of_the_references(settings: ScanSettings) -> list[str]:
    """What the references are not, where they are of the teacher's own architecture."""
    from stillproof.core.classifiers import Model

    family = Model(settings.teacher).architecture.name
    if Model(settings.reference).architecture.name != family:
        return []
    return [
        f"The references are of the teacher's own family, {family}: what deceives the one deceives the others more "
        "often, and their disagreement shows less of it. Name another with --reference."
    ]


def _contradicted(values: Mapping[str, Artefact], suspects: ImageSet) -> list[str]:
    """How many labels are not what the teacher says, beside those of the trusted set. It has no say."""
    if suspects.labels is None:
        return []
    share = float((values["scan"].tensors["guessed"] != suspects.labels).double().mean())
    usual = 1 - values["teacher"].values["accuracy"]
    return [
        f"{share:.1%} of the labels are not what the teacher says, {usual:.1%} of the trusted ones: the scan looks at "
        "images, not at labels; look at these if you train on them."
    ]


def models(_settings: ScanSettings, _values: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """None: the teacher was brought along."""
    return {}


def sets(settings: ScanSettings, values: Mapping[str, Artefact]) -> dict[str, WrittenSet]:
    """The transfer set without what is flagged."""
    from stillproof.poison.scanning import set_of
    from stillproof.runs.image_sets import WrittenSet

    suspects, scanned = values["suspects"], values["scan"].tensors
    given = set_of(suspects)
    kept, rows = (~scanned["flagged"]).nonzero()[:, 0], suspects.tensors["rows"]
    if not len(kept):
        return {}
    manifest = {
        "what": "a transfer set without the images that stillproof scan flagged",
        "of": settings.transfer_set,
        "false_alarms": settings.false_alarms,
        "looked_at": f"{len(given)} of {suspects.values['of']}",
        "rows": rows[kept].tolist(),
        "p_of_rows": scanned["p"][kept].tolist(),
        "flagged": rows[scanned["flagged"]].tolist(),
        "p_of_flagged": scanned["p"][scanned["flagged"]].tolist(),
    }
    test = set_of(values["trusted"]) if settings.trusted is None else None
    return {"cleaned": WrittenSet(given.subset(kept), manifest, test)}


SCAN = Verb("scan", ScanSettings, plan, conclude, models, sets)
