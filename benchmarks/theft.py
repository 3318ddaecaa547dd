"""Defences against thieves on CIFAR-10: the matrix, a fraction of what lies around it, and what carries AST's effect.

`python benchmarks/theft.py [PART ...]`, parts: matrix, around, ast; all by default. Victim zoo:resnet18?width=16, on
20 000 images of the training part as everywhere (STILLPROOF_LIMIT), three seeds (STILLPROOF_SEEDS). Every training is a
stage (STILLPROOF_STORE), so that a killed run goes on; each row is a run of `stillproof steal`, recorded when it ends.
From nothing this is days on two cores: it is meant to be left alone. Figures go to benchmarks/results/theft.json.

- matrix: student zoo:cnn, 50 queries a class, labelled; every defence against every thief, responses at equal L1 beside
  responses as they are.
- around: one thing changed at a time, against the defences that did best there: another student, more queries, all
  queries, no labels, the victim's own images, other people's images (digits).
- ast: pairing, divergence, k and α, each alone; and the setting of the paper (KD at T = 4, α = .9 alone).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import stillproof
from models import LIMIT, MODEL, RECIPE
from shared.parts import wanted_parts
from shared.plans import store_place
from shared.record import cifar10, record

SEEDS = int(os.environ.get("STILLPROOF_SEEDS", "3"))
IMAGES = int(os.environ.get("STILLPROOF_LIMIT", str(LIMIT)))
HARDENINGS = ("ast", "ast?reference=true", "nasty", "cmim")
RESPONSES = (
    "top?k=3",
    "stingy",
    "round?decimals=1",
    "label-only",
    "power",
    "reverse-sigmoid",
    "mad",
    "adaptive-misinformation",
    "modelguard-w",
    "modelguard-s",
)
NOTHING = ("identity", "power?exponent=0.333")
"""Defences that change nothing an attacker cares about: their protection has to cover 0."""

FEW_DEFENCES = ("ast", "nasty", "mad", "modelguard-w", "round?decimals=1")
FEW_THIEVES = ("kd", "label-only", "logit-std", "recovery?guess=modelguard-w", "kd?temperature=4&alpha=0.9")
PAPER = ("kd?temperature=4&alpha=0.9",)

Row = tuple[str, Mapping[str, Any]]


def matrix() -> Iterator[Row]:
    """Defences × thieves, a row a kind of defence."""
    yield "hardenings", {"defence": HARDENINGS, "thief": "all"}
    yield "responses", {"defence": RESPONSES, "thief": "all"}
    yield "responses at L1 .5", {"defence": RESPONSES, "thief": "all", "response_l1": 0.5}
    yield "both", {"defence": ("ast+round?decimals=1", "ast+top?k=3"), "thief": "all"}
    yield "nothing", {"defence": NOTHING, "thief": "all"}
    yield "examples that transfer", {"defence": ("ast",), "thief": ("kd", "label-only"), "transfer": "linf:8/255"}


def around() -> Iterator[Row]:
    """One thing changed at a time."""
    common = {"defence": FEW_DEFENCES, "thief": FEW_THIEVES}
    yield "student preresnet20", {**common, "thief_model": "zoo:preresnet20"}
    for queries in ("10/class", "200/class"):
        yield f"queries {queries}", {**common, "queries": queries}
    yield "no labels", {**common, "labels": False, "thief": ("kd-unlabelled", "label-only")}
    yield "queries from inside", {**common, "queries_from": "inside"}
    yield "other people's images", {**common, "thief": ("knockoff",), "query_data": "digits"}


def ast() -> Iterator[Row]:
    """What carries its effect."""
    yield "paper", {"defence": ("ast", "ast?reference=true"), "thief": PAPER, "queries_from": "inside"}
    changes = ("pairing=random", "divergence=kl", "keep=1", "keep=5", "weight=0.02", "weight=0.2")
    yield "changes", {"defence": tuple(f"ast?{change}" for change in changes), "thief": ("kd", *PAPER)}


PARTS = {"matrix": matrix, "around": around, "ast": ast}


def main() -> None:
    """Run the parts that were asked for."""
    data = cifar10()
    if not data:
        sys.exit("left out: theft needs STILLPROOF_CIFAR10, a folder with CIFAR-10 as parquet")
    common = {"victim": MODEL.text, "thief_model": "zoo:cnn", "queries": "50/class", "epochs": RECIPE.epochs}
    for part in wanted_parts(list(PARTS)):
        for name, changes in PARTS[part]():
            given = {**common, "data": data, "limit": IMAGES, "seeds": SEEDS, **changes}
            result = stillproof.run("steal", stillproof.RunOptions(store=store_place()), **given)
            found = result.model_dump(mode="json", exclude={"curves", "images"})
            found["settings"]["data"] = "cifar10"
            print(f"  {part}, {name}: {result.summary}", flush=True)
            record("theft", **{f"{part}: {name}": found})


if __name__ == "__main__":
    main()
