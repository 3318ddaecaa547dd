"""Is a backdoored student told from a clean one? 50 backdoored and 30 clean on CIFAR-10, 30 each on digits.

`python benchmarks/students.py [PART ...]`, parts: cifar10, louder, two classes, digits; all by default. Stages stay
(STILLPROOF_STORE). Backdoored: five triggers, none of which is in the scan's bank (which is looked up), two targets,
and one to three seeds (cifar10: 20 students and as many clean ones; louder, triggers of which a student learns more:
20, whose clean ones are those of cifar10; two classes of CIFAR-10: 10; digits: 30); only those count whose ASR is 50 %
or more above that of the clean student of their seed. The scan sees student, teacher and
trusted images (on CIFAR-10 the validation part, on digits the test images), and no transfer set. A part has one
teacher, and a pair of clean students a seed that say what is usual: the intervals do not cover these.
STILLPROOF_SEEDS: so many students a trigger and target instead (of two classes it stays one). Figures go to
benchmarks/results/students.json.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import torch

from models import LIMIT, RECIPE
from shared.parts import wanted_parts
from shared.plans import executed
from shared.record import needed_cifar10, record
from stillproof.core import measures
from stillproof.core.carving import carve
from stillproof.core.classifiers import Model
from stillproof.core.noise import derive
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.plugins import build
from stillproof.core.runtime import Runtime
from stillproof.core.spec import Spec
from stillproof.core.store import Artefact
from stillproof.poison.pipeline import Inspecting
from stillproof.poison.resisting import vouched
from stillproof.poison.scan_student.bank import bank
from stillproof.poison.scan_student.verdict import of_the_student
from stillproof.poison.scanning import as_set
from stillproof.poison.stages import guesses_of
from stillproof.poison.student_scanning import inspected
from stillproof.verbs.poison import POISON_A_PIPELINE, PoisonSettings

WIDE = ("moving-patch?pattern=random&seed=5", "blend?opacity=0.25", "sinusoid?frequency=3&amplitude=0.12")
LOUDER = (
    "patch?size=7&pattern=random&seed=4",
    "patch?size=6&pattern=checker",
    "moving-patch?seed=6",
    "blend?opacity=0.25&seed=2",
    "sinusoid?frequency=3&amplitude=0.25",
)
SEEDS = int(os.environ.get("STILLPROOF_SEEDS", "0"))
PLANTED, WEAKLY = 0.5, 0.1
"""ASR lift from which a student counts as backdoored, and from which `stillproof poison` calls it so (SP-P1)."""


@dataclass(frozen=True)
class Setting:
    """What one part is about."""

    given: dict[str, Any]
    trusted: Any
    triggers: tuple[str, ...]
    targets: tuple[int, int]
    seeds: int
    """Students a trigger and target."""
    epochs: int
    """Of the clean students that the scan distils."""
    inversion: int
    clean: bool = True
    """Whether it has clean students of its own."""


@job(version=1)
def tested(_context: Context, data: Artefact) -> Artefact:
    """The test images as the trusted set."""
    return as_set(carve(data).test)


def setting(name: str) -> Setting:
    """Of a part. Exits where CIFAR-10 is wanted and not there."""
    if name == "digits":
        small = {"teacher": "zoo:cnn?width=16", "student": "zoo:cnn?width=16", "threat": "linf:0.2", "rate": 0.1}
        chosen = {"data": "digits", "epochs": 60, **small}
        triggers = ("patch?pattern=random&seed=3", "patch?size=3&pattern=white", *WIDE)
        return Setting(chosen, tested, triggers, (1, 7), seeds=SEEDS or 3, epochs=60, inversion=20)
    place = needed_cifar10("this part")
    small = {"teacher": "zoo:cnn?width=32", "student": "zoo:cnn?width=16", "epochs": RECIPE.epochs}
    given = {**small, "rate": 0.1, "threat": "linf:8/255", "limit": LIMIT}
    triggers = ("patch?size=5&pattern=random&seed=3", "patch?size=5&pattern=white", *WIDE)
    if name == "two classes":
        of_two = {**given, "data": "two_classes:automobiles_and_horses", "limit": None}
        return Setting(of_two, vouched, triggers, (0, 1), seeds=1, epochs=60, inversion=20)
    louder, of_ten = name == "louder", {**given, "data": place}
    wanted = LOUDER if louder else triggers
    return Setting(of_ten, vouched, wanted, (1, 7), seeds=SEEDS or 2, epochs=60, inversion=20, clean=not louder)


def planned(of: Setting, trigger: str, target: int, seed: int, runtime: Runtime) -> dict[str, Stage]:
    """The stages of `stillproof poison` for one student of the poisoned set and one of the clean one."""
    chosen = {"trigger": trigger, "target": target, "seeds": 1, "controls": False, **of.given}
    found: dict[str, Stage] = POISON_A_PIPELINE.plan(PoisonSettings(**chosen), runtime).outputs
    if seed:  # further students of the same poison
        for which in ("nothing", "poison"):
            first = found[f"{which}/cached/0/model"]
            other = first.settings | {"seed": derive(seed, "student")}
            made = stage(first.job, f"{first.label}, student {seed}", **first.inputs, **other)
            measured = found[f"{which}/cached/0"]
            found[f"{which}/cached/0/model"] = made
            found[f"{which}/cached/0"] = stage(
                measured.job, measured.label, **{**measured.inputs, "classifier": made}, **measured.settings
            )
    return found


def looked_at(of: Setting, stages: dict[str, Stage], which: str, seed: int) -> Stage:
    """The stage of a student's scan: as many pairs of clean students say what is usual as there are seeds."""
    trusted = stage(of.trusted, "take the trusted set", data=stages["data"])
    inspecting = Inspecting(Model(str(of.given["student"])), False, of.epochs, of.inversion, seed % of.seeds)
    return inspecting.stage(stages["teacher"], stages[f"{which}/cached/0/model"], trusted)


def asr(measured: Artefact, target: int) -> float:
    """Of a student, on the test images."""
    seen = guesses_of(measured)
    return float(seen.hits(target, seen.triggered).mean())


def check_that_none_is_in_the_bank(of: Setting) -> None:
    """Exits where the scan would look up a trigger that is planted."""
    shape = (1, 8, 8) if of.given["data"] == "digits" else (3, 32, 32)
    half = torch.full(shape, 0.5)
    known = [stamp(half) for stamp in bank(shape, {}).values()]
    for text in of.triggers:
        for stamp in build("trigger", Spec.parse(text)).stamps(shape):
            if any(torch.equal(stamp(half), other) for other in known):
                sys.exit(f"{text} is in the bank of the scan")


def part(name: str, runtime: Runtime) -> None:
    """All students of a part; what is known is recorded after each, so that a killed run has not been for nothing."""
    of = setting(name)
    check_that_none_is_in_the_bank(of)
    poisoned: list[dict[str, Any]] = []
    clean: list[str] = []
    for seed in range(of.seeds):
        for trigger in of.triggers:
            for target in of.targets:
                stages = planned(of, trigger, target, seed, runtime)
                wanted = {key: stages[key] for key in ("poison/cached/0", "nothing/cached/0")}
                wanted["scan"] = looked_at(of, stages, "poison", seed)
                values = executed(wanted, runtime)
                lift = asr(values["poison/cached/0"], target) - asr(values["nothing/cached/0"], target)
                said = of_the_student(trigger, inspected(values["scan"])).status
                row = {"trigger": trigger, "target": target, "seed": seed, "lift": round(lift, 3), "said": said}
                print(f"  {name}: {row}", flush=True)
                poisoned.append(row)
                record("students", **{name: account(poisoned, clean)})
    for seed in range(of.seeds * len(of.triggers) * len(of.targets) if of.clean else 0):
        stages = planned(of, of.triggers[0], of.targets[0], 100 + seed, runtime)
        looked = looked_at(of, stages, "nothing", seed)
        clean.append(of_the_student("clean", inspected(executed({"scan": looked}, runtime)["scan"])).status)
        print(f"  {name}, clean {seed}: {clean[-1]}", flush=True)
        record("students", **{name: account(poisoned, clean)})


def account(poisoned: list[dict[str, Any]], clean: list[str]) -> dict[str, Any]:
    """The errors of both kinds. Of students whose lift is less it is told what was said, and held to nothing."""
    kinds = {
        "backdoored": [row["said"] for row in poisoned if row["lift"] >= PLANTED],
        "weakly": [row["said"] for row in poisoned if WEAKLY <= row["lift"] < PLANTED],
        "not planted": [row["said"] for row in poisoned if row["lift"] < WEAKLY],
        "clean": clean,
    }
    missed = kinds["backdoored"]
    return {
        "students": poisoned,
        "verdicts": {kind: {said: some.count(said) for said in sorted(set(some))} for kind, some in kinds.items()},
        "missed": _share(sum(said != "fail" for said in missed), len(missed)),
        "false alarms": _share(clean.count("fail"), len(clean)),
    }


def _share(hits: int, n: int) -> dict[str, Any] | None:
    if not n:
        return None
    share = measures.share(hits, n)
    return {"errors": hits, "of": n, "low": share.low, "high": share.high}


def main() -> None:
    """Run the parts that were asked for."""
    runtime = Runtime.choose()
    runtime.apply()
    for name in wanted_parts(["cifar10", "louder", "two classes", "digits"]):
        part(name, runtime)


if __name__ == "__main__":
    main()
