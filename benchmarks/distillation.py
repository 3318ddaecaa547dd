"""What the objectives of `distill` are worth on CIFAR-10: a student's test accuracy against plain KD, three seeds.

Teacher zoo:resnet18?width=16, student zoo:preresnet20?width=8, standard profile (12 epochs) on the training part of
20 000 images, every objective at its defaults (those of its paper or its reference code, which train for 240 epochs;
nothing is tuned here). Resumable: what is in the store (STILLPROOF_STORE, default runs/store) is not run again. About
an hour and a half on two cores from nothing.
`python benchmarks/distillation.py [NAME ...]` runs some of them: kd, kd-cached, dkd, logit-std, fitnets, attention,
rkd, crd.
"""

from __future__ import annotations

import sys
from typing import Any

import stillproof
from shared.plans import store_place
from shared.record import needed_cifar10, record
from stillproof.core import measures

RUNS = {"kd": ("kd", "online"), "kd-cached": ("kd", "cached")} | {
    name: (name, "online") for name in ("dkd", "logit-std", "fitnets", "attention", "rkd", "crd")
}
"""By name: objective and label mode."""

SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {
    "teacher": "zoo:resnet18?width=16",
    "student": "zoo:preresnet20?width=8",
    "limit": 20_000,
}


def accuracies(data: str, objective: str, label_mode: str) -> dict[str, list[float]]:
    """Test accuracy of the student, of the same without a teacher, and of the teacher, by seed."""
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        options = stillproof.RunOptions(store=store_place())
        result = stillproof.run(
            "distill", options, data=data, objective=objective, label_mode=label_mode, seed=seed, **SETTINGS
        )
        for name, accuracy, *_ in result.tables[0].rows:
            found.setdefault(str(name), []).append(accuracy.value)
    return found


def difference(found: list[float], base: list[float]) -> dict[str, Any]:
    """Seed by seed, with an interval over seeds."""
    gains = [mine - theirs for mine, theirs in zip(found, base, strict=True)]
    return measures.over_seeds(gains, "fraction").model_dump(mode="json")


def main() -> None:
    """Run what was asked for, against plain KD with an online teacher, which is what features always have."""
    data = needed_cifar10("distillation")
    names = sys.argv[1:] or list(RUNS)
    if unknown := set(names) - set(RUNS):
        sys.exit(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    plain = accuracies(data, *RUNS["kd"])["student"]
    record("distillation", settings={**SETTINGS, "seeds": list(SEEDS), "profile": "standard"})
    for name in names:
        found: dict[str, Any] = dict(accuracies(data, *RUNS[name]))
        found["against no teacher"] = difference(found["student"], found["student alone"])
        if name != "kd":
            found["against kd"] = difference(found["student"], plain)
        record("distillation", **{name: found})


if __name__ == "__main__":
    main()
