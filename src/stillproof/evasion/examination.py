"""What a classifier's answers and gradients look like, image by image: the numbers that the signs are made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stillproof.attacks.attack import GradientAttack
from stillproof.attacks.frozen import Classifier, Frozen, asked, frozen
from stillproof.attacks.gradient import APGD, PGD
from stillproof.attacks.losses import cross_entropy, margin
from stillproof.attacks.minimal import FMN
from stillproof.attacks.threats import L2, Linf
from stillproof.core.images import batches
from stillproof.core.measurement import Cost
from stillproof.core.noise import Noise, derive
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError
from stillproof.evasion.allowance import Allowance

BATCH = 256

REPEATED = 16
"""Images that a black box is asked about twice, to see whether it is randomised."""

ALONE, AGAIN, COMPANY, SAME = 16, 5, 0.01, 1e-4
"""Images that are asked about again so many times, and two by two in another order; the difference that this may make,
of the logits' spread (numbers that a batch shares, as dynamic quantisation's, make some); and what passes of the same
may."""

TEMPERATURES = (1, 10, 100)
"""T̂ of the sweep: cross-entropy on z/T̂. The order of the logits does not change."""

SWEEP_STEPS = 20
"""Of PGD at each temperature."""

TRACE_STEPS = 40
"""Of the one PGD that is looked at step by step."""

LAST_STEPS = 10
"""Of the trace: over these a converged attack's loss has settled."""

SLOPES = (1 / 64, 1 / 4)
"""Shares of the ball by which a step along the gradient is taken, to see whether it is the slope: one within what a
smooth classifier is linear in, and one that crosses the steps of a rounded one."""

STABILITY_DRAWS = 20
"""Random images within half the ball whose loss is compared with the image's own (20 give its mean)."""


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
    module = classifier if isinstance(classifier, nn.Module) else None
    for rows in batches(len(images), BATCH):
        some, known = images[rows].to(runtime.device), labels[rows].to(runtime.device)
        if module is not None:
            with frozen(module, some, runtime) as prepared:
                found = _looked(prepared.averaged(samples), some, known)
        else:
            found = _heard(asked(classifier, classes, runtime), some, again=REPEATED if rows.start == 0 else 0)
        parts.append(tuple(part.cpu() for part in found))
    logits, ce, steepness, repeats = (list(column) for column in zip(*parts, strict=True))
    if module is not None and samples == 1 and not bool((repeats[0] > SAME).any()):
        wavers = _asked_alone(module, images[:ALONE].to(runtime.device), runtime).cpu()
        repeats[0][: len(wavers)] = wavers
    return First(_of_one_width(logits, classes), torch.cat(ce), torch.cat(steepness), torch.cat(repeats))


def _asked_alone(module: nn.Module, images: Tensor, runtime: Runtime) -> Tensor:
    """How much the answers waver over several passes, (n,): two may be alike by luck.

    Raises InputError where they do not, and an image is answered otherwise in other company: what is found would hold
    of batches.
    """
    with frozen(module, images, runtime) as prepared:
        together = prepared.judge(images)
        wavers = torch.stack([_difference(prepared.judge(images), together) for _ in range(AGAIN)]).amax(0)
        apart = torch.cat([prepared.judge(part) for part in torch.split(images.flip(0), 2)]).flip(0)
    if not bool((wavers > SAME).any()) and float(_difference(apart, together).median()) > COMPANY:
        raise InputError(
            "its answer about an image depends on what else is in the batch.",
            "Is a batch norm in training mode, or noise drawn from a fixed seed in forward? Mend that first.",
        )
    return wavers


def _of_one_width(parts: Sequence[Tensor], classes: int) -> Tensor:
    """Logits of all, (n, K). Raises InputError where they cannot be of so many classes, or are not finite."""
    width = max(part.shape[1] for part in parts)
    logits = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
    if width < classes:
        raise InputError(
            f"it answers with {width} classes, and the images have {classes}.", "Audit it on its own data."
        )
    if not bool(logits.isfinite().all()):
        raise InputError("it answers with NaN or infinite values.", "Check the classifier.")
    return logits


def _heard(prepared: Frozen, images: Tensor, *, again: int) -> tuple[Tensor, ...]:
    """The same of a black box: no gradients, and only the first few images are asked about twice."""
    logits, nothing = prepared.judge(images), torch.zeros(len(images), device=images.device)
    repeats = nothing.clone()
    if again:
        few = min(again, len(images))
        repeats[:few] = _difference(prepared.judge(images[:few]), logits[:few])
    return logits, nothing, nothing, repeats


def _difference(again: Tensor, logits: Tensor) -> Tensor:
    """Of two answers, as a share of the logits' spread."""
    spread = (logits.amax(1) - logits.amin(1)).clamp_min(torch.finfo(torch.float32).tiny)
    return (again - logits).abs().amax(1) / spread


def _looked(prepared: Frozen, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    logits = prepared.judge(images)
    repeats = _difference(prepared.judge(images), logits)
    strict = prepared.strict()
    steepness = [
        strict.slope(images, loss).gradient.abs().amax((1, 2, 3))
        for loss in (lambda z: cross_entropy(z, labels), lambda z: margin(z, labels))
    ]
    return logits, steepness[0], steepness[1], repeats


@dataclass(frozen=True, slots=True)
class Examined:
    """What a close look found, by name (see `examine`), and its passes. was_cut: the budget ended it."""

    found: Mapping[str, Tensor]
    cost: Cost
    was_cut: bool = False

    @property
    def images(self) -> int:
        """How many were looked at."""
        return len(next(iter(self.found.values()), ()))


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
    allowance: Allowance | None = None,
    *,
    samples: int,
    seed: int,
    steps: int,
    through: nn.Module | None = None,
) -> Examined:
    """Look closely at some images that are classified rightly. Rows of every tensor are theirs.

    allowance: for as many of them as it is enough for; steps: of the APGD whose convergence is looked at; through: what
    the search for the nearest climbs, where the classifier has no gradient. Returns, each (m,):
    sweep.T, sweep.standardised: fell to PGD at that temperature; trace.ever, trace.last: an iterate, the last iterate
    of PGD was adversarial; trace.range: of the loss over the last steps, as a share of its whole rise; apgd,
    apgd.double: fell to cross-entropy in these steps, and in twice as many; wider: fell in twice the ball; unbounded.*:
    fell to that loss where all images are allowed; nearest: how far the nearest adversarial image is, infinite where
    none was found; stability: mean relative change of the loss under random changes; slope: see `_kept_promise`.
    """
    allowance = Allowance() if allowance is None else allowance
    pixels = float(images[0].numel())
    attacks = _attacks(classifier, threat, pixels, steps=steps, samples=samples, through=through)
    parts: list[dict[str, Tensor]] = []
    cost, done, began = Cost(), 0, time.monotonic()
    while done < len(images) and not allowance.is_spent:
        spent = cost.forwards + cost.backwards
        size = allowance.room(spent, time.monotonic() - began, done) if allowance.is_limited else len(images)
        ids = torch.arange(done, min(done + size, len(images)))
        found, passes = _examined(classifier, images[ids], labels[ids], ids, threat, runtime, attacks, seed)
        parts.append(found)
        cost += passes
        allowance.passes += passes.forwards + passes.backwards
        done += len(ids)
    whole = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    return Examined(whole, cost, done < len(images))


Attacks = Mapping[str, tuple[GradientAttack, nn.Module | None]]
"""By name: an attack, and what it climbs in place of the classifier."""


def _attacks(
    classifier: nn.Module, threat: Linf | L2, pixels: float, *, steps: int, samples: int, through: nn.Module | None
) -> Attacks:
    wider = type(threat)(2 * threat.epsilon)
    everything = type(threat)(1.0 if isinstance(threat, Linf) else pixels**0.5)
    pgd = PGD(threat=threat, steps=SWEEP_STEPS, samples=samples)
    apgd = APGD(threat=threat, steps=steps, samples=samples)
    fmn = FMN(norm="linf" if isinstance(threat, Linf) else "l2", steps=100, samples=samples)
    return {
        **{f"sweep.{temperature}": (pgd, Tempered(classifier, temperature)) for temperature in TEMPERATURES},
        "sweep.standardised": (replace(pgd, loss="standardised"), None),
        "apgd": (apgd, None),
        "apgd.double": (replace(apgd, steps=2 * steps), None),
        "wider": (replace(apgd, threat=wider), None),
        "unbounded.cross-entropy": (replace(apgd, threat=everything), None),
        "unbounded.margin": (replace(apgd, threat=everything, loss="margin"), through),
        "nearest": (fmn, through),
    }


def _examined(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    ids: Tensor,
    threat: Linf | L2,
    runtime: Runtime,
    attacks: Attacks,
    seed: int,
) -> tuple[dict[str, Tensor], Cost]:
    """All of it for some images. ids: what identifies each for its noise."""
    results = {
        name: attack(classifier, images, labels, seed=seed, ids=ids, runtime=runtime, through=climbed)
        for name, (attack, climbed) in attacks.items()
    }
    found = {name: result.success for name, result in results.items()}
    far = results["unbounded.margin"]
    found["nearest"] = torch.minimum(results["nearest"].distance, far.distance.masked_fill(~far.success, torch.inf))
    for name, result in results.items():  # what fell within the ball is no farther away than that
        if name.startswith(("sweep.", "apgd")):
            away = threat.distance(result.images, images).masked_fill(~result.success, torch.inf)
            found["nearest"] = torch.minimum(found["nearest"], away)
    parts = [
        _closely(classifier, images[rows], labels[rows], ids[rows], threat, runtime, seed)
        for rows in batches(len(images), BATCH)
    ]
    for name in parts[0]:
        found[name] = torch.cat([part[name] for part in parts]).cpu()
    cost = sum((result.cost for result in results.values()), Cost())
    asked = TRACE_STEPS + STABILITY_DRAWS + 2 + 1 + 2 * len(SLOPES)
    traced = Cost(forwards=asked * len(images), backwards=(TRACE_STEPS + 1) * len(images))
    return found, cost + traced


def _closely(
    classifier: nn.Module, images: Tensor, labels: Tensor, ids: Tensor, threat: Linf | L2, runtime: Runtime, seed: int
) -> dict[str, Tensor]:
    """The trace of one PGD on the deployed output, and the stability of its loss."""
    images, labels, ids = (given.to(runtime.device) for given in (images, labels, ids))
    with frozen(classifier, images, runtime) as prepared:
        strict = prepared.strict()

        def loss(logits: Tensor) -> Tensor:
            return cross_entropy(logits, labels)

        def adversarial(logits: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
            return (logits.argmax(1) != labels[rows]) & ~logits.isnan().any(1)

        found = _trace(prepared, strict, images, ids, threat, loss, adversarial, seed)
        found["stability"] = _stability(strict, images, ids, threat, loss, seed)
        found["slope"] = _kept_promise(strict, images, labels, threat)
    return found


def _trace(
    fast: Frozen,
    strict: Frozen,
    images: Tensor,
    ids: Tensor,
    threat: Linf | L2,
    loss: Callable[[Tensor], Tensor],
    adversarial: Callable[..., Tensor],
    seed: int,
) -> dict[str, Tensor]:
    current = threat.random_start(images, Noise(derive(seed, "trace"), ids, 0))
    ever = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    values: list[Tensor] = []
    for _ in range(TRACE_STEPS):
        slope = fast.slope(current, loss)
        values.append(slope.value)
        new = (adversarial(slope.logits) & ~ever).nonzero()[:, 0]
        if len(new):  # half precision is not believed
            ever[new] = adversarial(strict.judge(current[new]), new)
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
    """Mean over random images within half the ball of |loss − the image's own| / (the image's own, or a twentieth of
    that of a guess if it is less: a loss near 0 always changes by a multiple of itself)."""
    half = type(threat)(threat.epsilon / 2)
    logits = strict.judge(images)
    own = loss(logits)
    size = own.clamp_min(math.log(logits.shape[1]) / 20)
    total = torch.zeros_like(own)
    for draw in range(STABILITY_DRAWS):
        near = half.random_start(images, Noise(derive(seed, "stability"), ids, draw))
        total += (loss(strict.judge(near)) - own).abs() / size
    return total / STABILITY_DRAWS


def _kept_promise(strict: Frozen, images: Tensor, labels: Tensor, threat: Linf | L2) -> Tensor:
    """How much the margin changes from one side of an image to the other along its gradient, of what the gradient says,
    (n,): near 1 where the backward pass gives the slope; the largest over SLOPES. NaN where there is no gradient."""

    def loss(logits: Tensor) -> Tensor:
        return margin(logits, labels)

    gradient = strict.slope(images, loss).gradient
    found = torch.full((len(images),), torch.nan, dtype=torch.float64, device=images.device)
    for share in SLOPES:
        step = share * threat.epsilon * threat.steepest(gradient)
        above, below = (images + step).clamp(0, 1), (images - step).clamp(0, 1)
        promised = (gradient * (above - below)).flatten(1).double().sum(1)
        changed = loss(strict.judge(above)).double() - loss(strict.judge(below)).double()
        found = found.fmax(torch.where(promised > 0, changed / promised, torch.nan))
    return found.float()
