"""Defences against thieves on CIFAR-10: the matrix, a fraction of what lies around it, and what carries AST's effect.

`python benchmarks/theft.py [PART ...]`, parts: key, everyone, level, matrix, around, ast; all by default. Victim
zoo:resnet18?width=16, on 20 000 images as everywhere (STILLPROOF_LIMIT), three seeds (STILLPROOF_SEEDS). Every training
is a stage (STILLPROOF_STORE), so that a killed run goes on; each row is a run of `stillproof steal`, recorded when it
ends. STILLPROOF_ROWS ("nasty;power") names some of the rows. Figures go to benchmarks/results/theft.json.

- key: every defence against the thieves that have decided so far, student zoo:cnn?width=16, 40 epochs a thief: about
  two hours of a core for the responses, an hour a seed for the hardenings.
- everyone: defences of `key` against every thief there is, at the size of `key`: about an hour and a half of a core.
- level: responses at the distance that the label alone has (L1 .28), and thieves who know the strength that came of it:
  about three quarters of an hour.
- matrix: student zoo:cnn, 100 epochs, 50 queries a class, labelled; every defence against every thief, responses at
  equal L1 beside responses as they are. From nothing this is days on two cores: it is meant to be left alone.
- around: with victim and student zoo:cnn?width=16, for which a hardening costs a seventh, the hardenings; then AST and
  ModelGuard-W, and one thing changed at a time: no labels, other people's images (digits), the victim's own images,
  fewer and more queries, another student, all images (12 epochs there). About three hours of a core.
- ast: pairing, divergence, k and α, each alone, with queries from outside and from inside, against thieves at one
  temperature each; T = 4 with the victim's own images is the setting of the paper. Victim and student as in `around`:
  about an hour and a half of a core.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import stillproof
from models import LIMIT, MODEL, RECIPE
from shared.parts import wanted_parts
from shared.plans import store_place
from shared.record import needed_cifar10, record

SEEDS = int(os.environ.get("STILLPROOF_SEEDS", "3"))
IMAGES = int(os.environ.get("STILLPROOF_LIMIT", str(LIMIT)))
ROWS = os.environ.get("STILLPROOF_ROWS", "")
HARDENINGS = ("nasty", "cmim", "ast", "ast?reference=true")
UNDONE = ("reverse-sigmoid", "power", "round?decimals=1", "top?k=3", "modelguard-w", "stingy")
"""Responses that answers alone determine: for each there is a thief who knows it."""

RESPONSES = (*UNDONE, "label-only", "mad", "adaptive-misinformation", "modelguard-s")
NOTHING = ("identity", "power?exponent=0.333")
"""Defences that change nothing an attacker cares about: their protection has to cover 0."""

PAPER = "kd?temperature=4&alpha=0.9"
TEMPERATURES = ("kd?temperature=1&alpha=0.9", PAPER, "kd?temperature=20&alpha=0.9")
"""The papers' thief, and the same thief who tries another temperature."""

KEY_THIEVES = ("kd", "kd-unlabelled", "label-only", *TEMPERATURES)
WEIGHTS = (0.02, 0.2, 0.5)
LABEL_L1 = 0.28
"""Mean distance of the label alone from the answers of the victim of `key`."""

SMALLER = {"thief_model": "zoo:cnn?width=16", "thief_epochs": 40}
ALL_SMALLER = {**SMALLER, "victim": "zoo:cnn?width=16"}

Row = tuple[str, Mapping[str, Any]]


def key() -> Iterator[Row]:
    """A row a defence, each beside the thief who knows it, if there is one."""
    for defence in (*RESPONSES, *NOTHING, *HARDENINGS):
        informed = (f"recovery?guess={defence}",) if defence in UNDONE else ()
        yield defence, {**SMALLER, "defence": (defence,), "thief": (*KEY_THIEVES, *informed)}


def everyone() -> Iterator[Row]:
    """A row a defence, against all thieves of `key` and those who are dearer or rarer."""
    for defence in ("round?decimals=1", "top?k=3", "stingy", "modelguard-w", "mad", "ast"):
        yield defence, {**SMALLER, "defence": (defence,), "thief": ("all", *TEMPERATURES)}


def level() -> Iterator[Row]:
    """Responses whose strength is tuned, so that each costs those who are served as much as the label alone would."""
    for defence in ("label-only", "modelguard-w", "mad", "reverse-sigmoid", "power"):
        informed = (f"recovery?guess={defence}&calibrated=true",) if defence in UNDONE else ()
        row = {"defence": (defence,), "thief": (*KEY_THIEVES, *informed), "response_l1": LABEL_L1}
        yield defence, {**SMALLER, **row}


def matrix() -> Iterator[Row]:
    """Defences × thieves, a row a kind of defence."""
    yield "hardenings", {"defence": HARDENINGS, "thief": "all"}
    yield "responses", {"defence": RESPONSES, "thief": "all"}
    yield "responses at L1 .5", {"defence": RESPONSES, "thief": "all", "response_l1": 0.5}
    yield "both", {"defence": ("ast+round?decimals=1", "ast+top?k=3"), "thief": "all"}
    yield "nothing", {"defence": NOTHING, "thief": "all"}
    yield "examples that transfer", {"defence": ("ast",), "thief": ("kd", "label-only"), "transfer": "linf:8/255"}


def around() -> Iterator[Row]:
    """One thing changed at a time: a hardening and a response, the thief of the papers and two who are cheap."""
    thieves = (*TEMPERATURES[:2], "label-only")
    common = {**ALL_SMALLER, "defence": ("ast", "modelguard-w"), "thief": thieves}
    yield "nothing changed", common
    yield "hardenings", {**ALL_SMALLER, "defence": ("nasty", "cmim", "ast"), "thief": KEY_THIEVES}
    yield "no labels", {**common, "labels": False, "thief": ("kd-unlabelled", "label-only")}
    yield "other people's images", {**common, "thief": ("knockoff",), "query_data": "digits"}
    yield "queries from inside", {**common, "queries_from": "inside"}
    yield "queries 10/class", {**common, "queries": "10/class"}
    yield "queries 200/class", {**common, "queries": "200/class"}  # all that the victim was not trained on
    yield "student preresnet20", {**common, "thief_model": "zoo:preresnet20"}
    for queries in ("500/class", "16000"):  # 16000: all that the victim was trained on
        many = {"queries": queries, "queries_from": "inside", "thief_epochs": RECIPE.epochs}
        yield f"queries from inside, {queries}", {**common, **many}


def ast() -> Iterator[Row]:
    """What carries its effect: a thief who tries three temperatures, of AST as it is and with one thing changed."""
    changes = (
        "reference=true",
        "pairing=random",
        "divergence=kl",
        "keep=1",
        "keep=5",
        *(f"weight={w}" for w in WEIGHTS),
    )
    defences = ("ast", *(f"ast?{change}" for change in changes))
    for origin in ("outside", "inside"):
        common = {**ALL_SMALLER, "thief": TEMPERATURES}
        yield f"queries from {origin}", {**common, "defence": defences, "queries_from": origin}


PARTS = {"key": key, "everyone": everyone, "level": level, "matrix": matrix, "around": around, "ast": ast}


def main() -> None:
    """Run the parts that were asked for."""
    data = needed_cifar10("theft")
    common = {"victim": MODEL.text, "thief_model": "zoo:cnn", "queries": "50/class", "epochs": RECIPE.epochs}
    for part in wanted_parts(list(PARTS)):
        for name, changes in PARTS[part]():
            if ROWS and name not in ROWS.split(";"):
                continue
            given = {**common, "data": data, "limit": IMAGES, "seeds": SEEDS, **changes}
            result = stillproof.run("steal", stillproof.RunOptions(store=store_place()), **given)
            found = result.model_dump(mode="json", exclude={"curves", "images"})
            found["settings"]["data"] = "cifar10"
            print(f"  {part}, {name}: {result.summary}", flush=True)
            record("theft", **{f"{part}: {name}": found})


if __name__ == "__main__":
    main()
