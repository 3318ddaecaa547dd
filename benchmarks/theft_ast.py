"""AST against the thieves of part A on CIFAR-10: queries outside and inside the victim's training images.

Victim zoo:resnet18?width=16, thief zoo:cnn, 50 queries a class, three seeds. Resumable: stages that are in the
store (STILLPROOF_STORE, default runs/store) are not run again. About 90 minutes on two cores from nothing.
Figures go to benchmarks/results/theft_ast.json, the reports to runs/.
"""

from __future__ import annotations

import stillproof
from shared.plans import store_place
from shared.record import needed_cifar10, record

SETTINGS = {
    "victim": "zoo:resnet18?width=16",
    "thief_model": "zoo:cnn",
    "queries": "50/class",
    "defence": ("ast",),
    "seeds": 3,
}
ORIGINS = {
    "outside": ("kd", "kd-unlabelled", "label-only", "kd?temperature=4&alpha=0.9"),
    # the label-free KD thief is left out here: it tells nothing about the origin that the others do not
    "inside": ("kd", "label-only", "kd?temperature=4&alpha=0.9"),
}


def main() -> None:
    """Run both and write what was found."""
    data = needed_cifar10("theft_ast")
    options = stillproof.RunOptions(store=store_place())
    for origin, thieves in ORIGINS.items():
        result = stillproof.run("steal", options, data=data, thief=thieves, queries_from=origin, **SETTINGS)
        found = result.model_dump(mode="json", exclude={"curves", "images"})
        found["settings"]["data"] = "cifar10"
        record("theft_ast", **{origin: found})


if __name__ == "__main__":
    main()
