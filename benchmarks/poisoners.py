"""What a poisoner needs, and what one who knows the scan gets through: CIFAR-10, one setting changed at a time.

`python benchmarks/poisoners.py [PART ...]`, parts: needs, adaptive; both by default. Everything else is as in
benchmarks/poison.py, whose stages `adaptive` shares (STILLPROOF_STORE): a patch, 5 %, ε 8/255, cached labels, one
student; `needs` has a smaller teacher and student, and three students of each set.
STILLPROOF_ROWS ("rate 1 %;ε 4/255") names some of the rows. Figures go to benchmarks/results/poisoners.json.

- needs: ASR by rate, ε, trigger, label mode, controls, and what the attacker has in place of the teacher.
- adaptive: the attackers of whom a scan has to fear something: is their poison found, what is left of its effect in a
  student of what the scan leaves, and does it plant a backdoor where nobody looks?
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from models import RECIPE
from poison import FALSE_ALARMS, OF_THE_DRAW, detection, plain, planned, settings
from shared.parts import wanted_parts
from shared.plans import executed
from shared.record import needed_cifar10, record
from stillproof.core.carving import data_stage
from stillproof.core.classifiers import Model
from stillproof.core.noise import derive
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.plugins import build
from stillproof.core.runtime import Runtime
from stillproof.core.spec import Spec
from stillproof.core.store import Artefact
from stillproof.poison.pipeline import Defended, Looking
from stillproof.poison.stages import guesses_of, measure_backdoor, taken_for
from stillproof.poison.verdict import planted
from stillproof.verbs.poison import POISON_A_PIPELINE, PoisonSettings

OTHER = "zoo:cnn?width=32"
"""What an attacker trains: a surrogate of the teacher, or references as the scan's are."""

AT_ONCE = {"seeds": 1, "defend": False}
SMALLER = {"teacher": "zoo:cnn?width=32", "student": "zoo:cnn?width=16", "seeds": 3, "defend": False}
"""What a poisoner needs is looked at with these, so that three students of every row take an hour of a core."""
ROWS = os.environ.get("STILLPROOF_ROWS", "")

NEEDS: Mapping[str, Mapping[str, Any]] = {
    "as it is, and the controls": {"controls": True},
    "rate 0.5 %": {"rate": 0.005},
    "rate 1 %": {"rate": 0.01},
    "rate 10 %": {"rate": 0.1},
    "ε 4/255": {"threat": "linf:4/255"},
    "ε 16/255": {"threat": "linf:16/255"},
    "blend": {"trigger": "blend"},
    "sinusoid": {"trigger": "sinusoid"},
    "moving patch": {"trigger": "moving-patch"},
    "blend, 1 %": {"trigger": "blend", "rate": 0.01},
    "sinusoid, 1 %": {"trigger": "sinusoid", "rate": 0.01},
    "online labels": {"label_mode": "online"},
    "a surrogate for the teacher": {"surrogate": "zoo:resnet18?width=8"},
    "without the codec": {"codec": "none"},
}


@job(version=1)
def betrayed(_context: Context, trusted: Artefact, added: Artefact, *, share: float) -> Artefact:
    """The trusted set with poison in it, that the attacker labelled."""
    extra = round(share * len(trusted.tensors["labels"]))
    images, labels = (torch.cat([trusted.tensors[name], added.tensors[name][-extra:]]) for name in ("images", "labels"))
    return Artefact(trusted.values, {"images": images, "labels": labels, "rows": torch.arange(len(labels))})


@dataclass(frozen=True)
class Betrayed(Defended):
    """A poisoned set whose trusted set is poisoned as well."""

    share: float

    @cached_property
    def trusted(self) -> Stage:
        """With poison among them."""
        return stage(betrayed, "poison the trusted set", trusted=super().trusted, added=self.crafted, share=self.share)


@dataclass(frozen=True)
class Attacker:
    """One who knows the scan. of: what is added; share: of poison among the trusted images."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    of: str = "poison"
    share: float = 0.0


ADAPTIVE = {
    "knows nothing of the scan": Attacker(),
    "has a surrogate for the teacher": Attacker({"surrogate": OTHER}),
    "fools teacher and references": Attacker({"fools": OTHER}),
    "moves the patch": Attacker({"trigger": "moving-patch"}),
    "passes by the codec": Attacker({"codec": "none"}),
    "stamps images of the target": Attacker({"controls": True}, of="trigger on the target's"),
    "poisons 5 % of the trusted set": Attacker(share=0.05),
}


def needs(place: str, runtime: Runtime) -> None:
    """What makes the attack work, and what does not."""
    for name, changes in chosen(NEEDS):
        given = settings(place, "patch").model_copy(update=SMALLER | dict(changes))
        result = POISON_A_PIPELINE.conclude(given, executed(planned(given, runtime), runtime))
        print(f"  {name}: {result.summary}", flush=True)
        record("poisoners", **{f"needs: {name}{OF_THE_DRAW}": {table.title: plain(table) for table in result.tables}})


def adaptive(place: str, runtime: Runtime) -> None:
    """What is found of attackers who know the scan, and what they plant."""
    for name, attacker in chosen(ADAPTIVE):
        given = settings(place, "patch").model_copy(update=AT_ONCE | dict(attacker.changes))
        values = executed(_stages(given, attacker, runtime), runtime)
        clean = [guesses_of(values["clean"])]
        row: dict[str, Any] = {
            "deceives the teacher": taken_for(values["crafted"], given.target)[0].value,
            **detection(values["scan"], len(values["crafted"].tensors["said"])),
        }
        for which in ("unscanned", "scanned"):
            found = planted(which, [guesses_of(values[which])], clean, given.target)
            row[which] = {
                "ASR": found.asr.value,
                "lift": [found.lift.value, found.lift.low, found.lift.high],
                "accuracy lost": found.lost.value,
            }
        print(f"  {name}: {row}", flush=True)
        record("poisoners", **{f"adaptive: {name}{OF_THE_DRAW}": row})


def _stages(given: PoisonSettings, attacker: Attacker, runtime: Runtime) -> dict[str, Stage]:
    """What is crafted, its scan, and students of the clean set, of the poisoned one and of what the scan leaves."""
    stages, data = planned(given, runtime), data_stage(given.data, given.limit)
    looking = Looking(given.reference, given.reference_epochs, FALSE_ALARMS, given.seed)
    read: Any = (data, stages["teacher"], stages[f"{attacker.of}/crafted"], looking)
    defended = Betrayed(*read, attacker.share) if attacker.share else Defended(*read)
    poisoned = stages[f"{attacker.of}/cached/{given.seed}/model"]
    students = defended.students(
        poisoned,
        model=Model(str(given.student)),
        objective=build("objective", Spec.parse(given.objective)),
        epochs=RECIPE.epochs,
        seed=derive(given.seed, "student"),
    )
    trigger = build("trigger", Spec.parse(given.trigger))
    return {
        "crafted": stages[f"{attacker.of}/crafted"],
        "scan": defended.scanned,
        "clean": stages[f"nothing/cached/{given.seed}"],
        "unscanned": stages[f"{attacker.of}/cached/{given.seed}"],
        "scanned": stage(
            measure_backdoor, "measure scanned", classifier=students["scan"], data=data.stage, trigger=trigger
        ),
    }


def chosen(rows: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Those that were asked for."""
    return [(name, row) for name, row in rows.items() if not ROWS or name in ROWS.split(";")]


PARTS: dict[str, Callable[[str, Runtime], None]] = {"needs": needs, "adaptive": adaptive}


def main() -> None:
    """Run the parts that were asked for."""
    place = needed_cifar10("this benchmark")
    runtime = Runtime.choose()
    runtime.apply()
    for part in wanted_parts(list(PARTS)):
        PARTS[part](place, runtime)


if __name__ == "__main__":
    main()
