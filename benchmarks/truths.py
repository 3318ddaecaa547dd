"""Planted truths: is what is masked called masked, and what is honest honest? Over several trainings.

`python benchmarks/truths.py [PART ...]`, parts: digits, cifar10, honest; all by default. Every classifier and every
audit is a stage (STILLPROOF_STORE), so that a killed run goes on. Figures go to benchmarks/results/truths.json.

- digits, cifar10: the table of truths. Of what is randomised it is asked that the audit notices. Distilled classifiers
  and their undistilled twin (the same network, plainly trained) at a quarter and a half of the radius too.
- honest: the false-alarm rate over further honest classifiers, on digits: four networks.

STILLPROOF_SEEDS: trainings of each, 3; or STILLPROOF_SEED, one of them. STILLPROOF_CLASSIFIERS ("plain;signs") names
some of the trained ones. STILLPROOF_AUDIT_IMAGES: test images at most, 1000. STILLPROOF_SHARES ("1;0.5"): of the
radius.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import LIMIT, RECIPE
from shared.parts import wanted_parts
from shared.plans import executed
from shared.record import needed_cifar10, record
from stillproof.attacks.threats import Linf
from stillproof.core import measures
from stillproof.core.carving import carve, data_stage
from stillproof.core.classifiers import Model
from stillproof.core.images import Augmentation, as_float
from stillproof.core.noise import derive
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.runtime import Runtime
from stillproof.core.stages import classifier_of, distil, training_stage
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.evasion.auditing import Thoroughness, audit
from stillproof.evasion.evidence import Evidence
from stillproof.evasion.hardening.adversarial_training import AdversarialTraining
from stillproof.evasion.hardening.defensive_distillation import DefensiveDistillation
from stillproof.evasion.hardening.rslad import RSLAD
from stillproof.evasion.indicators import NOT_THE_SLOPE
from stillproof.evasion.stages import artefact_of, audit_classifier, evidence_of
from stillproof.evasion.verdict import decide

SMALL = Model("zoo:cnn?width=16")
"""On CIFAR-10: small enough for three trainings of everything, PGD training and RSLAD too, in an hour of one core."""
SIGNS = Model("signs:Signs")
TEMPERATURES = (20.0, 50.0, 100.0)
SHARES = tuple(float(share) for share in os.environ.get("STILLPROOF_SHARES", "1;0.25;0.5").split(";"))
"""Of the radius: all are looked at at the whole of it, distilled ones and their twin at others as well."""
AS_ROBUST = 0.03
"""How far apart the worst cases of a PGD-trained classifier may be, with hidden gradients and without."""
IMAGES = int(os.environ.get("STILLPROOF_AUDIT_IMAGES", "1000"))
ONE = os.environ.get("STILLPROOF_SEED")
SEEDS = [int(ONE)] if ONE else list(range(int(os.environ.get("STILLPROOF_SEEDS", "3"))))
CHOSEN = os.environ.get("STILLPROOF_CLASSIFIERS", "")


@dataclass(frozen=True)
class Setting:
    """What one part is about. long: epochs of the over-trained; others: further honest networks."""

    data: str
    limit: int | None
    model: Model
    recipe: Recipe
    long: int
    radius: float
    others: tuple[str, ...]


def setting(name: str) -> Setting:
    """Of a part. Exits where CIFAR-10 is wanted and not there."""
    if name == "digits":
        recipe = Recipe(epochs=12, batch_size=50, learning_rate=0.1)
        small = ("zoo:vit", "zoo:preresnet20?width=8", "zoo:resnet18?width=8", "zoo:cnn?width=32")
        return Setting("digits", None, Model("zoo:cnn?width=8"), recipe, 100, 0.1, small)
    place = needed_cifar10("this part")
    return Setting(place, LIMIT, SMALL, RECIPE, 40, 8 / 255, ())


class Wrapped(nn.Module):
    """Something done to a classifier's images or logits."""

    def __init__(
        self, classifier: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.classifier, self.before, self.after = classifier, before, after

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        return self.after(self.classifier(self.before(images)))


def same(values: Tensor) -> Tensor:
    """The identity."""
    return values


def levels(images: Tensor) -> Tensor:
    """8 levels a channel."""
    return (images * 7).round() / 7


def resized_and_padded(images: Tensor) -> Tensor:
    """Random size and place (Xie et al. 2018)."""
    whole = images.shape[-1]
    size = int(torch.randint(7 * whole // 8, whole + 1, ()))
    small = F.interpolate(images, (size, size), mode="nearest")
    left, top = (int(torch.randint(0, whole + 1 - size, ())) for _ in range(2))
    return F.pad(small, (left, whole - size - left, top, whole - size - top))


def saturated(logits: Tensor) -> Tensor:
    """log of softmax of a hundred times as much, as the door makes logits of probabilities."""
    return (100 * logits).softmax(1).clamp_min(torch.finfo(torch.float32).tiny).log()


def rounded(model: nn.Module) -> nn.Module:
    """Its weights in bf16, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it is": lambda model: model,
    "bf16 weights": rounded,
    "logits + 1000": lambda model: Wrapped(model, same, lambda logits: logits + 1000),
    "logits × 100": lambda model: Wrapped(model, same, lambda logits: logits * 100),
    "saturated probabilities": lambda model: Wrapped(model, same, saturated),
    "8 levels": lambda model: Wrapped(model, levels, same),
    "random resize and pad": lambda model: Wrapped(model, resized_and_padded, same),
}


@dataclass(frozen=True)
class Planted:
    """A trained classifier, what is done to it, and the truth: masked (yes), honest (no), or randomised."""

    classifier: str
    way: str
    truth: str

    @property
    def name(self) -> str:
        """How the table calls it."""
        return self.classifier if self.way == "as it is" else f"{self.classifier}, {self.way}"


TRUTHS = (
    *(Planted("plain", way, "no") for way in ("as it is", "bf16 weights", "logits + 1000")),
    *(Planted(name, "as it is", "no") for name in ("over-trained", "PGD-trained", "RSLAD")),
    *(Planted(f"distilled, T = {temperature:g}", "as it is", "yes") for temperature in TEMPERATURES),
    *(Planted("plain", way, "yes") for way in ("logits × 100", "saturated probabilities", "8 levels")),
    Planted("signs", "as it is", "yes"),
    Planted("PGD-trained", "logits × 100", "yes"),
    Planted("plain", "random resize and pad", "randomised"),
)


def trained(of: Setting, data: Stage, images: int, seed: int) -> dict[str, Stage]:
    """The stages that train the classifiers of one seed."""
    given: dict[str, Any] = {"data": data, "images": images}
    common = {"model": of.model, "recipe": of.recipe, "seed": seed, **given}
    long = replace(of.recipe, epochs=of.long, weight_decay=0.0, augmentation=Augmentation(shift=0, flip=False))
    robust = AdversarialTraining(threat=f"linf:{of.radius}") if of.data == "digits" else AdversarialTraining()
    found = {
        "plain": training_stage("plain", **common),
        "twin": training_stage("the twin", **{**common, "seed": seed + 1}),
        "over-trained": training_stage("over-trained", **{**common, "recipe": long}),
        "signs": training_stage("signs", **{**common, "model": SIGNS}),
        "PGD-trained": training_stage("by PGD", objective=robust, passes=3 * (robust.steps + 1), **common),
        **{other: training_stage(other, **{**common, "model": Model(other)}) for other in of.others},
    }
    for temperature in TEMPERATURES:
        found[f"distilled, T = {temperature:g}"] = DefensiveDistillation(temperature=temperature).stage(**common)
    objective = RSLAD(threat=robust.threat)
    found["RSLAD"] = stage(
        distil,
        f"distil by RSLAD, seed {seed}",
        passes=3 * (objective.steps + 2) * images * of.recipe.epochs,
        teacher=found["PGD-trained"],
        data=data,
        model=of.model,
        objective=objective,
        online=False,
        recipe=of.recipe,
        seed=derive(seed, "student"),
    )
    return found


@job(version=2)
def audit_planted(
    context: Context,
    classifier: Artefact,
    twin: Artefact,
    data: Artefact,
    *,
    way: str,
    radius: float,
    thoroughness: Thoroughness,
    audit_version: int,  # noqa: ARG001  # in the stage's key: what another version saw is another's
) -> Artefact:
    """What an audit sees of a planted truth."""
    test = carve(data).test
    test = test.subset(torch.arange(min(thoroughness.images, len(test))))
    audited = audit(
        WAYS[way](classifier_of(classifier, context)).eval(),
        as_float(test.images),
        test.known_labels(),
        Linf(radius),
        outputs="probabilities" if "probabilities" in way else "logits",
        classes=len(test.classes),
        thoroughness=thoroughness,
        twins=[classifier_of(twin, context)],
        runtime=context.runtime,
        checkpoint=context.checkpoint,
    )
    return artefact_of(audited, test)


def audit_stage(stages: Mapping[str, Stage], data: Stage, planted: Planted, radius: float) -> Stage:
    """The stage that looks at a planted truth."""
    return stage(
        audit_planted,
        f"audit {planted.name} at {radius:.3f}",
        classifier=stages[planted.classifier],
        twin=stages["twin"],
        data=data,
        way=planted.way,
        radius=radius,
        thoroughness=Thoroughness(images=IMAGES),
        audit_version=audit_classifier.version,
    )


def row_of(evidence: Evidence) -> dict[str, Any]:
    """What is recorded of an audit."""
    verdict = decide(evidence)
    costs = [(step["forwards"] + step["backwards"], step["seconds"]) for step in evidence.trail]
    logits = evidence.logits
    return {
        "masked": verdict.masked,
        "why": verdict.why,
        "accuracy": verdict.clean.value,
        "FGSM leaves": float((evidence.right & (evidence.outcomes[0] != 1)).mean()),
        "PGD leaves": verdict.claimed.value,
        "worst case": [verdict.robust.value, verdict.robust.low, verdict.robust.high],
        "signs": [f"{sign.number} {sign.name}" for sign in verdict.signs if sign.is_present],
        "zero gradient": float((evidence.ce == 0).mean()),
        "slope, of what gradients promise": next(
            (sign.measured.value for sign in verdict.signs if sign.name == NOT_THE_SLOPE), None
        ),
        "logits, L1, median": float(np.median(np.abs(logits).sum(1))),
        "passes": sum(cost for cost, _ in costs),
        "seconds": round(sum(seconds for _, seconds in costs), 1),
    }


def is_met(planted: Planted, row: dict[str, Any], base: dict[str, Any]) -> bool:
    """Whether the audit says what is true; base: its row of the classifier that nothing was done to."""
    if planted.truth == "randomised":
        return "7 two passes differ" in row["signs"] and row["masked"] != "yes"
    keeps = planted.classifier != "PGD-trained" or abs(row["worst case"][0] - base["worst case"][0]) <= AS_ROBUST
    return row["masked"] == planted.truth and keeps


def looked_at(of: Setting, part: str, planted: Sequence[tuple[Planted, float]], runtime: Runtime) -> list[bool]:
    """Audit, and record, each at its share of the radius; whether each is met, over all seeds."""
    source = data_stage(of.data, of.limit)
    met: list[bool] = []
    for seed in SEEDS:
        bases: dict[str, dict[str, Any]] = {}
        stages = trained(of, source.stage, source.sizes.training, seed)
        for one, share in planted:
            if CHOSEN and one.classifier not in CHOSEN.split(";"):
                continue
            looked = audit_stage(stages, source.stage, one, share * of.radius)
            row = row_of(evidence_of(executed({"audit": looked}, runtime)["audit"]))
            base = bases.setdefault(f"{one.classifier} at {share}", row)
            row |= {"truth": one.truth, "met": is_met(one, row, base), "ladder": audit_classifier.version}
            at = "" if share == 1 else f", {share:g} of the radius"
            print(f"  {one.name}{at}, seed {seed}: {row}", flush=True)
            record("truths", **{f"{part}: {one.name}{at}, seed {seed}": row})
            met.append(bool(row["met"]))
    return met


def table(part: str, runtime: Runtime) -> None:
    """The truths at the radius, and the distilled with their twin below it."""
    names = ("plain", *(f"distilled, T = {temperature:g}" for temperature in TEMPERATURES))
    asked = [(one, share) for share in SHARES for one in TRUTHS if share == 1 or one.name in names]
    looked_at(setting(part), part, asked, runtime)


def honest(_part: str, runtime: Runtime) -> None:
    """How often an honest classifier is called masked, or not said to be honest."""
    of = setting("digits")
    met = looked_at(of, "honest", [(Planted(name, "as it is", "no"), 1.0) for name in of.others], runtime)
    share = measures.share(len(met) - sum(met), len(met))
    if not CHOSEN and not ONE:  # a part is no rate
        record("truths", honest={"not said to be honest": len(met) - sum(met), "of": len(met), "high": share.high})


PARTS = {"digits": table, "cifar10": table, "honest": honest}


def main() -> None:
    """Run the parts that were asked for."""
    wanted = wanted_parts(list(PARTS))
    runtime = Runtime.choose()
    runtime.apply()
    record("truths", settings={"images": IMAGES, "threads": runtime.threads})
    for part in wanted:
        PARTS[part](part, runtime)


if __name__ == "__main__":
    main()
