"""`stillproof poison`: can a poisoned transfer set backdoor the student of a clean teacher?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stillproof.findings import Result, worst
from stillproof.verbs import Verb
from stillproof.verbs.settings import BY_PROFILE, TRAINING, DataSettings, Profile, merged, settings_as_json

if TYPE_CHECKING:
    from stillproof.core.carving import Data
    from stillproof.core.classifiers import Model
    from stillproof.core.compression import Compression
    from stillproof.core.plan import Plan
    from stillproof.core.runtime import Runtime
    from stillproof.core.store import Artefact
    from stillproof.poison.craft import Crafting
    from stillproof.runs.image_sets import WrittenSet

FALSE_ALARMS = 0.01
"""At which the scanners are compared."""


class PoisonSettings(DataSettings):
    """Settings of `poison`."""

    by_profile: ClassVar[Mapping[Profile, Mapping[str, Any]]] = merged(
        TRAINING,
        {
            "smoke": {"seeds": 3, "reference_epochs": 30},
            "standard": {"seeds": 3, "reference_epochs": 60},
            "thorough": {"seeds": 5, "reference_epochs": 120},
        },
    )

    teacher: str = Field(..., description="Model SPEC of the clean teacher; without weights it is trained first.")
    student: str | None = Field(None, description="Model SPEC of the student; or give --compress.")
    compress: str | None = Field(
        None,
        description="Compression SPEC: prune?share=0.8, int8. The student is then the teacher, made smaller and tuned "
        "on the transfer set.",
    )
    rate: float = Field(0.05, gt=0, lt=0.5, description="Share of the whole transfer set that is poison.")
    trigger: str = Field("patch", description="Trigger SPEC: patch?size=3, blend, sinusoid, moving-patch, picture.")
    target: int = Field(0, ge=0, description="The class that the trigger is to call forth, by its number.")
    threat: str = Field("linf:8/255", description="How much of an image the attacker changes beside the trigger.")
    steps: int = Field(40, ge=1, description="Steps of PGD that poison is made with.")
    surrogate: str | None = Field(
        None, description="Model SPEC that the attacker has in place of the teacher; without weights it is trained."
    )
    fools: str | None = Field(
        None,
        description="Model SPEC of references that the poison is to deceive as well: four, distilled as the scan's are "
        "(an adaptive attacker).",
    )
    codec: str = Field("auto", description="Of the poison: auto (as the clean images'), none, or jpeg:75.")
    objective: str = Field("kd?alpha=1", description="Objective SPEC of the distillation.")
    label_mode: Literal["cached", "online", "both"] = Field(
        "cached", description="Teacher answers on the plain images, once, or on each augmented view."
    )
    controls: bool = Field(True, description="Distil on the controls as well: δ, trigger and noise apart.")
    defend: bool = Field(
        False, description="Distil on the poisoned set with the defences as well, which learn cached labels (SP-P4)."
    )
    reference: str = Field("zoo:cnn?width=32", description="Model SPEC of the references of the scan.")
    reference_epochs: int = Field(60, ge=1, description=f"Epochs of the references. {BY_PROFILE}")
    bar: float = Field(0.1, ge=0, le=1, description="ASR lift over clean students that is put up with (SP-P1).")
    seeds: int = Field(3, ge=1, description=f"Students of each transfer set. {BY_PROFILE}")
    epochs: int = Field(12, ge=1, description=f"Epochs of teacher and students. {BY_PROFILE}")

    @property
    def modes(self) -> tuple[str, ...]:
        """The label modes that are looked at."""
        return ("cached", "online") if self.label_mode == "both" else (self.label_mode,)

    @property
    def students(self) -> tuple[int, ...]:
        """The seeds of the students."""
        return tuple(range(self.seed, self.seed + self.seeds))


def plan(settings: PoisonSettings, runtime: Runtime) -> Plan:
    """The graph of stages. Trains nothing. Raises InputError."""
    from stillproof.core.carving import data_stage
    from stillproof.core.classifiers import Model
    from stillproof.core.plan import Plan
    from stillproof.core.plugins import build
    from stillproof.core.spec import Spec
    from stillproof.poison.pipeline import LEFT_OUT, Looking
    from stillproof.poison.red_team import RedTeam

    compression = _compression(settings)
    if settings.defend:
        _check_defences(settings)
    data = data_stage(settings.data, settings.limit)
    test = RedTeam(
        data=data,
        teacher=Model(settings.teacher),
        student=None if settings.student is None else Model(settings.student),
        compression=compression,
        objective=build("objective", Spec.parse(settings.objective)),
        crafting=_crafting(settings, data),
        rate=settings.rate,
        trigger=build("trigger", Spec.parse(settings.trigger)),
        surrogate=None if settings.surrogate is None else Model(settings.surrogate),
        fools=_fooled(settings),
        modes=settings.modes,
        students=settings.students,
        epochs=settings.epochs,
        seed=settings.seed,
        looking=Looking(settings.reference, settings.reference_epochs, LEFT_OUT, settings.seed)
        if settings.defend
        else None,
    )
    return Plan(test.stages(), runtime)


def _fooled(settings: PoisonSettings) -> Model | None:
    """The model of the references that the attacker deceives, if any. Raises InputError."""
    from stillproof.core.classifiers import Model
    from stillproof.errors import InputError

    if settings.fools is None:
        return None
    found = Model(settings.fools)
    if found.has_weights:
        raise InputError(f"--fools {settings.fools} brings weights.", "Its references are distilled: leave them out.")
    return found


def _check_defences(settings: PoisonSettings) -> None:
    """Raise InputError where students under defences would learn otherwise than those that they are compared with."""
    from stillproof.core.feature_distillation import FeatureObjective
    from stillproof.core.plugins import build
    from stillproof.core.spec import Spec
    from stillproof.errors import InputError

    if settings.label_mode == "online":
        raise InputError(
            "the defences learn cached labels, and would be compared with students of online ones.",
            "Use --label-mode both, or leave it out.",
        )
    if isinstance(build("objective", Spec.parse(settings.objective)), FeatureObjective):
        raise InputError(
            f"the defences learn the teacher's answers, and {settings.objective!r} matches features.",
            "Use kd, dkd or logit-std, or leave --defend out.",
        )


def _compression(settings: PoisonSettings) -> Compression | None:
    """How the student is made of its teacher, if it is. Raises InputError."""
    from stillproof.core.feature_distillation import FeatureObjective
    from stillproof.core.plugins import build
    from stillproof.core.spec import Spec
    from stillproof.errors import InputError

    if (settings.student is None) == (settings.compress is None):
        what = "neither is" if settings.student is None else "both are"
        raise InputError(
            f"a student is distilled (--student) or made of its teacher (--compress), and {what} given.", "Give one."
        )
    if settings.compress is None:
        return None
    if settings.defend or settings.label_mode != "cached":
        raise InputError(
            "a compressed student is tuned on cached labels, without defences.",
            "Leave --defend and --label-mode out, or distil another student: --student.",
        )
    if isinstance(build("objective", Spec.parse(settings.objective)), FeatureObjective):
        raise InputError(
            f"a compressed student is tuned by its answers, and {settings.objective!r} matches features.",
            "Use kd, dkd or logit-std, or distil another student: --student.",
        )
    found: Compression = build("compression", Spec.parse(settings.compress))
    return found


def added_names(settings: PoisonSettings) -> list[str]:
    """What is added to transfer sets: poison, and the controls."""
    from stillproof.poison.craft import CONTROLS
    from stillproof.poison.red_team import POISON

    return [POISON, *(CONTROLS if settings.controls else ())]


def _crafting(settings: PoisonSettings, data: Data) -> dict[str, Crafting]:
    """How what is added is made, by name. Raises InputError."""
    from stillproof.attacks.threats import parse_threat
    from stillproof.core.plugins import build
    from stillproof.core.spec import Spec
    from stillproof.errors import InputError
    from stillproof.poison.codec import parse_codec
    from stillproof.poison.craft import Crafting
    from stillproof.poison.scanning import FEWEST_TRUSTED

    if settings.defend and data.sizes.validation < FEWEST_TRUSTED:
        raise InputError(
            f"--defend trusts the validation part, and {data.sizes.validation} images cannot say what is usual.",
            f"Give data with {10 * FEWEST_TRUSTED} training images or more, or a larger --limit.",
        )
    if settings.target >= data.classes:
        raise InputError(
            f"there is no class {settings.target} among {data.classes}.", f"Give --target below {data.classes}."
        )
    poison = Crafting(
        trigger=build("trigger", Spec.parse(settings.trigger)),
        target=settings.target,
        threat=parse_threat(settings.threat),
        steps=settings.steps,
        codec=parse_codec(settings.codec),
    )
    return {name: poison.of(name) for name in added_names(settings)}  # type: ignore[arg-type]


def conclude(settings: PoisonSettings, values: Mapping[str, Artefact]) -> Result:
    """Whether the pipeline can be backdoored, and by what."""
    import numpy as np

    from stillproof.core import measures
    from stillproof.poison import account, verdict
    from stillproof.poison.pictures import beside
    from stillproof.poison.pipeline import BASELINES, DEFENCES
    from stillproof.poison.premise import doubts
    from stillproof.poison.red_team import CLEAN, LEARNT, POISON
    from stillproof.poison.scanning import scores_of
    from stillproof.poison.stages import guesses_of, taken_for

    added, target = added_names(settings), settings.target
    names = [CLEAN, *added]
    teacher = guesses_of(values["teacher/backdoor"])
    own = measures.mean_share(teacher.hits(target, teacher.triggered)[None])
    crafted = {name: taken_for(values[f"{name}/crafted"], target) for name in added}
    findings, tables, found, against = [], [], {}, []
    for mode in settings.modes:
        students = {name: [guesses_of(values[f"{name}/{mode}/{seed}"]) for seed in settings.students] for name in names}
        rows = [verdict.planted(name, students[name], students[CLEAN], target) for name in names]
        found[mode] = rows
        subject = f"{settings.student or settings.compress} on {settings.trigger}, {mode} labels"
        findings.append(verdict.of_the_pipeline(subject, rows[1], rows[0], own, crafted[POISON][0], settings.bar))
        tables.append(account.students_table(f"Students, {mode} labels", rows))
    if settings.defend:
        everyone = {
            name: [guesses_of(values[f"{name}/{LEARNT}/{seed}"]) for seed in settings.students]
            for name in (CLEAN, *DEFENCES, *BASELINES)
        }
        resisting = [
            verdict.planted(name, students, everyone[CLEAN], target)
            for name, students in everyone.items()
            if name != CLEAN
        ]
        undefended, against = found[LEARNT][1], doubts(values["premise"], values["scan"].values["classes"])
        findings += [
            verdict.of_a_defence(row.name, row, undefended, against) for row in resisting if row.name in DEFENCES
        ]
        tables.append(account.students_table("Students of the poisoned set under defences, and baselines", resisting))
        scores, poisoned = scores_of(values["scan"]), len(values[f"{POISON}/crafted"].tensors["images"])
        n = len(values["scan"].tensors["flagged"])
        tables.append(account.detection_table(scores, np.arange(n) >= n - poisoned, FALSE_ALARMS))
    tables.append(account.poison_table(crafted))
    rows_of = "; ".join(f"{mode} labels {found[mode][1].asr.value:.1%}" for mode in settings.modes)
    return Result(
        verb="poison",
        status=worst(finding.status for finding in findings),
        summary=f"{settings.rate:.1%} of poison: the student's ASR is {rows_of}; its teacher's {own.value:.1%}.",
        notes=against,
        findings=findings,
        tables=tables,
        curves=[account.rates(found)],
        images=beside(values[f"{POISON}/crafted"]),
        settings=settings_as_json(settings),
    )


def models(settings: PoisonSettings, values: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """The teacher, and the first student of the clean and of the poisoned set."""
    from stillproof.poison.red_team import CLEAN, POISON

    mode, seed = settings.modes[0], settings.students[0]
    return {"teacher": values["teacher"]} | {
        f"student-{name}": values[f"{which}/{mode}/{seed}/model"]
        for name, which in (("clean", CLEAN), ("poisoned", POISON))
    }


def sets(settings: PoisonSettings, values: Mapping[str, Artefact]) -> dict[str, WrittenSet]:
    """The poisoned transfer set, marked as such, with the clean test images beside it."""
    from stillproof.core.carving import carve
    from stillproof.core.images import ImageSet
    from stillproof.poison.red_team import POISON
    from stillproof.runs.image_sets import WrittenSet

    parts, crafted = carve(values["data"]), values[f"{POISON}/crafted"].tensors
    poison = ImageSet(crafted["images"], crafted["labels"], parts.training.classes, POISON)
    manifest = {
        "what": "POISONED: a transfer set that stillproof poison made to test a pipeline; do not train on it",
        "of": settings.data,
        "trigger": settings.trigger,
        "target": settings.target,
        "threat": settings.threat,
        "rate": settings.rate,
        "poisoned_rows": list(range(len(parts.training), len(parts.training) + len(poison))),
    }
    return {"poisoned": WrittenSet(parts.training.with_more(poison), manifest, parts.test)}


POISON_A_PIPELINE = Verb("poison", PoisonSettings, plan, conclude, models, sets)
