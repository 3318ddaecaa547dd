"""What the objectives of `distill` are worth on CIFAR-10: a student's test accuracy against plain KD, three seeds.

Teacher zoo:resnet18?width=16, student zoo:preresnet20?width=8, standard profile (12 epochs) on the training part of
20 000 images, every objective at its defaults (those of its paper or its reference code, which train for 240 epochs;
nothing is tuned here). Resumable: what is in the store (STILLPROOF_STORE, default runs/store) is not run again. About
an hour and a half on two cores from nothing.
`python benchmarks/distillation.py [OBJECTIVE ...]` runs some of them.
"""

from __future__ import annotations

import sys
from typing import Any

import stillproof
from shared.plans import store_place
from shared.record import cifar10, record
from stillproof.core import measures

OBJECTIVES = ("kd", "dkd", "logit-std", "fitnets", "attention", "rkd", "crd")
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


def main() -> None:
    """Run what was asked for, against plain KD with an online teacher, which is what features always have."""
    data = cifar10()
    if not data:
        sys.exit("left out: distillation needs STILLPROOF_CIFAR10, a folder with CIFAR-10 as parquet")
    plain = accuracies(data, "kd", "online")["student"]
    for objective in sys.argv[1:] or OBJECTIVES:
        for label_mode in ("online", "cached") if objective == "kd" else ("online",):
            found = accuracies(data, objective, label_mode)
            gains = [mine - theirs for mine, theirs in zip(found["student"], plain, strict=True)]
            against = measures.over_seeds(gains, "fraction").model_dump(mode="json")
            record("distillation", settings={**SETTINGS, "seeds": list(SEEDS), "profile": "standard"})
            record("distillation", **{f"{objective}, {label_mode}": {**found, "against online kd": against}})


if __name__ == "__main__":
    main()
