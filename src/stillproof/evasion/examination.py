"""What a classifier's answers and gradients look like, image by image: the numbers that the signs are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillproof.attacks.frozen import Classifier, Frozen, asked, frozen
from stillproof.attacks.gradient import APGD, PGD
from stillproof.attacks.losses import cross_entropy, margin
from stillproof.attacks.minimal import FMN
from stillproof.attacks.threats import L2, Linf
from stillproof.core.images import batches
from stillproof.core.noise import Noise, derive
from stillproof.core.runtime import Runtime

BATCH = 256

TEMPERATURES = (1, 10, 100)
"""T̂ of the sweep: cross-entropy on z/T̂. The order of the logits does not change."""

SWEEP_STEPS = 20
"""Of PGD at each temperature."""

TRACE_STEPS = 40
"""Of the one PGD that is looked at step by step."""

LAST_STEPS = 10
"""Of the trace: over these a converged attack's loss has settled."""

STABILITY_DRAWS = 20
"""Random images within half the ball whose loss is compared with the image's own (METHODS: 100; 20 give its mean)."""


@dataclass(frozen=True, slots=True)
class First:
    """A first look. Tensors have a row an image.

    logits: as deployed, (n, K), for a randomised classifier the mean of several passes; ce, margin: the largest entry
    of that loss's gradient, (n,), exactly zero where there is none; repeats: the largest difference between two passes
    over the logits' spread, (n,).
    """

    logits: Tensor
    ce: Tensor
    margin: Tensor
    repeats: Tensor


def first_look(
    classifier: Classifier, images: Tensor, labels: Tensor, runtime: Runtime, *, samples: int, classes: int
) -> First:
    """Ask about every image, forwards (and backwards, if it is a module), in fp32, on the original."""
    parts: list[tuple[Tensor, ...]] = []
    for rows in batches(len(images), BATCH):
        some, known = images[rows].to(runtime.device), labels[rows].to(runtime.device)
        if isinstance(classifier, nn.Module):
            with frozen(classifier, some, runtime) as prepared:
                found = _looked(prepared.averaged(samples), some, known, with_gradient=True)
        else:
            found = _looked(asked(classifier, classes, runtime), some, known, with_gradient=False)
        parts.append(tuple(part.cpu() for part in found))
    return First(*(torch.cat(several) for several in zip(*parts, strict=True)))


def _looked(prepared: Frozen, images: Tensor, labels: Tensor, *, with_gradient: bool) -> tuple[Tensor, ...]:
    logits = prepared.judge(images)
    if not with_gradient:
        nothing = torch.zeros(len(images), device=images.device)
        return logits, nothing, nothing, nothing
    spread = (logits.amax(1) - logits.amin(1)).clamp_min(torch.finfo(torch.float32).tiny)
    repeats = (prepared.judge(images) - logits).abs().amax(1) / spread
    strict = prepared.strict()
    steepness = [
        strict.slope(images, loss).gradient.abs().amax((1, 2, 3))
        for loss in (lambda z: cross_entropy(z, labels), lambda z: margin(z, labels))
    ]
    return logits, steepness[0], steepness[1], repeats


class Tempered(nn.Module):
    """A classifier's logits over T: its decisions, other gradients of the cross-entropy."""

    def __init__(self, classifier: nn.Module, temperature: float) -> None:
        super().__init__()
        self.classifier, self.temperature = classifier, temperature

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits, (N, K)."""
        logits: Tensor = self.classifier(images)
        return logits / self.temperature


def examine(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Linf | L2,
    runtime: Runtime,
    *,
    samples: int,
    seed: int,
    steps: int,
    through: nn.Module | None = None,
) -> Mapping[str, Tensor]:
    """Look closely at some images that are classified rightly. Rows of every tensor are theirs.

    steps: of the APGD whose convergence is looked at; through: what the search for the nearest climbs, where the
    classifier has no gradient. Returns, each (m,):
    sweep.T, sweep.standardised: fell to PGD at that temperature; trace.ever, trace.last: an iterate, the last iterate
    of PGD was adversarial; trace.range: of the loss over the last steps, as a share of its whole rise; apgd,
    apgd.double: fell to cross-entropy in these steps, and in twice as many; wider: fell in twice the ball; unbounded.*:
    fell to that loss where all images are allowed; nearest: how far the nearest adversarial image is, infinite where
    none was found; stability: mean relative change of the loss under random changes.
    """
    given: dict[str, Any] = {"seed": seed, "runtime": runtime}
    found: dict[str, Tensor] = {}
    pgd = PGD(threat=threat, steps=SWEEP_STEPS, samples=samples)
    for temperature in TEMPERATURES:
        through = Tempered(classifier, temperature)
        found[f"sweep.{temperature}"] = pgd(classifier, images, labels, through=through, **given).success
    own = PGD(threat=threat, steps=SWEEP_STEPS, samples=samples, loss="standardised")
    found["sweep.standardised"] = own(classifier, images, labels, **given).success
    for name, factor in (("apgd", 1), ("apgd.double", 2)):
        apgd = APGD(threat=threat, steps=factor * steps, samples=samples)
        found[name] = apgd(classifier, images, labels, **given).success
    wider = type(threat)(2 * threat.epsilon)
    found["wider"] = APGD(threat=wider, steps=steps, samples=samples)(classifier, images, labels, **given).success
    everything = type(threat)(1.0 if isinstance(threat, Linf) else float(images[0].numel()) ** 0.5)
    on_output = APGD(threat=everything, steps=steps, samples=samples)
    found["unbounded.cross-entropy"] = on_output(classifier, images, labels, **given).success
    far = APGD(threat=everything, steps=steps, samples=samples, loss="margin")
    anywhere = far(classifier, images, labels, through=through, **given)
    found["unbounded.margin"] = anywhere.success
    fmn = FMN(norm="linf" if isinstance(threat, Linf) else "l2", steps=100, samples=samples)
    nearest = fmn(classifier, images, labels, through=through, **given).distance
    found["nearest"] = torch.minimum(nearest, anywhere.distance.masked_fill(~anywhere.success, torch.inf))
    every = torch.arange(len(images))
    parts = [
        _closely(classifier, images[rows], labels[rows], every[rows], threat, runtime, seed)
        for rows in batches(len(images), BATCH)
    ]
    for name in parts[0]:
        found[name] = torch.cat([part[name] for part in parts]).cpu()
    return found


def _closely(
    classifier: nn.Module, images: Tensor, labels: Tensor, ids: Tensor, threat: Linf | L2, runtime: Runtime, seed: int
) -> dict[str, Tensor]:
    """The trace of one PGD on the deployed output, and the stability of its loss."""
    images, labels, ids = (given.to(runtime.device) for given in (images, labels, ids))
    with frozen(classifier, images, runtime) as prepared:
        strict = prepared.strict()

        def loss(logits: Tensor) -> Tensor:
            return cross_entropy(logits, labels)

        def adversarial(logits: Tensor) -> Tensor:
            return (logits.argmax(1) != labels) & ~logits.isnan().any(1)

        found = _trace(prepared, strict, images, ids, threat, loss, adversarial, seed)
        found["stability"] = _stability(strict, images, ids, threat, loss, seed)
    return found


def _trace(
    fast: Frozen,
    strict: Frozen,
    images: Tensor,
    ids: Tensor,
    threat: Linf | L2,
    loss: Callable[[Tensor], Tensor],
    adversarial: Callable[[Tensor], Tensor],
    seed: int,
) -> dict[str, Tensor]:
    current = threat.random_start(images, Noise(derive(seed, "trace"), ids, 0))
    ever = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    values: list[Tensor] = []
    for _ in range(TRACE_STEPS):
        slope = fast.slope(current, loss)
        values.append(slope.value)
        ever |= adversarial(slope.logits)
        current = threat.project(current + 0.125 * threat.epsilon * threat.steepest(slope.gradient), images)
    last = adversarial(strict.judge(current))
    settled = torch.stack(values[-LAST_STEPS:])
    whole = torch.stack(values)
    rise = (whole.amax(0) - whole.amin(0)).clamp_min(torch.finfo(torch.float32).tiny)
    return {
        "trace.ever": ever | last,
        "trace.last": last,
        "trace.range": (settled.amax(0) - settled.amin(0)) / rise,
    }


def _stability(
    strict: Frozen, images: Tensor, ids: Tensor, threat: Linf | L2, loss: Callable[[Tensor], Tensor], seed: int
) -> Tensor:
    """Mean over random images within half the ball of |loss − the image's own| / (the image's own)."""
    half = type(threat)(threat.epsilon / 2)
    own = loss(strict.judge(images)).clamp_min(torch.finfo(torch.float32).eps)
    total = torch.zeros_like(own)
    for draw in range(STABILITY_DRAWS):
        near = half.random_start(images, Noise(derive(seed, "stability"), ids, draw))
        total += (loss(strict.judge(near)) - own).abs() / own
    return total / STABILITY_DRAWS
