"""The ladder of an audit beside the original AutoAttack: worst-case robust accuracy, passes and time.

`python benchmarks/audit.py [CLASSIFIER ...]`, of: plain, "distilled, T = 50", PGD-trained, RSLAD; all by default. They
are those of benchmarks/truths.py, seed 0 (STILLPROOF_SEED), and stages of the shared store. STILLPROOF_AUTOATTACK names
a checkout of the original AutoAttack; without it its column is left out. Neither has a twin to transfer from. With one
thread times are seconds of CPU, but for those of a single step.

STILLPROOF_AUDIT_IMAGES: test images, 1000. STILLPROOF_SEEDS: of AutoAttack, whose union counts, 2. STILLPROOF_SHARE: of
8/255, 1.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from shared.clock import clock_of
from shared.parts import wanted_parts
from shared.plans import executed
from shared.record import record
from stillproof.attacks.threats import Linf
from stillproof.core.carving import carve, data_stage
from stillproof.core.images import as_float
from stillproof.core.plan import Context
from stillproof.core.runtime import Runtime
from stillproof.core.stages import classifier_of
from stillproof.evasion.auditing import Thoroughness, audit
from truths import IMAGES, setting, trained

SHARE = float(os.environ.get("STILLPROOF_SHARE", "1"))
EPSILON = SHARE * 8 / 255
SEEDS = int(os.environ.get("STILLPROOF_SEEDS", "2"))
CLASSIFIERS = ("plain", "distilled, T = 50", "PGD-trained", "RSLAD")
TRAINING = int(os.environ.get("STILLPROOF_SEED", "0"))


class Counting(nn.Module):
    """Counts images that go forward, and those whose gradient comes back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        self.forwards += len(images)
        logits: Tensor = self.model(images)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: setattr(self, "backwards", self.backwards + len(gradient)))
        return logits


def original(
    model: nn.Module, images: Tensor, labels: Tensor, seed: int, runtime: Runtime
) -> tuple[Tensor, int, float]:
    """AutoAttack-standard of its authors: who stands, passes, seconds."""
    sys.path.insert(0, os.environ["STILLPROOF_AUTOATTACK"])
    from autoattack import AutoAttack

    clock = clock_of(runtime)
    counting = Counting(model).eval()
    attack = AutoAttack(counting, norm="Linf", eps=EPSILON, version="standard", device="cpu", verbose=False, seed=seed)
    began = clock()
    found = attack.run_standard_evaluation(images.contiguous(), labels, bs=500)  # it views gradients
    seconds = clock() - began
    with torch.no_grad():
        standing = model(found).argmax(1) == labels
    return standing, counting.forwards + counting.backwards, seconds


def compared(name: str, model: nn.Module, images: Tensor, labels: Tensor, runtime: Runtime) -> None:
    """The ladder and AutoAttack on one classifier; and what the whole audit took."""
    clock = clock_of(runtime)
    begun: list[float] = []
    """When each step began."""
    began = clock()
    seen = audit(
        model,
        images,
        labels,
        Linf(EPSILON),
        classes=10,
        thoroughness=Thoroughness(images=len(images)),
        runtime=runtime,
        advance=lambda *_: begun.append(clock()),
    ).evidence
    whole = clock() - began
    stands, right = torch.from_numpy(seen.standing), torch.from_numpy(seen.right)
    row: dict[str, Any] = {
        "images": len(images),
        "threads": runtime.threads,
        "ladder": {
            "robust accuracy": float(stands.double().mean()),
            "passes": sum(step["forwards"] + step["backwards"] for step in seen.trail),
            "seconds": round(begun[-1] - begun[0] + seen.trail[len(begun) - 1]["seconds"], 1),  # the last rung's
            "steps": [(step["name"], step["asked"], step["fell"], round(step["seconds"], 1)) for step in seen.trail],
        },
        "whole audit, seconds": round(whole, 1),
        "AutoAttack": [],
    }
    print(f"  {name}: {row}", flush=True)
    together = stands.clone()
    for seed in range(SEEDS) if "STILLPROOF_AUTOATTACK" in os.environ else ():
        standing, passes, seconds = original(model, images, labels, seed, runtime)
        together = standing if seed == 0 else together & standing
        row["AutoAttack"].append(
            {
                "robust accuracy": float(standing.double().mean()),
                "union so far": float(together.double().mean()),
                "passes": passes,
                "seconds": round(seconds, 1),
                "fell to it alone": int((stands & ~standing).sum()),
                "fell to the ladder alone": int((~stands & standing & right).sum()),
            }
        )
        print(f"  {name}: {row['AutoAttack'][-1]}", flush=True)
    at = "" if SHARE == 1 else f", {SHARE:g} of the radius"
    record("audit", **{f"strength: {name}{at}": row})


def main() -> None:
    """Compare on the classifiers that were asked for."""
    of = setting("cifar10")
    wanted = wanted_parts(list(CLASSIFIERS))
    runtime = Runtime.choose()
    runtime.apply()
    source = data_stage(of.data, of.limit)
    stages = trained(of, source.stage, source.sizes.training, TRAINING)
    values = executed({"data": source.stage, **{name: stages[name] for name in wanted}}, runtime)
    test = carve(values["data"]).test.subset(torch.arange(IMAGES))
    images, labels = as_float(test.images), test.known_labels()
    for name in wanted:
        compared(name, classifier_of(values[name], Context(runtime)).eval(), images, labels, runtime)


if __name__ == "__main__":
    main()
