"""`stillproof harden`: train a hardened classifier, and check that the defence took and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stillproof.findings import Finding, Result, Table, worst
from stillproof.verbs import Verb
from stillproof.verbs.settings import BY_PROFILE, TRAINING, DataSettings, Profile, settings_as_json

if TYPE_CHECKING:
    from stillproof.core.plan import Plan
    from stillproof.core.runtime import Runtime
    from stillproof.core.store import Artefact

BEST: Mapping[str, str] = {"theft": "ast"}
"""What `--method auto` takes against each threat."""


class HardenSettings(DataSettings):
    """Settings of `harden`."""

    by_profile: ClassVar[Mapping[Profile, Mapping[str, Any]]] = TRAINING

    model: str = Field(..., description="Model SPEC to harden; without weights it is trained first.")
    against: Literal["theft"] = Field("theft", description="What to harden against.")
    method: str = Field("auto", description="The hardening, by SPEC, or auto.")
    epochs: int = Field(12, ge=1, description=f"Training epochs. {BY_PROFILE}")
    retrainings: int = Field(3, ge=2, description="Honest retrainings that the gate compares with (SP-T4).")
    utility_budget: float = Field(0.02, ge=0, le=1, description="Accuracy that it may cost (SP-T3, SP-T4).")

    @property
    def hardening(self) -> str:
        """The SPEC of the hardening that is used."""
        return BEST[self.against] if self.method == "auto" else self.method


def plan(settings: HardenSettings, runtime: Runtime) -> Plan:
    """The graph of stages. Trains nothing. Raises InputError."""
    from stillproof.core.carving import data_stage
    from stillproof.core.classifiers import Model
    from stillproof.core.plan import Plan, stage
    from stillproof.core.plugins import build
    from stillproof.core.spec import Spec
    from stillproof.core.stages import answer_part, classifier_stage, training_stage
    from stillproof.core.training import Recipe

    model, recipe, seed = Model(settings.model), Recipe.standard(settings.epochs), settings.seed
    hardening = build("hardening", Spec.parse(settings.hardening))
    data = data_stage(settings.data, settings.limit)
    sizes = data.sizes
    common: dict[str, Any] = {"data": data.stage, "model": model, "recipe": recipe, "images": sizes.training}
    before = classifier_stage("the model", seed=seed, **common)
    hardened = hardening.stage(before, data.stage, recipe=recipe, images=sizes.training, seed=seed)
    classifiers = {"before": before, "hardened": hardened}
    outputs = {"data": data.stage} | {f"{name}/model": classifier for name, classifier in classifiers.items()}
    if hardened is not before:
        for number in range(1, settings.retrainings + 1):
            classifiers[f"retrained {number}"] = training_stage("the model again", seed=seed + number, **common)
    for name, classifier in classifiers.items():
        for part, images in (("validation", sizes.validation), ("test", sizes.test)):
            if part == "validation" or not name.startswith("retrained"):
                outputs[f"{name}/{part}"] = stage(
                    answer_part, f"measure {name}", passes=images, classifier=classifier, data=data.stage, part=part
                )
    return Plan(outputs, runtime)


def conclude(settings: HardenSettings, values: Mapping[str, Artefact]) -> Result:
    """Did it take (against several honest retrainings), and what does it cost (one seed, and the method says so)."""
    from stillproof.core import measures
    from stillproof.theft import protection
    from stillproof.theft.outcome import divergence_of

    labels = values["before/test"].tensors["labels"].numpy()
    test = {name: values[f"{name}/test"].tensors["logits"].numpy() for name in ("before", "hardened")}
    right = {name: (logits.argmax(axis=1) == labels)[None] for name, logits in test.items()}
    unseen = {name: values[f"{name}/validation"].tensors["logits"].numpy() for name in ("before", "hardened")}
    again = [values[name].tensors["logits"].numpy() for name in values if name.startswith("retrained")]
    name = settings.hardening
    utility = protection.utility_finding(name, right["before"], right["hardened"], settings.utility_budget)
    took = protection.took_finding(
        name,
        victim=[unseen["before"]],
        defended=[unseen["hardened"]],
        retrained=again,
        utility=utility.status,
        diverged=[how for how in (divergence_of(values["hardened/model"]),) if how is not None],
    )
    findings: list[Finding] = [utility, took]
    rows: list[list[Any]] = [
        [
            kind,
            measures.accuracy(logits.argmax(axis=1), labels),
            measures.expected_calibration_error(logits, labels),
            measures.negative_log_likelihood(logits, labels),
            measures.entropy(logits),
            measures.kl_divergence(test["before"], logits),
        ]
        for kind, logits in test.items()
    ]
    columns = ["classifier", "test accuracy", "ECE", "NLL", "entropy", "KL to the original"]
    kept = float(right["hardened"].mean())
    return Result(
        verb="harden",
        status=worst(finding.status for finding in findings),
        summary=f"{name}: {kept:.1%} test accuracy; {took.title[0].lower()}{took.title[1:]}. "
        "What it protects is measured by stillproof steal.",
        findings=findings,
        tables=[Table(title="Before and after", columns=columns, rows=rows)],
        settings=settings_as_json(settings),
    )


def models(_settings: HardenSettings, values: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """The hardened classifier, if there is one, and the one it was made from."""
    from stillproof.theft.outcome import divergence_of

    found = {"hardened": values["hardened/model"], "before": values["before/model"]}
    return {name: artefact for name, artefact in found.items() if divergence_of(artefact) is None}


HARDEN = Verb("harden", HardenSettings, plan, conclude, models)
