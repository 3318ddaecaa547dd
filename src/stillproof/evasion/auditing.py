"""An audit of a classifier in memory: look, climb the ladder, look closely, test the attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillproof.attacks.frozen import Classifier
from stillproof.attacks.gradient import APGD
from stillproof.attacks.inner_logits import inner_logits
from stillproof.attacks.straight_through import StraightThrough
from stillproof.attacks.threats import L2, Linf
from stillproof.core.noise import derive
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError
from stillproof.evasion.binarisation import Binarised, binarisation_test
from stillproof.evasion.escalation import Budget, Climb, Effort, Ladder, begin, rungs
from stillproof.evasion.examination import First, examine, first_look
from stillproof.evasion.indicators import REPEAT_TOLERANCE, Evidence

EOT_SAMPLES = 10
"""Passes that are averaged for a randomised classifier."""


@dataclass(frozen=True, kw_only=True)
class Thoroughness:
    """How much an audit looks at.

    images: that are attacked; close: of those, how many are looked at closely; problems: of the binarisation test;
    points: in each of them; effort: of the ladder.
    """

    images: int = 1000
    close: int = 128
    problems: int = 32
    points: int = 500
    effort: Effort = field(default_factory=Effort)


@dataclass(frozen=True, slots=True)
class Audited:
    """What an audit saw, and the adversarial images it can show: float32, (C, H, W), by row."""

    evidence: Evidence
    shown: Mapping[int, Tensor]


def audit(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: Linf | L2,
    *,
    outputs: str = "logits",
    classes: int | None = None,
    thoroughness: Thoroughness | None = None,
    budget: Budget | None = None,
    twins: Sequence[nn.Module] = (),
    adaptive: object = None,
    runtime: Runtime | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    advance: Callable[[int, int, str], None] | None = None,
) -> Audited:
    """Audit a classifier on images, float32 in [0, 1], (n, C, H, W), with labels, int64, (n,).

    classifier: a module that returns logits, or (a black box) anything that answers images with logits, (n, K), or
    labels, (n,); outputs: what it returned before they were made of it (core.adapters); twins: undistilled surrogates;
    adaptive: the user's own attack, loss, or module to climb through. Raises InputError.
    """
    how, runtime = thoroughness or Thoroughness(), runtime or Runtime.choose()
    images, labels = images[: how.images], labels[: how.images]
    if not len(images):
        raise InputError("there is no image to audit.", "Give 1 or more.")
    known = classes or int(labels.max()) + 1
    module = classifier if isinstance(classifier, nn.Module) else None
    first = first_look(classifier, images, labels, runtime, samples=1, classes=known)
    samples = EOT_SAMPLES if bool((first.repeats > REPEAT_TOLERANCE).any()) else 1
    if samples > 1:
        first = first_look(classifier, images, labels, runtime, samples=samples, classes=known)
    right = first.logits.argmax(1) == labels
    dead = (first.ce == 0) & (first.margin == 0)
    ladder = begin(right, dead if module is not None else torch.zeros_like(right))
    steps = rungs(
        classifier,
        images[:4],
        threat,
        how.effort,
        samples=samples,
        differentiable=not bool(ladder.dead.any()),
        twins=twins,
        adaptive=adaptive,
    )
    climb = Climb(
        classifier, images, labels, threat, runtime, how.effort, seed, budget or Budget(), checkpoint, advance
    )
    climb.go(ladder, list(steps))
    rows = right.nonzero()[: how.close, 0]
    close: Mapping[str, Tensor] = {}
    tested = Binarised(torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool))
    if module is not None and len(rows) and not ladder.ended_by_budget:
        through = StraightThrough(inner_logits(module, images[:4])) if bool(ladder.dead[rows].any()) else None
        few, theirs = images[rows], labels[rows]
        common: dict[str, Any] = {"samples": samples, "seed": derive(seed, "closely"), "through": through}
        close = examine(module, few, theirs, threat, runtime, steps=max(1, how.effort.apgd // 2), **common)
        attack = APGD(threat=threat, steps=how.effort.apgd, loss="margin", samples=samples)
        posed = images[rows[: how.problems]]
        tested = binarisation_test(
            module, posed, attack, threat, runtime, points=how.points, seed=seed, through=through is not None
        )
    return Audited(
        _evidence(labels, first, ladder, rows, close, tested, outputs, is_black_box=module is None), ladder.shown
    )


def _evidence(
    labels: Tensor,
    first: First,
    ladder: Ladder,
    rows: Tensor,
    close: Mapping[str, Tensor],
    tested: Binarised,
    outputs: str,
    *,
    is_black_box: bool,
) -> Evidence:
    return Evidence(
        labels=labels.numpy(),
        logits=first.logits.numpy(),
        ce=first.ce.numpy(),
        margin=first.margin.numpy(),
        repeats=first.repeats.numpy(),
        trail=[asdict(step) for step in ladder.steps],
        outcomes=torch.stack(ladder.outcomes).numpy() if ladder.outcomes else np.zeros((0, len(labels)), np.int8),
        standing=ladder.standing.numpy(),
        distance=ladder.distance.numpy(),
        close_rows=rows.numpy(),
        close={name: value.numpy() for name, value in close.items()},
        solved=tested.attack.numpy(),
        lucky=tested.random.numpy(),
        outputs=outputs,
        is_black_box=is_black_box,
        ended_by_budget=ladder.ended_by_budget,
    )
