"""`stillproof distill`: a student from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stillproof.findings import Result, Table
from stillproof.verbs import Verb
from stillproof.verbs.settings import BY_PROFILE, TRAINING, DataSettings, Profile, settings_as_json

if TYPE_CHECKING:
    from stillproof.core.plan import Plan
    from stillproof.core.runtime import Runtime
    from stillproof.core.store import Artefact


DEFENSIVE_TEMPERATURE = 50.0


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
    from stillproof.core.feature_distillation import FeatureObjective
    from stillproof.core.plugins import build
    from stillproof.core.spec import Spec
    from stillproof.errors import InputError

    asked = {"objective": settings.objective != "kd", "robust": settings.robust, "defensive": settings.defensive}
    chosen = [f"--{name}" for name, is_asked in asked.items() if is_asked]
    if len(chosen) > 1:
        raise InputError(f"{' and '.join(chosen)} contradict each other.", "Give one of them.")
    if settings.temperature != DEFENSIVE_TEMPERATURE and not settings.defensive:
        raise InputError(
            "--temperature is that of defensive distillation.", "Add --defensive, or use kd?temperature=4."
        )
    if settings.defensive:
        from stillproof.evasion.hardening.defensive_distillation import AtTemperature, SoftLabels

        if settings.label_mode == "online":
            raise InputError("defensive distillation learns answers on the plain images.", "Leave --label-mode out.")
        temperature = settings.temperature
        return _Way(SoftLabels(temperature=temperature), False, 3, AtTemperature(temperature=temperature))
    from stillproof.evasion.hardening.adversarial_training import AdversarialTraining
    from stillproof.evasion.hardening.inner import Inner

    objective = build("objective", Spec.parse(settings.robust or settings.objective))
    if settings.robust and not isinstance(objective, Inner):
        raise InputError(f"{settings.robust!r} is no robust distillation.", "Use rslad or ard.")
    if isinstance(objective, Inner):
        training = AdversarialTraining(threat=objective.threat)
        return _Way(objective, True, 3 * (objective.steps + 2) + 1, training, 3 * (training.steps + 1))
    online = settings.label_mode == "online" or isinstance(objective, FeatureObjective)
    return _Way(objective, online, 4 if online else 3)


def conclude(settings: DistillSettings, values: Mapping[str, Artefact]) -> Result:
    """How good the student is, and how much of the teacher is in it."""
    from stillproof.core import measures

    labels = values["teacher/test"].tensors["labels"].numpy()
    names = ("teacher", "student", "student alone")
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
    gain = measures.difference(right["student"], right["student alone"])
    p = measures.mcnemar(right["student"][0], right["student alone"][0])
    rows_of_gain: list[list[Any]] = [["student − student alone", gain, p]]
    return Result(
        verb="distill",
        status="pass",
        summary=f"the student reaches {rows[1][1].value:.1%} test accuracy, {rows[2][1].value:.1%} without a teacher.",
        notes=_notes(settings),
        tables=[
            Table(
                title="Teacher and student",
                columns=columns,
                rows=rows,
                note="`student alone` is trained on the labels only.",
            ),
            Table(title="What the teacher adds", columns=["", "test accuracy", "McNemar p"], rows=rows_of_gain),
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
    if settings.robust:
        return ["How robust the student is, `stillproof audit --model …/student.safetensors` measures."]
    return []


def models(_settings: DistillSettings, values: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """The student and its teacher."""
    return {"student": values["student/model"], "teacher": values["teacher/model"]}


DISTILL = Verb("distill", DistillSettings, plan, conclude, models)
