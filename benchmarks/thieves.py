"""Is any thief broken? With an undefended victim on digits, none may be more than 3 points worse than plain KD.

`python benchmarks/thieves.py`. A thief that is broken flatters every defence. Victim and student zoo:cnn?width=16,
10 queries a class, five seeds (STILLPROOF_SEEDS; more narrow the intervals). Every stage is kept (STILLPROOF_STORE), so
that a killed run goes on.
It is held to the whole interval: a thief who may be worse by more is not shown not to be.
Recorded, but not held to it: thieves who know less than KD does, kd-unlabelled and label-only. Left out: knockoff,
whose images are not the victim's. With fewer seeds than five it says what it saw, and records nothing.
Figures go to benchmarks/results/thieves.json.
"""

from __future__ import annotations

import os
import sys

import numpy as np

import stillproof
from shared.plans import executed, store_place
from shared.record import record
from stillproof.core import measures
from stillproof.core.runtime import Runtime
from stillproof.verbs.steal import StealSettings, cast, plan

SEEDS = int(os.environ.get("STILLPROOF_SEEDS", "5"))
EPOCHS = int(os.environ.get("STILLPROOF_THIEF_EPOCHS", "80"))
MARGIN, ENOUGH = 0.03, 5
KNOW_LESS = ("kd-unlabelled", "label-only")
"""They learn no labels: there is no reason why they should keep up with KD."""


def main() -> None:
    """Run the theft, compare each thief with `kd` seed by seed, and say which fall behind."""
    given = StealSettings(
        data="digits",
        victim="zoo:cnn?width=16",
        thief_model="zoo:cnn?width=16",
        queries="10/class",
        seeds=SEEDS,
        epochs=20,
        thief_epochs=EPOCHS,
    ).resolved()
    who = cast(given)
    made = executed(plan(given, Runtime.choose()).outputs, Runtime.choose())

    def right(name: str) -> np.ndarray:
        found = [made[f"{seed}/victim/{name}"].tensors for seed in who.seeds]
        return np.stack([(t["logits"].argmax(1) == t["labels"]).numpy() for t in found])

    rows, behind = {}, []
    for name in who.thieves:
        gap = measures.difference(right(name), right("kd"))
        rows[name] = {
            "accuracy": measures.mean_share(right(name)).model_dump(mode="json"),
            "minus KD": gap.model_dump(mode="json"),
            "chosen": [made[f"{seed}/victim/{name}"].values["chosen"] for seed in who.seeds],
        }
        fails = name not in KNOW_LESS and (gap.low is None or gap.low < -MARGIN)
        behind += [name] if fails else []
        print(f"{name:28} {right(name).mean():.3f}  KD {gap.value:+.3f} [{gap.low}, {gap.high}]{'  NOT SHOWN' * fails}")
    if SEEDS >= ENOUGH:
        record("thieves", seeds=SEEDS, margin=MARGIN, thieves=rows, behind=behind, version=stillproof.__version__)
    if behind:
        sys.exit(f"not shown to be within {MARGIN:.0%} of plain KD: {', '.join(behind)} (store: {store_place()})")


if __name__ == "__main__":
    main()
