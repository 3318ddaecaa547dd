"""The audit against planted truths, on CIFAR-10, and beside the original AutoAttack.

`python benchmarks/audit.py [PART ...]`, parts: truths, distilled, strength; all by default. STILLPROOF_AUTOATTACK names
a checkout of the original AutoAttack (strength leaves its column out without it).

- truths: is what is masked called masked, and what is honest honest? Every audit is a stage: a killed run goes on.
- distilled: what FGSM and cross-entropy leave standing of distilled classifiers, and the worst case beside the
  undistilled twin's, at 2, 4 and 8/255.
- strength: worst-case robust accuracy, passes and time of the ladder, and of AutoAttack-standard.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Shared, shared
from shared.parts import wanted_parts
from shared.record import record
from stillproof.attacks.threats import Linf
from stillproof.core.runtime import Runtime
from stillproof.evasion.auditing import Audited, Thoroughness, audit
from stillproof.evasion.verdict import decide

IMAGES = int(os.environ.get("STILLPROOF_AUDIT_IMAGES", "500"))
EPSILON = 8 / 255
SEEDS = int(os.environ.get("STILLPROOF_SEEDS", "2"))
"""Of AutoAttack, whose union counts."""


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
    size = int(torch.randint(28, 33, ()))
    small = F.interpolate(images, (size, size), mode="nearest")
    left, top = (int(torch.randint(0, 33 - size, ())) for _ in range(2))
    return F.pad(small, (left, 32 - size - left, top, 32 - size - top))


def saturated(logits: Tensor) -> Tensor:
    """log of softmax of a hundred times as much, as the door makes logits of probabilities."""
    return (100 * logits).softmax(1).clamp_min(torch.finfo(torch.float32).tiny).log()


def planted(of: Shared) -> Mapping[str, tuple[nn.Module, str, str]]:
    """Classifier, what it returns, and the truth, by name."""
    plain, hardened, distilled = (of.classifiers[name] for name in ("undefended", "adversarially trained", "distilled"))
    return {
        "plain": (plain, "logits", "no"),
        "plain, bf16 weights": (_rounded(plain), "logits", "no"),
        "plain, logits + 1000": (Wrapped(plain, same, lambda z: z + 1000), "logits", "no"),
        "PGD-trained": (hardened, "logits", "no"),
        "distilled, T = 50": (distilled, "logits", "yes"),
        "plain, logits × 100": (Wrapped(plain, same, lambda z: z * 100), "logits", "yes"),
        "plain, saturated probabilities": (Wrapped(plain, same, saturated), "probabilities", "yes"),
        "plain, 8 levels": (Wrapped(plain, levels, same), "logits", "yes"),
        "PGD-trained, logits × 100": (Wrapped(hardened, same, lambda z: z * 100), "logits", "yes"),
        "plain, random resize and pad": (Wrapped(plain, resized_and_padded, same), "logits", "randomised"),
    }


def _rounded(model: nn.Module) -> nn.Module:
    from copy import deepcopy

    found = deepcopy(model)
    for parameter in found.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return found


def audited(of: Shared, model: nn.Module, outputs: str, epsilon: float, runtime: Runtime, n: int = IMAGES) -> Audited:
    """An audit at the standard thoroughness, with the undefended classifier as the twin."""
    images, labels = of.some(n)
    return audit(
        model.eval(),
        images,
        labels,
        Linf(epsilon),
        outputs=outputs,
        classes=10,
        thoroughness=Thoroughness(images=n),
        twins=[of.classifiers["undefended"]],
        runtime=runtime,
    )


def truths(of: Shared, runtime: Runtime) -> None:
    """One audit each."""
    for name, (model, outputs, truth) in planted(of).items():
        began = time.perf_counter()
        verdict = decide(audited(of, model, outputs, EPSILON, runtime).evidence)
        row = {
            "truth": truth,
            "masked": verdict.masked,
            "why": verdict.why,
            "accuracy": verdict.clean.value,
            "claimed": verdict.claimed.value,
            "worst case": verdict.robust.value,
            "signs": [f"{sign.number} {sign.name}" for sign in verdict.signs if sign.is_present],
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(f"  {name}: {row}", flush=True)
        record("audit", settings={"images": IMAGES, "epsilon": "8/255", "seeds": [0]})
        record("audit", **{f"truth: {name}": row})


def distilled(of: Shared, runtime: Runtime) -> None:
    """The distilled classifier and its undistilled twin, at three radii."""
    found: dict[str, Any] = {}
    for name in ("undefended", "distilled"):
        for radius in (2, 4, 8):
            seen = audited(of, of.classifiers[name], "logits", radius / 255, runtime)
            verdict = decide(seen.evidence)
            trail = seen.evidence.trail
            found[f"{name}, {radius}/255"] = {
                "FGSM leaves": 1
                - sum(seen.evidence.outcomes[0] == 1) / len(seen.evidence.right)
                - (1 - (verdict.clean.value or 0)),
                "PGD leaves": verdict.claimed.value,
                "worst case": verdict.robust.model_dump(mode="json"),
                "masked": verdict.masked,
                "steps": [(step["name"], step["asked"], step["fell"]) for step in trail],
            }
            print(f"  {name}, {radius}/255: {found[f'{name}, {radius}/255']}", flush=True)
    record("audit", distilled=found)


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


def original(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, int, float]:
    """AutoAttack-standard of its authors: who stands, passes, seconds."""
    sys.path.insert(0, os.environ["STILLPROOF_AUTOATTACK"])
    from autoattack import AutoAttack

    counting = Counting(model).eval()
    attack = AutoAttack(counting, norm="Linf", eps=EPSILON, version="standard", device="cpu", verbose=False, seed=seed)
    began = time.perf_counter()
    found = attack.run_standard_evaluation(images, labels, bs=500)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        standing = model(found).argmax(1) == labels
    return standing, counting.forwards + counting.backwards, seconds


def strength(of: Shared, runtime: Runtime) -> None:
    """The ladder of an audit beside AutoAttack: what stands, passes, seconds; and what the whole audit took."""
    images, labels = of.some(IMAGES)
    for name in ("undefended", "distilled", "adversarially trained"):
        model = of.classifiers[name].eval()
        began = time.perf_counter()
        seen = audited(of, model, "logits", EPSILON, runtime).evidence
        whole = time.perf_counter() - began
        stands, right = torch.from_numpy(seen.standing), torch.from_numpy(seen.right)
        row: dict[str, Any] = {
            "images": len(images),
            "ladder": {
                "robust accuracy": float(stands.double().mean()),
                "passes": sum(step["forwards"] + step["backwards"] for step in seen.trail),
                "seconds": round(sum(step["seconds"] for step in seen.trail), 1),
                "steps": [
                    (step["name"], step["asked"], step["fell"], round(step["seconds"], 1)) for step in seen.trail
                ],
            },
            "whole audit, seconds": round(whole, 1),
            "AutoAttack": [],
        }
        print(f"  {name}: {row}", flush=True)
        together = stands.clone()
        for seed in range(SEEDS) if "STILLPROOF_AUTOATTACK" in os.environ else ():
            standing, passes, seconds = original(model, images, labels, seed)
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
            record("audit", **{f"strength: {name}": row})


PARTS = {"truths": truths, "distilled": distilled, "strength": strength}


def main() -> None:
    """Run the parts that were asked for."""
    wanted = wanted_parts(list(PARTS))
    runtime = Runtime.choose()
    runtime.apply()
    of = shared(runtime)
    for part in wanted:
        PARTS[part](of, runtime)


if __name__ == "__main__":
    main()
