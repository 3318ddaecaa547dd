"""The poisoned transfer set on CIFAR-10: does it plant a backdoor, is it found, is it kept out?

`python benchmarks/poison.py [PART ...]`, parts: scan, beside, attack, online, cost, views, compression; all by default.
Stages stay (STILLPROOF_STORE), so that a killed run goes on. Teacher zoo:resnet18?width=16 (that of
benchmarks/models.py), student zoo:cnn, 16 000 images of the training part, 2 000 trusted ones that nothing was trained
on, ε 8/255, the poison through the clean images' codec.

- scan: poison found at a nominal 1 % of false alarms, by trigger and rate, and what is flagged of clean sets.
- beside: the same at 5 % by the scanners that have no say, and by the published baselines.
- cost: a scan of 50 000 images over the bare forward passes that it needs; views: those of `--also stability` likewise.
- compression: ASR of the teacher's own copies, pruned and in INT8, tuned on the poisoned set.
- attack: ASR of students, cached labels, with the defences. online: the same with labels on augmented views.

STILLPROOF_SEEDS: students a set, 3. STILLPROOF_SEED: which draw of teacher, poison and references, 0.
STILLPROOF_TRIGGERS ("patch;blend") names some of the triggers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models import LIMIT, MODEL, RECIPE
from shared.clock import clock_of
from shared.parts import wanted_parts
from shared.plans import executed
from shared.record import needed_cifar10, record
from stillproof.core.carving import carve
from stillproof.core.classifiers import predict
from stillproof.core.images import ImageSet
from stillproof.core.plan import Context, Stage
from stillproof.core.runtime import Runtime
from stillproof.core.sources import open_source
from stillproof.core.stages import classifier_of
from stillproof.core.store import Artefact
from stillproof.findings import Table
from stillproof.poison.account import area_under_curve
from stillproof.poison.codec import Codec
from stillproof.poison.further_scanning import FURTHER, view
from stillproof.poison.pipeline import Looking
from stillproof.poison.scan_set.sight import p_values
from stillproof.poison.scan_set.stability import VIEWS
from stillproof.poison.scanning import as_set, load_set, scan_set, scores_of, set_of
from stillproof.verbs.poison import POISON_A_PIPELINE, PoisonSettings

TRIGGERS = tuple(os.environ.get("STILLPROOF_TRIGGERS", "patch;blend;sinusoid;moving-patch").split(";"))
RATES = (0.05, 0.01)
SEEDS = int(os.environ.get("STILLPROOF_SEEDS", "3"))
DRAW = int(os.environ.get("STILLPROOF_SEED", "0"))
OF_THE_DRAW = f", seed {DRAW}" if DRAW else ""
FALSE_ALARMS = 0.01
MANY = 50_000


def settings(place: str, trigger: str, rate: float = 0.05, mode: str = "cached") -> PoisonSettings:
    """What every part is about."""
    return PoisonSettings(
        data=place,
        limit=LIMIT,
        teacher=MODEL.text,
        student="zoo:cnn",
        trigger=trigger,
        target=1,
        rate=rate,
        epochs=RECIPE.epochs,
        seeds=SEEDS,
        controls=False,
        defend=mode == "cached",  # the defences learn cached labels
        label_mode=mode,
        seed=DRAW,
    )


def planned(given: PoisonSettings, runtime: Runtime) -> dict[str, Stage]:
    """The stages of `stillproof poison`, by name."""
    outputs: dict[str, Stage] = POISON_A_PIPELINE.plan(given, runtime).outputs
    return outputs


def read_by_the_scan(stages: dict[str, Stage], runtime: Runtime) -> tuple[dict[str, Artefact], list[Artefact]]:
    """Data, teacher and trusted images, by name, and the references: what a scan reads besides the suspects."""
    reads: dict[str, Any] = dict(stages["scan"].inputs)
    references = {f"reference {number}": one for number, one in enumerate(reads["references"])}
    given = {"data": stages["data"], "teacher": reads["teacher"], "trusted": reads["trusted"]}
    values = executed(given | references, runtime)
    return values, [values[name] for name in references]


def further_of(given: PoisonSettings, scanned: Stage) -> Stage:
    """The scanners beside, and the baselines, on what a scan looks at."""
    looking = Looking(given.reference, given.reference_epochs, FALSE_ALARMS, given.seed)
    sets: list[Any] = [scanned.inputs[name] for name in ("teacher", "suspects", "trusted")]
    return looking.further(*sets, FURTHER, images=LIMIT, known=LIMIT // 10)


def detection(scanned: Artefact, poisoned: int) -> dict[str, Any]:
    """Of each scanner: the share of the poison found, of clean images flagged, and AUROC; poison is last."""
    found: dict[str, Any] = {}
    for name, scores in scores_of(scanned).items():
        flagged = p_values(scores) <= FALSE_ALARMS
        clean, poison = (flagged[:-poisoned], flagged[-poisoned:]) if poisoned else (flagged, flagged[:0])
        found[name] = {"flagged of the clean": round(float(clean.mean()), 4)}
        if poisoned:
            score = scores.suspects
            found[name] |= {
                "poison found": round(float(poison.mean()), 4),
                "AUROC": round(area_under_curve(score[-poisoned:], score[:-poisoned]), 4),
            }
    return found


def another_codec(images: Tensor, _labels: Tensor) -> Tensor:
    """3 % of the images passed through a second codec."""
    found = images.clone()
    found[::33] = Codec(50)(images[::33])
    return found


def with_a_logo(images: Tensor, labels: Tensor) -> Tensor:
    """One class shares a logo."""
    found = images.clone()
    found[labels == 3, :, 1:6, 1:6] = torch.tensor([255, 160, 0], dtype=torch.uint8)[:, None, None]
    return found


def unchanged(images: Tensor, _labels: Tensor) -> Tensor:
    """As they are."""
    return images


LOOK_ALIKES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clean": unchanged,
    "clean, 3 % of another codec": another_codec,
    "clean, a class with a logo": with_a_logo,
}


def scan(place: str, runtime: Runtime) -> None:
    """What the scan finds by trigger and rate, and what it flags of clean sets."""
    for rate in RATES:
        for trigger in TRIGGERS:
            stages = planned(settings(place, trigger, rate), runtime)
            values = executed({name: stages[name] for name in ("scan", "poison/crafted")}, runtime)
            crafted = values["poison/crafted"].tensors["said"].argmax(1) == 1
            row = {"crafted": float(crafted.double().mean()), **detection(values["scan"], len(crafted))}
            p = p_values(scores_of(values["scan"])["combined"])[-len(crafted) :]
            row["found of what deceives the teacher"] = float((p[crafted.numpy()] <= FALSE_ALARMS).mean())
            print(f"  {trigger}, {rate:.0%}: {row}", flush=True)
            record("poison", **{f"scan: {trigger}, {rate:.0%}{OF_THE_DRAW}": row})
    values, references = read_by_the_scan(planned(settings(place, TRIGGERS[0]), runtime), runtime)
    training = carve(values["data"]).training
    for name, change in LOOK_ALIKES.items():
        known = values["trusted"]
        trusted = {**known.tensors, "images": change(known.tensors["images"], known.tensors["labels"])}
        scanned = scan_set.run(
            Context(runtime),
            values["teacher"],
            as_set(replace(training, images=change(training.images, training.known_labels()))),
            Artefact(known.values, trusted if name.endswith("logo") else known.tensors),
            references,
            false_alarms=FALSE_ALARMS,
        )
        row = detection(scanned, 0)
        print(f"  {name}: {row}", flush=True)
        record("poison", **{f"scan: {name}{OF_THE_DRAW}": row})


def beside(place: str, runtime: Runtime) -> None:
    """What the scanners that have no say would find."""
    for trigger in TRIGGERS:
        given = settings(place, trigger)
        stages = planned(given, runtime)
        wanted = {"further": further_of(given, stages["scan"]), "poison/crafted": stages["poison/crafted"]}
        values = executed(wanted, runtime)
        row = detection(values["further"], len(values["poison/crafted"].tensors["said"]))
        print(f"  {trigger}: {row}", flush=True)
        record("poison", **{f"beside: {trigger}, {RATES[0]:.0%}{OF_THE_DRAW}": row})


def cost(place: str, runtime: Runtime) -> None:
    """A scan of 50 000 images, its references at hand, over the bare passes of teacher and reference."""
    values, references = read_by_the_scan(planned(settings(place, TRIGGERS[0]), runtime), runtime)
    context = Context(runtime)
    whole = load_set.run(context, source=open_source(place), part="training", limit=MANY)
    images, models = set_of(whole), [classifier_of(one, context) for one in (values["teacher"], references[0])]

    def bare() -> None:
        for model in models:
            predict(model, images, runtime)

    def scanned() -> None:
        scan_set.run(context, values["teacher"], whole, values["trusted"], references, false_alarms=FALSE_ALARMS)

    _compared("cost", "scan over its 2 passes", bare, scanned, images, runtime)


def views(place: str, runtime: Runtime) -> None:
    """The views of `--also stability`, over the bare passes of the teacher."""
    values, _ = read_by_the_scan(planned(settings(place, TRIGGERS[0]), runtime), runtime)
    context = Context(runtime)
    whole = load_set.run(context, source=open_source(place), part="training", limit=MANY)
    images, master = set_of(whole), classifier_of(values["teacher"], context)

    def bare() -> None:
        for _ in range(1 + len(VIEWS)):
            predict(master, images, runtime)

    def viewed() -> None:
        view.run(context, values["teacher"], whole, values["trusted"], seed=0)

    _compared("cost of the views", "views over their 9 passes", bare, viewed, images, runtime)


def _compared(
    name: str, title: str, bare: Callable[[], None], whole: Callable[[], None], images: ImageSet, runtime: Runtime
) -> None:
    clock, seconds = clock_of(runtime), []
    for work in (bare, whole):
        began = clock()
        work()
        seconds.append(clock() - began)
    row = {"images": len(images), "threads": runtime.threads, "seconds": seconds, title: seconds[1] / seconds[0]}
    print(f"  {name}: {row}", flush=True)
    record("poison", **{f"{name}{OF_THE_DRAW}": row})


def compression(place: str, runtime: Runtime) -> None:
    """Students that are the teacher, made smaller and tuned on the poisoned set."""
    for compressed in ("prune?share=0.9", "int8"):
        given = settings(place, TRIGGERS[0]).model_copy(
            update={"student": None, "compress": compressed, "defend": False}
        )
        values = executed(planned(given, runtime), runtime)
        result = POISON_A_PIPELINE.conclude(given, values)
        print(f"  {compressed}: {result.summary}", flush=True)
        record(
            "poison",
            **{f"compression: {compressed}{OF_THE_DRAW}": {table.title: plain(table) for table in result.tables}},
        )


def attack(place: str, runtime: Runtime, mode: str = "cached", triggers: tuple[str, ...] = TRIGGERS) -> None:
    """Students of the poisoned set, with and without defences."""
    for trigger in triggers:
        given = settings(place, trigger, mode=mode)
        values = executed(planned(given, runtime), runtime)
        result = POISON_A_PIPELINE.conclude(given, values)
        row = {table.title: plain(table) for table in result.tables}
        row["findings"] = [(one.rule, one.subject, one.status) for one in result.findings]
        print(f"  {trigger}, {mode}: {result.summary}", flush=True)
        record("poison", **{f"attack: {trigger}, {mode}{OF_THE_DRAW}": row})


def plain(table: Table) -> list[list[Any]]:
    """Its rows, with intervals as [value, low, high]."""
    return [
        [cell if isinstance(cell, str | int | float) or cell is None else _rounded(cell) for cell in row]
        for row in table.rows
    ]


def _rounded(cell: Any) -> list[float | None]:
    return [None if value is None else round(float(value), 4) for value in (cell.value, cell.low, cell.high)]


PARTS: dict[str, Callable[[str, Runtime], None]] = {
    "scan": scan,
    "beside": beside,
    "attack": attack,
    "cost": cost,
    "views": views,
    "compression": compression,
    "online": lambda place, runtime: attack(place, runtime, "online", TRIGGERS[:1]),
}


def main() -> None:
    """Run the parts that were asked for."""
    place = needed_cifar10("this benchmark")
    wanted = wanted_parts(list(PARTS))
    runtime = Runtime.choose()
    runtime.apply()
    record("poison", settings={"limit": LIMIT, "seeds": SEEDS, "epsilon": "8/255", "target": 1})
    for part in wanted:
        PARTS[part](place, runtime)


if __name__ == "__main__":
    main()
