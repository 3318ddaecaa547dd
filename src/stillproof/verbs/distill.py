"""`stillproof distill`: a student from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stillproof.findings import Result, Table, worst
from stillproof.verbs import Verb, scan
from stillproof.verbs.settings import BY_PROFILE, TRAINING, DataSettings, Profile, settings_as_json

if TYPE_CHECKING:
    from stillproof.core.plan import Plan
    from stillproof.core.runtime import Runtime
    from stillproof.core.store import Artefact


DEFENSIVE_TEMPERATURE = 50.0

UNLABELLED = "kd?alpha=1"

UNGUARDED = "student of all"
"""Distilled on a transfer set as it is, to compare with."""


class DistillSettings(DataSettings):
    """Settings of `distill`."""

    by_profile: ClassVar[Mapping[Profile, Mapping[str, Any]]] = TRAINING

    teacher: str = Field(..., description="Model SPEC of the teacher; without weights it is trained first.")
    student: str = Field(..., description="Model SPEC of the student.")
    objective: str = Field(
        "kd",
        description="Objective SPEC: kd?temperature=4&alpha=0.9, dkd, logit-std, fitnets, attention, rkd, crd.",
    )
    defensive: bool = Field(
        False, description="Distil defensively, teacher and student at --temperature. It hides gradients and no more."
    )
    temperature: float = Field(
        DEFENSIVE_TEMPERATURE, ge=1, description="Of the defensive distillation; papers have 20 to 100."
    )
    robust: str | None = Field(
        None,
        description="Robust distillation by SPEC: rslad, ard?alpha=0.9. A teacher without weights is PGD-trained.",
    )
    resistant: bool = Field(
        False,
        description="The transfer set may be poisoned: scan it first, leave out what is flagged, and learn the "
        "teacher's consensus over views. The teacher brings weights, and --trusted names images that you vouch for.",
    )
    trusted: str | None = Field(
        None, description="Data SPEC of trusted images (--resistant); else the test images of the data's own source."
    )
    reference: str = Field("zoo:cnn?width=32", description="Model SPEC of the references of the scan (--resistant).")
    label_mode: Literal["cached", "online"] = Field(
        "cached",
        description="Teacher answers on the plain images, once, or on each augmented view (as features always are).",
    )
    epochs: int = Field(12, ge=1, description=f"Epochs of teacher and student. {BY_PROFILE}")


def plan(settings: DistillSettings, runtime: Runtime) -> Plan:
    """The graph of stages. Trains nothing. Raises InputError."""
    from stillproof.core.carving import data_stage
    from stillproof.core.classifiers import Model
    from stillproof.core.noise import derive
    from stillproof.core.plan import Plan, stage
    from stillproof.core.stages import answer_part, classifier_stage, distil, training_stage
    from stillproof.core.training import Recipe

    recipe, seed = Recipe.standard(settings.epochs), settings.seed
    way = _way(settings)
    if settings.resistant:
        return _resistant_plan(settings, way, runtime)
    data = data_stage(settings.data, settings.limit)
    sizes = data.sizes
    common: dict[str, Any] = {"data": data.stage, "recipe": recipe, "seed": seed, "images": sizes.training}
    teacher = classifier_stage(
        "the teacher", model=Model(settings.teacher), objective=way.teacher, passes=way.teacher_passes, **common
    )
    learning = derive(seed, "student")  # a student does not begin with its teacher's weights
    alone = training_stage("the student alone", model=Model(settings.student), **common | {"seed": learning})
    student = stage(
        distil,
        "distil the student",
        passes=sizes.training * way.passes * settings.epochs,
        teacher=teacher,
        data=data.stage,
        model=Model(settings.student),
        objective=way.objective,
        online=way.online,
        recipe=recipe,
        seed=learning,
    )
    classifiers = {"teacher": teacher, "student": student, "student alone": alone}
    outputs = {"data": data.stage} | {f"{name}/model": classifier for name, classifier in classifiers.items()}
    for name, classifier in classifiers.items():
        outputs[f"{name}/test"] = stage(
            answer_part, f"measure the {name}", passes=sizes.test, classifier=classifier, data=data.stage, part="test"
        )
    return Plan(outputs, runtime)


def _resistant_plan(settings: DistillSettings, way: _Way, runtime: Runtime) -> Plan:
    """Scan the transfer set, and distil on what is left; to compare, on all of it. Both meet the trusted images."""
    from stillproof.core.classifiers import Model
    from stillproof.core.noise import derive
    from stillproof.core.plan import Plan, stage
    from stillproof.core.training import Recipe
    from stillproof.poison.resisting import VIEWS, answer_set, distil_on_the_rest

    found = scan.stages(_scanning(settings))
    common: dict[str, Any] = {
        "teacher": found["teacher"],
        "model": Model(settings.student),
        "objective": way.objective,
        "recipe": Recipe.standard(settings.epochs),
        "seed": derive(settings.seed, "student"),
    }
    student = stage(
        distil_on_the_rest,
        "distil on what the scan leaves",
        suspects=found["suspects"],
        scanned=found["scan"],
        views=VIEWS,
        **common,
    )
    unguarded = stage(distil_on_the_rest, "distil on all of it", suspects=found["suspects"], views=0, **common)
    classifiers = {"teacher": found["teacher"], "student": student, UNGUARDED: unguarded}
    outputs = found | {f"{name}/model": classifier for name, classifier in classifiers.items()}
    for name, classifier in classifiers.items():
        outputs[f"{name}/test"] = stage(
            answer_set, f"measure the {name}", classifier=classifier, images=found["trusted"]
        )
    return Plan(outputs, runtime)


def _scanning(settings: DistillSettings) -> scan.ScanSettings:
    """The scan that comes first."""
    from stillproof.poison.pipeline import LEFT_OUT

    return scan.ScanSettings(
        profile=settings.profile,
        transfer_set=settings.data,
        teacher=settings.teacher,
        trusted=settings.trusted,
        reference=settings.reference,
        false_alarms=LEFT_OUT,
        limit=settings.limit,
        seed=settings.seed,
    ).resolved()


@dataclass(frozen=True, slots=True)
class _Way:
    """How a student is distilled: its objective, and its teacher's if that is trained first; passes an image."""

    objective: Any
    online: bool
    passes: int
    teacher: Any = None
    teacher_passes: int = 3


def _way(settings: DistillSettings) -> _Way:
    """What the settings ask for. Raises InputError where they contradict each other."""
    from stillproof.core.distillation import Distillation
    from stillproof.core.feature_distillation import FeatureObjective
    from stillproof.core.plugins import build
    from stillproof.core.spec import Spec
    from stillproof.errors import InputError

    asked = {"objective": settings.objective != "kd", "robust": settings.robust, "defensive": settings.defensive}
    given = [f"--{name}" for name, is_asked in asked.items() if is_asked]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} contradict each other.", "Give one of them.")
    if settings.robust and "objective" in settings.model_fields_set:
        raise InputError("--objective and --robust contradict each other.", "Give one of them.")
    if settings.trusted and not settings.resistant:
        raise InputError("--trusted names images for --resistant alone.", "Add --resistant, or leave it out.")
    if settings.temperature != DEFENSIVE_TEMPERATURE and not settings.defensive:
        raise InputError(
            "--temperature is that of defensive distillation.", "Add --defensive, or use kd?temperature=4."
        )
    if settings.resistant and (settings.defensive or settings.robust or settings.label_mode == "online"):
        raise InputError(
            "--resistant learns the teacher's consensus on what a scan leaves, and that alone.",
            "Leave out --defensive, --robust and --label-mode online.",
        )
    if settings.defensive:
        from stillproof.evasion.hardening.defensive_distillation import AtTemperature, SoftLabels

        if settings.label_mode == "online":
            raise InputError("defensive distillation learns answers on the plain images.", "Leave --label-mode out.")
        temperature = settings.temperature
        return _Way(SoftLabels(temperature=temperature), False, 3, AtTemperature(temperature=temperature))
    from stillproof.evasion.hardening.adversarial_training import AdversarialTraining
    from stillproof.evasion.hardening.inner import Inner

    # the labels of a set that may be poisoned are the attacker's
    chosen = UNLABELLED if settings.resistant and settings.objective == "kd" else settings.objective
    objective = build("objective", Spec.parse(settings.robust or chosen))
    if settings.robust and not isinstance(objective, Inner):
        raise InputError(f"{settings.robust!r} is no robust distillation.", "Use rslad or ard.")
    if isinstance(objective, Inner):
        training = AdversarialTraining(threat=objective.threat)
        return _Way(objective, True, 3 * (objective.steps + 2) + 1, training, 3 * (training.steps + 1))
    if settings.resistant and not (isinstance(objective, Distillation) and objective.alpha == 1):
        raise InputError(
            f"{settings.objective!r} cannot be distilled with --resistant: it matches features, or learns labels that "
            "may be an attacker's.",
            "Use kd?alpha=1, with any temperature.",
        )
    asked_for_cached = settings.label_mode == "cached" and "label_mode" in settings.model_fields_set
    if isinstance(objective, FeatureObjective) and asked_for_cached:
        raise InputError(
            f"{settings.objective!r} sees each view anew: no answers of it can be cached.",
            "Leave --label-mode out, or use online.",
        )
    online = settings.label_mode == "online" or isinstance(objective, FeatureObjective)
    return _Way(objective, online, 4 if online else 3)


def conclude(settings: DistillSettings, values: Mapping[str, Artefact]) -> Result:
    """How good the student is, and how much of the teacher is in it."""
    from stillproof.core import measures

    labels = values["teacher/test"].tensors["labels"].numpy()
    other = UNGUARDED if settings.resistant else "student alone"
    names = ("teacher", "student", other)
    logits = {name: values[f"{name}/test"].tensors["logits"].numpy() for name in names}
    taught = logits["teacher"].argmax(axis=1)
    rows: list[list[Any]] = []
    for name in names:
        guesses = logits[name].argmax(axis=1)
        rows.append(
            [
                name,
                measures.accuracy(guesses, labels),
                measures.agreement(guesses, taught),
                measures.agreement_on_mistakes(guesses, taught, labels),
                measures.expected_calibration_error(logits[name], labels),
                measures.kl_divergence(logits["teacher"], logits[name]),
            ]
        )
    columns = [
        "classifier",
        "test accuracy",
        "agreement with the teacher",
        "agreement on its mistakes",
        "ECE",
        "KL to the teacher",
    ]
    right = {name: (logits[name].argmax(axis=1) == labels)[None] for name in names}
    gain = measures.difference(right["student"], right[other])
    p = measures.mcnemar(right["student"][0], right[other][0])
    rows_of_gain: list[list[Any]] = [[f"student − {other}", gain, p]]
    found = [scan.finding(_scanning(settings), values)] if settings.resistant else []
    without = "on the whole transfer set" if settings.resistant else "without a teacher"
    return Result(
        verb="distill",
        status=worst(one.status for one in found),
        summary=f"the student reaches {rows[1][1].value:.1%} test accuracy, {rows[2][1].value:.1%} {without}.",
        notes=_notes(settings),
        findings=found,
        tables=[
            Table(
                title="Teacher and student",
                columns=columns,
                rows=rows,
                note="On the trusted images, on which neither student was trained."
                if settings.resistant
                else "`student alone` is trained on the labels only.",
            ),
            Table(
                title="What the scan costs" if settings.resistant else "What the teacher adds",
                columns=["", "test accuracy", "McNemar p"],
                rows=rows_of_gain,
            ),
        ],
        settings=settings_as_json(settings),
    )


def _notes(settings: DistillSettings) -> list[str]:
    if settings.defensive:
        return [
            "Defensive distillation hides gradients and removes no adversarial example (and not even that, if the "
            "teacher brought weights that were not trained at this temperature): "
            "`stillproof audit --model …/student.safetensors` shows what it is worth."
        ]
    if settings.resistant:
        unvouched = [] if settings.trusted is not None else [scan.UNVOUCHED]
        return [
            *unvouched,
            "`stillproof poison --defend` shows on planted poison what this keeps out of your pipeline.",
        ]
    if settings.robust:
        return ["How robust the student is, `stillproof audit --model …/student.safetensors` measures."]
    return []


def models(_settings: DistillSettings, values: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """The student and its teacher."""
    return {"student": values["student/model"], "teacher": values["teacher/model"]}


DISTILL = Verb("distill", DistillSettings, plan, conclude, models)
