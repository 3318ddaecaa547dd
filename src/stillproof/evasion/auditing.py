"""An audit of a classifier in memory: look, climb the ladder, look closely, test the attack."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stillproof.attacks.frozen import Classifier, frozen
from stillproof.attacks.gradient import APGD
from stillproof.attacks.straight_through import way_through
from stillproof.attacks.threats import L2, Linf
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError
from stillproof.evasion.allowance import Allowance, Budget
from stillproof.evasion.binarisation import Binarised, binarisation_test
from stillproof.evasion.climb import Climb, Metered
from stillproof.evasion.escalation import rungs
from stillproof.evasion.evidence import REPEAT_TOLERANCE, Evidence, within
from stillproof.evasion.examination import AGAIN, ALONE, REPEATED, Examined, First, examine, first_look
from stillproof.evasion.ladder import Effort, Ladder, begin, restore

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
    """What an audit saw, the adversarial images it can show (float32, (C, H, W), by row), and its cost."""

    evidence: Evidence
    shown: Mapping[int, Tensor]
    cost: Cost


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
    began = time.monotonic()
    how, runtime = thoroughness or Thoroughness(), runtime or Runtime.choose()
    images, labels = images[: how.images], labels[: how.images]
    if not len(images):
        raise InputError("there is no image to audit.", "Give 1 or more.")
    known = classes or int(labels.max()) + 1
    module = classifier if isinstance(classifier, nn.Module) else None
    with ExitStack() as prepared:
        if module is not None:  # in eval mode, on the device, without gradients of its parameters, until the end
            prepared.enter_context(frozen(module, images, runtime))
        if checkpoint is not None and checkpoint.exists():
            ladder, asked = restore(checkpoint)
            if isinstance(classifier, Metered):
                classifier.queries = asked
        else:
            first = _first(classifier, images, labels, runtime, known, seed)
            ladder = begin(first, labels, has_gradient=bool(module), watched=how.effort.watched)
        samples = EOT_SAMPLES if module is not None and _is_random(ladder.first) else 1
        flattest = ladder.first.margin.argsort(stable=True)[:4]  # they tell whether there is a step without a gradient
        through = None if module is None else way_through(module, images[flattest].to(runtime.device))
        labels_only = module is None and bool(((ladder.first.logits == 0) | (ladder.first.logits == 1)).all())
        steps = rungs(
            classifier,
            threat,
            how.effort,
            samples=samples,
            through=through,
            twins=twins,
            adaptive=adaptive,
            starts=_one_a_class(images, ladder.first.logits.argmax(1)),
            labels_only=labels_only,
        )
        first_cost = _first_cost(len(images), samples, has_gradient=module is not None)
        before = first_cost.forwards + first_cost.backwards + ladder.spent
        allowance = Allowance(budget or Budget(), before, sum(step.seconds for step in ladder.steps), began)
        climb = Climb(
            classifier,
            images,
            labels,
            threat,
            runtime=runtime,
            effort=how.effort,
            seed=seed,
            allowance=allowance,
            samples=samples,
            checkpoint=checkpoint,
            advance=advance,
        )
        climb.save(ladder)
        climb.go(ladder, list(steps))
        rows, close, tested = _closely(climb, ladder, how, through)
    said = "labels" if labels_only else outputs
    cost = first_cost + close.cost + tested.cost
    for step in ladder.steps:
        cost += Cost(forwards=step.forwards, backwards=step.backwards, queries=step.queries)
    evidence = _evidence(labels, ladder, rows, close.found, tested, said, is_black_box=module is None)
    return Audited(evidence, ladder.shown, cost)


def _closely(
    climb: Climb, ladder: Ladder, how: Thoroughness, through: nn.Module | None
) -> tuple[Tensor, Examined, Binarised]:
    """Rows of the images that are looked at closely, int64, (m,), what that shows, and the attack's own test.

    Of a black box, and where the budget is spent, nothing.
    """
    rows = ladder.right.nonzero()[: how.close, 0]
    module, seed, steps = climb.classifier, climb.seed, how.effort.apgd
    if not isinstance(module, nn.Module) or not len(rows) or ladder.ended_by_budget:
        return rows, Examined({}, Cost()), Binarised.nothing()
    common = (climb.threat, climb.runtime, climb.allowance)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "closely"))
        close = examine(
            module,
            climb.images[rows],
            climb.labels[rows],
            *common,
            steps=steps,
            samples=climb.samples,
            seed=derive(seed, "closely"),
            through=through if bool(ladder.dead[rows].any()) else None,
        )
        # as many searches as the ladder makes in the white box
        attack = APGD(threat=climb.threat, steps=steps, loss="margin", samples=climb.samples, restarts=4)
        posed = climb.images[rows[: how.problems]]
        tested = binarisation_test(module, posed, attack, *common, points=how.points, seed=seed)
    ladder.ended_by_budget = close.was_cut or tested.was_cut
    rows = rows[: close.images]
    if climb.samples == 1 and close.images:  # of what is randomised one look is no proof
        _count(ladder, rows, close.found, climb.threat)
    return rows, close, tested


def _count(ladder: Ladder, rows: Tensor, found: Mapping[str, Tensor], threat: Linf | L2) -> None:
    """What looking closely found within the ball, and the ladder did not: it was tried, so it counts."""
    served = found["sweep.1"] | found["apgd"] | found["apgd.double"]
    other = within(found["nearest"], threat.epsilon)
    for name, fell in found.items():
        other = other | fell if name.startswith("sweep.") else other
    for which, kind, fell in (("as it is served", "deployed again", served), ("otherwise", "close look", other)):
        everywhere = torch.zeros_like(ladder.right)
        everywhere[rows] = fell.cpu()
        ladder.note(f"close look, {which}", kind, "what was found besides while looking closely", everywhere)  # type: ignore[arg-type]
    ladder.distance[rows] = torch.minimum(ladder.distance[rows], found["nearest"].cpu())


def _first_cost(images: int, samples: int, *, has_gradient: bool) -> Cost:
    """Of the first look: two judgements and two gradients, and again averaged where two passes differ."""
    if not has_gradient:
        return Cost(queries=images + min(images, REPEATED))
    again = 2 * samples + 2 if samples > 1 else 0
    alone = 0 if again else (AGAIN + 2) * min(images, ALONE)
    return Cost(forwards=(4 + again) * images + alone, backwards=(2 + (2 if again else 0)) * images)


def _first(classifier: Classifier, images: Tensor, labels: Tensor, runtime: Runtime, classes: int, seed: int) -> First:
    """The first look; again, averaged, if the classifier turns out to be randomised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "first look"))
        found = first_look(classifier, images, labels, runtime, samples=1, classes=classes)
        if isinstance(classifier, nn.Module) and _is_random(found):
            again = first_look(classifier, images, labels, runtime, samples=EOT_SAMPLES, classes=classes)
            found = replace(again, repeats=found.repeats)
    return found


def _is_random(first: First) -> bool:
    return bool((first.repeats > REPEAT_TOLERANCE).any())


def _one_a_class(images: Tensor, guesses: Tensor) -> Tensor:
    """One image of every class that the classifier names: for HopSkipJump, where noise is always of one class."""
    firsts = [int((guesses == name).nonzero()[0, 0]) for name in set(guesses.tolist())]
    return images[firsts]


def _evidence(
    labels: Tensor,
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
        logits=ladder.first.logits.numpy(),
        ce=ladder.first.ce.numpy(),
        margin=ladder.first.margin.numpy(),
        repeats=ladder.first.repeats.numpy(),
        trail=[asdict(step) for step in ladder.steps],
        outcomes=torch.stack(ladder.outcomes).numpy() if ladder.outcomes else np.zeros((0, len(labels)), np.int8),
        standing=ladder.standing.numpy(),
        distance=ladder.distance.numpy(),
        watched=ladder.watched.numpy(),
        close_rows=rows.numpy(),
        close={name: value.numpy() for name, value in close.items()},
        solved=tested.attack.numpy(),
        lucky=tested.random.numpy(),
        outputs=outputs,
        is_black_box=is_black_box,
        ended_by_budget=ladder.ended_by_budget,
    )
