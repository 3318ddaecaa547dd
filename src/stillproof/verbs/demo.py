"""`stillproof demo`: every workshop so far, on scikit-learn's digits, in minutes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from stillproof.findings import Result, worst
from stillproof.verbs import Verb, audit, poison, steal
from stillproof.verbs.settings import DataSettings, Profile

if TYPE_CHECKING:
    from stillproof.core.plan import Plan
    from stillproof.core.runtime import Runtime
    from stillproof.core.store import Artefact

MODEL = "zoo:cnn?width=16"
EPOCHS = 20
TEMPERATURE = 50.0

THEFT, EVASION, POISON = "theft/", "evasion/", "poison/"
"""What the names of each workshop's artefacts begin with."""


class DemoSettings(DataSettings):
    """Settings of `demo`."""

    by_profile: ClassVar[Mapping[Profile, Mapping[str, Any]]] = {"smoke": {}, "standard": {}, "thorough": {}}

    data: str = Field("digits", description="Data SPEC.")

    def theft(self) -> steal.StealSettings:
        """The theft that the demo is."""
        from stillproof.theft.cast import FIXED_KD

        return steal.StealSettings(
            profile="smoke",
            data=self.data,
            limit=self.limit,
            seed=self.seed,
            victim=MODEL,
            thief_model=MODEL,
            thief=("kd", "label-only", FIXED_KD),
            defence=("ast",),
            queries="5/class",
            seeds=5,
            epochs=EPOCHS,
            thief_epochs=80,
        )

    def evasion(self) -> audit.AuditSettings:
        """The audit that it is, of a defensively distilled classifier."""
        return audit.AuditSettings(
            profile="smoke",
            data=self.data,
            limit=self.limit,
            seed=self.seed,
            model=f"distilled, T = {TEMPERATURE:g}",
            threat="linf:0.1",
            images=120,
            epochs=EPOCHS,
        )

    def poison(self) -> poison.PoisonSettings:
        """The poisoning that it is, with the defences."""
        return poison.PoisonSettings(
            profile="smoke",
            data=self.data,
            limit=self.limit,
            seed=self.seed,
            teacher=MODEL,
            student=MODEL,
            trigger="patch?size=3&pattern=white",
            threat="linf:0.2",
            target=1,
            rate=0.1,
            controls=False,
            defend=True,
            reference="zoo:cnn?width=12",
            reference_epochs=60,
            seeds=1,
            epochs=60,
        )


def plan(settings: DemoSettings, runtime: Runtime) -> Plan:
    """Those of the theft, the audit and the poisoning; the audit's undistilled twin is the theft's first victim."""
    from stillproof.core.carving import data_stage
    from stillproof.core.classifiers import Model
    from stillproof.core.noise import derive
    from stillproof.core.plan import Plan
    from stillproof.core.training import Recipe
    from stillproof.evasion.hardening.defensive_distillation import DefensiveDistillation

    theft = steal.plan(settings.theft(), runtime).outputs
    data = data_stage(settings.data, settings.limit)
    distilled = DefensiveDistillation(temperature=TEMPERATURE).stage(
        data=data.stage,
        model=Model(MODEL),
        recipe=Recipe.standard(EPOCHS),
        seed=derive(settings.seed, "distilled"),
        images=data.sizes.training,
    )
    twin = theft[f"{settings.seed}/victim/model"]
    audited = audit.audit_stage(settings.evasion(), data, distilled, twins=[twin], what="the distilled classifier")
    outputs = {f"{THEFT}{name}": found for name, found in theft.items()}
    outputs |= {f"{EVASION}model": distilled, f"{EVASION}model/audit": audited}
    poisoned = poison.plan(settings.poison(), runtime).outputs
    return Plan(outputs | {f"{POISON}{name}": found for name, found in poisoned.items()}, runtime)


def _of(workshop: str, values: Mapping[str, Artefact]) -> dict[str, Artefact]:
    return {name.removeprefix(workshop): value for name, value in values.items() if name.startswith(workshop)}


def conclude(settings: DemoSettings, values: Mapping[str, Artefact]) -> Result:
    """All verdicts on one page."""
    found = [
        steal.conclude(settings.theft(), _of(THEFT, values)),
        audit.conclude(settings.evasion(), _of(EVASION, values)),
        poison.conclude(settings.poison(), _of(POISON, values)),
    ]
    return Result(
        verb="demo",
        status=worst(result.status for result in found),
        summary=" ".join(result.summary for result in found),
        notes=[note for result in found for note in result.notes],
        findings=[finding for result in found for finding in result.findings],
        tables=[table for result in found for table in result.tables],
        curves=[curve for result in found for curve in result.curves],
        images=[image for result in found for image in result.images],
        settings={"theft": found[0].settings, "evasion": found[1].settings, "poison": found[2].settings},
    )


def models(settings: DemoSettings, values: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """Those of the theft, the distilled classifier, and the teacher and students of the poisoning."""
    found = poison.models(settings.poison(), _of(POISON, values))
    stolen = steal.models(settings.theft(), _of(THEFT, values))
    return stolen | {"distilled": values[f"{EVASION}model"]} | found


DEMO = Verb("demo", DemoSettings, plan, conclude, models)
