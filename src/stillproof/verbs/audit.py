"""`stillproof audit`: is it robust, or does it only hide its gradients?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from stillproof.findings import Result, worst
from stillproof.verbs import Verb
from stillproof.verbs.settings import BY_PROFILE, TRAINING, DataSettings, Profile, merged, settings_as_json

if TYPE_CHECKING:
    from stillproof.core.carving import Data
    from stillproof.core.classifiers import Model
    from stillproof.core.plan import Plan, Stage
    from stillproof.core.runtime import Runtime
    from stillproof.core.store import Artefact
    from stillproof.evasion.allowance import Budget
    from stillproof.evasion.auditing import Thoroughness

LOOKING: Mapping[Profile, Mapping[str, Any]] = {
    "smoke": {"images": 200},
    "standard": {"images": 1000},
    "thorough": {"images": 5000},
}
"""How many images a profile audits."""

PASSES = 500
"""That an audit of a robust classifier takes an image, about, for the estimate of work."""

PLANTED_SCALE = 50.0
"""What the self-test multiplies logits by, to plant a masked twin."""


class AuditSettings(DataSettings):
    """Settings of `audit`."""

    by_profile: ClassVar[Mapping[Profile, Mapping[str, Any]]] = merged(TRAINING, LOOKING)

    model: str = Field(..., description="Model SPEC to audit; without weights it is trained first.")
    threat: str = Field("linf:8/255", description="What an attacker may change: linf:8/255, l2:0.5.")
    images: int = Field(1000, ge=2, description=f"Test images that are attacked. {BY_PROFILE}")
    bar: float = Field(0.3, ge=0, le=1, description="Worst-case robust accuracy that is asked for (SP-E1).")
    black_box: bool = Field(
        False,
        description="Ask the model only: it is http://HOST/PATH?format=npz&rate=20, or a module:factory that returns "
        "anything that answers images with logits or labels.",
    )
    queries: int | None = Field(None, ge=1, description="Images that a black box is asked about at the most.")
    budget: str | None = Field(None, description="Where the ladder stops at the latest: 10min, 90s, 200000 (passes).")
    twin: str = Field(
        "auto",
        description="Model SPEC of the undistilled twin whose examples are transferred; auto: the same "
        "architecture where it can be trained, else zoo:resnet18?width=16 and zoo:cnn; none.",
    )
    adaptive: str | None = Field(
        None,
        description="module:factory of your own attack: called with the classifier, it returns an attack, a loss "
        "(logits, labels, target) -> (n,), or a module to climb through (BPDA).",
    )
    self_test: bool = Field(
        False, description="Audit a planted masked twin (logits × 50) and a clean twin as well, and compare."
    )
    epochs: int = Field(12, ge=1, description=f"Epochs of what is trained first. {BY_PROFILE}")

    @property
    def is_black_box(self) -> bool:
        """Whether nothing but answers is to be had."""
        return self.black_box or self.model.startswith(("http://", "https://"))


def plan(settings: AuditSettings, runtime: Runtime) -> Plan:
    """The graph of stages. Trains nothing. Raises InputError."""
    from stillproof.attacks.threats import parse_threat
    from stillproof.core.carving import data_stage
    from stillproof.core.classifiers import Model
    from stillproof.core.noise import derive
    from stillproof.core.plan import Plan
    from stillproof.core.stages import classifier_stage
    from stillproof.core.training import Recipe

    parse_threat(settings.threat)
    data = data_stage(settings.data, settings.limit)
    recipe = Recipe.standard(settings.epochs)
    common: dict[str, Any] = {"data": data.stage, "recipe": recipe, "images": data.sizes.training}
    outputs: dict[str, Stage] = {"data": data.stage}
    twins: list[Stage] = []
    if settings.twin != "none" or settings.self_test:
        names = _twins_of(settings)
        seeds = [derive(settings.seed, "twin", *range(number)) for number in range(len(names))]
        made = zip(names, seeds, strict=True)
        twins = [classifier_stage("the twin", model=name, seed=seed, **common) for name, seed in made]
    shown = twins if settings.twin != "none" else []
    if settings.is_black_box:
        outputs["model/audit"] = _black_box_stage(settings, data, twins=shown)
        return Plan(outputs, runtime)
    classifier = classifier_stage("the model", model=Model(settings.model), seed=settings.seed, **common)
    outputs["model"] = classifier
    subjects = {"model": (classifier, 1.0)}
    if settings.self_test:
        subjects |= {"masked twin": (classifier, PLANTED_SCALE), "clean twin": (twins[0], 1.0)}
    for name, (audited, scale) in subjects.items():
        others = [twin for twin in shown if twin is not audited]  # what fools a classifier is no transfer to itself
        outputs[f"{name}/audit"] = audit_stage(settings, data, audited, twins=others, what=f"the {name}", scale=scale)
    return Plan(outputs, runtime)


def audit_stage(
    settings: AuditSettings, data: Data, classifier: Stage, *, twins: Sequence[Stage], what: str, scale: float = 1.0
) -> Stage:
    """The stage that audits a classifier. scale: factor on its logits, to plant a masked one. Raises InputError."""
    from stillproof.core.plan import stage
    from stillproof.evasion.stages import Adaptive, audit_classifier

    adaptive = Adaptive(settings.adaptive)
    adaptive.check()
    return stage(
        audit_classifier,
        f"audit {what}",
        passes=PASSES * min(settings.images, data.sizes.test),
        classifier=classifier,
        scale=scale,
        adaptive=adaptive,
        **_given(settings, data, twins),
    )


def _given(settings: AuditSettings, data: Data, twins: Sequence[Stage]) -> dict[str, Any]:
    return {
        "data": data.stage,
        "threat": settings.threat,
        "thoroughness": thoroughness(settings),
        "budget": parse_budget(settings.budget),
        "seed": settings.seed,
        **({"twins": twins} if twins else {}),
    }


def _black_box_stage(settings: AuditSettings, data: Data, *, twins: Sequence[Stage]) -> Stage:
    from stillproof.core.plan import stage
    from stillproof.errors import InputError
    from stillproof.evasion.stages import BlackBox, audit_black_box

    if settings.adaptive or settings.self_test:
        raise InputError(
            "a black box shows no gradient to climb, and no logits to multiply.",
            "Leave --adaptive and --self-test out, or give the model itself.",
        )
    box = BlackBox(settings.model, settings.queries)
    box.check()
    images = min(settings.images, data.sizes.test)
    if settings.queries is not None and settings.queries < 2 * images:
        raise InputError(
            f"{settings.queries} queries are too few for {images} images.",
            "Give --queries of at least twice --images, or fewer images.",
        )
    return stage(audit_black_box, "audit the black box", box=box, **_given(settings, data, twins))


def _twins_of(settings: AuditSettings) -> list[Model]:
    """Where its architecture is not known, two that are not alike: what fools one may not fool what it stands for."""
    from stillproof.core.classifiers import Model

    if settings.twin not in ("auto", "none"):
        return [Model(settings.twin)]
    if not settings.is_black_box and Model(settings.model).architecture.scheme == "zoo":
        return [Model(settings.model).untrained]
    return [Model("zoo:resnet18?width=16"), Model("zoo:cnn")]


def thoroughness(settings: AuditSettings) -> Thoroughness:
    """How much a profile looks at."""
    from stillproof.evasion.auditing import Thoroughness
    from stillproof.evasion.ladder import Effort

    if settings.profile == "smoke":
        effort = Effort(
            apgd=40, targets=4, targeted=20, nearest=50, draws=50, probing=100, square=1000, hop=1500, patient=30
        )
        return Thoroughness(images=settings.images, close=64, problems=12, points=200, effort=effort)
    if settings.profile == "thorough":
        return Thoroughness(images=settings.images, effort=Effort(watched=settings.images))
    return Thoroughness(images=settings.images)


def parse_budget(text: str | None) -> Budget:
    """`10min`, `90s`, `2h`, or a number of passes. Raises InputError."""
    from stillproof.errors import InputError
    from stillproof.evasion.allowance import Budget

    if text is None:
        return Budget()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|passes)?", text.strip())
    if not found:
        raise InputError(f"{text!r} is no budget.", "Write 10min, 90s, 2h, or a number of passes.")
    unit = found[2] or "passes"
    if unit == "passes":
        return Budget(passes=int(float(found[1])))
    return Budget(seconds=float(found[1]) * {"s": 1, "min": 60, "h": 3600}[unit])


def conclude(settings: AuditSettings, values: Mapping[str, Artefact]) -> Result:
    """The verdict."""
    from stillproof.attacks.threats import parse_threat
    from stillproof.evasion import account, verdict
    from stillproof.evasion.pictures import strip
    from stillproof.evasion.stages import evidence_of

    evidence = evidence_of(values["model/audit"])
    found = verdict.decide(evidence)
    findings = verdict.findings(settings.model, found, evidence, settings.bar)
    tables = account.tables(found, evidence)
    notes: list[str] = []
    if settings.self_test:
        planted = {name: verdict.decide(evidence_of(values[f"{name}/audit"])) for name in ("masked twin", "clean twin")}
        tables.insert(0, account.self_test({"model": found} | planted))
        said = {name: one.masked for name, one in planted.items()}
        if said != {"masked twin": "yes", "clean twin": "no"}:
            told = ", ".join(f"{name}: masked {masked}" for name, masked in said.items())
            notes.append(f"The self-test failed: the audit does not tell planted twins apart on these data ({told}).")
    claimed = "" if found.claimed.value is None else f"PGD on the deployed output leaves {found.claimed.value:.1%}, "
    summary = (
        f"masked: {found.masked}. {found.clean.value:.1%} accuracy; {claimed}the worst case over all that was tried "
        f"leaves {found.robust.value:.1%} ({settings.threat})."
    )
    return Result(
        verb="audit",
        status=worst([finding.status for finding in findings] + (["error"] if notes else [])),
        summary=summary,
        notes=notes,
        findings=findings,
        tables=tables,
        curves=account.curves(evidence, parse_threat(settings.threat).epsilon),
        images=strip(values["model/audit"]),
        settings=settings_as_json(settings),
    )


def models(_settings: AuditSettings, values: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """The classifier that was audited."""
    return {"model": values["model"]} if "model" in values else {}


AUDIT = Verb("audit", AuditSettings, plan, conclude, models)
