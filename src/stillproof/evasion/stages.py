"""The job of an audit: look, climb the ladder, look closely, test the attack. What it saw is the artefact."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from stillproof.attacks.gradient import APGD
from stillproof.attacks.straight_through import StraightThrough
from stillproof.attacks.threats import parse_threat
from stillproof.core.carving import carve
from stillproof.core.images import ImageSet, as_float
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive
from stillproof.core.plan import Context, job
from stillproof.core.plugins import code_identity, user_code
from stillproof.core.spec import Spec
from stillproof.core.stages import classifier_of
from stillproof.core.store import Artefact
from stillproof.errors import InputError
from stillproof.evasion.binarisation import Binarised, binarisation_test
from stillproof.evasion.escalation import Budget, Climb, Effort, Ladder, begin, rungs
from stillproof.evasion.examination import First, examine, first_look
from stillproof.evasion.indicators import Evidence

EOT_SAMPLES = 10
"""Passes that are averaged for a randomised classifier."""


@dataclass(frozen=True, kw_only=True)
class Thoroughness:
    """How much an audit looks at: images in all, and closely; problems of the binarisation test, and points in each."""

    images: int = 1000
    close: int = 128
    problems: int = 32
    points: int = 500
    effort: Effort = field(default_factory=Effort)


@dataclass(frozen=True, slots=True)
class Adaptive:
    """The user's own attack: `module:factory`, called with the classifier. None where there is none."""

    spec: str | None = None

    @property
    def code(self) -> str | None:
        """What runs code."""
        return self.spec

    def identity(self) -> str | None:
        """Changes whenever the file with the factory does."""
        return None if self.spec is None else f"{self.spec} {code_identity(Spec.parse(self.spec))}"

    def build(self, classifier: nn.Module) -> object:
        """An attack, a loss, or a module to climb through. Raises InputError."""
        if self.spec is None:
            return None
        spec = Spec.parse(self.spec)
        if not spec.runs_code:
            raise InputError(f"{self.spec!r} is no adaptive attack.", "Name a factory: package.module:factory.")
        try:
            return user_code(spec)(classifier)
        except Exception as error:  # the user's code may do anything
            raise InputError(f"{spec.name} fails: {type(error).__name__}: {error}", "Mend the factory.") from error


class Scaled(nn.Module):
    """A classifier whose logits are multiplied: the same decisions, and masked gradients if by enough."""

    def __init__(self, classifier: nn.Module, factor: float) -> None:
        super().__init__()
        self.classifier, self.factor = classifier, factor

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits, (N, K)."""
        logits: Tensor = self.classifier(images)
        return logits * self.factor


@job(version=1)
def audit_classifier(
    context: Context,
    classifier: Artefact,
    data: Artefact,
    twin: Artefact | None = None,
    *,
    threat: str,
    thoroughness: Thoroughness,
    budget: Budget,
    adaptive: Adaptive,
    scale: float,
    seed: int,
) -> Artefact:
    """All that `Evidence` holds, of the first test images. scale: factor on the logits, to plant a masked twin."""
    test = carve(data).test
    test = test.subset(torch.arange(min(thoroughness.images, len(test))))
    images, labels = as_float(test.images), test.known_labels()
    model = classifier_of(classifier, context)
    model = model if scale == 1 else Scaled(model, scale).eval()
    parsed, runtime = parse_threat(threat), context.runtime
    samples = 1 if classifier.values.get("deterministic", True) else EOT_SAMPLES
    first = first_look(model, images, labels, runtime, samples=samples, classes=len(test.classes))
    right = first.logits.argmax(1) == labels
    ladder = begin(right, (first.ce == 0) & (first.margin == 0))
    climb = Climb(
        model,
        images,
        labels,
        parsed,
        runtime,
        thoroughness.effort,
        seed,
        budget,
        context.checkpoint,
        context.advance,
    )
    twins = [] if twin is None else [classifier_of(twin, context)]
    steps = rungs(
        model,
        parsed,
        thoroughness.effort,
        samples=samples,
        differentiable=not bool(ladder.dead.any()),
        twins=twins,
        adaptive=adaptive.build(model),
    )
    climb.go(ladder, list(steps))
    close_rows = right.nonzero()[: thoroughness.close, 0]
    through = StraightThrough(model) if bool(ladder.dead[close_rows].any()) else None
    close = (
        examine(
            model,
            images[close_rows],
            labels[close_rows],
            parsed,
            runtime,
            samples=samples,
            seed=derive(seed, "closely"),
            steps=max(1, thoroughness.effort.apgd // 2),
            through=through,
        )
        if len(close_rows)
        else {}
    )
    attack = APGD(threat=parsed, steps=thoroughness.effort.apgd, loss="margin", samples=samples)
    tested = binarisation_test(
        model,
        images[close_rows[: thoroughness.problems]],
        attack,
        parsed,
        runtime,
        points=thoroughness.points,
        seed=seed,
    )
    return _artefact(classifier, test, first, ladder, close_rows, dict(close), tested)


def _artefact(
    classifier: Artefact,
    test: ImageSet,
    first: First,
    ladder: Ladder,
    close_rows: Tensor,
    close: dict[str, Tensor],
    tested: Binarised,
) -> Artefact:
    shown = list(ladder.shown)
    tensors = {
        "labels": test.known_labels(),
        "logits": first.logits,
        "ce": first.ce,
        "margin": first.margin,
        "repeats": first.repeats,
        "outcomes": torch.stack(ladder.outcomes),
        "standing": ladder.standing,
        "distance": ladder.distance,
        "close_rows": close_rows,
        "solved": tested.attack,
        "lucky": tested.random,
        "shown.clean": test.images[shown],
        "shown.adversarial": torch.stack(list(ladder.shown.values())) if shown else torch.zeros(0),
        **{f"close.{name}": value for name, value in close.items()},
    }
    values = {
        "trail": [asdict(step) for step in ladder.steps],
        "shown": shown,
        "classes": list(test.classes),
        "outputs": classifier.values.get("outputs", "logits"),
        "is_black_box": False,
        "ended_by_budget": ladder.ended_by_budget,
    }
    cost = Cost(
        forwards=sum(step.forwards for step in ladder.steps) + 3 * len(test),
        backwards=sum(step.backwards for step in ladder.steps) + 2 * len(test),
        queries=sum(step.queries for step in ladder.steps),
    )
    return Artefact(values, {name: value.contiguous() for name, value in tensors.items()}, cost)


def evidence_of(audited: Artefact) -> Evidence:
    """What an audit saw, as arrays."""
    arrays = {name: tensor.numpy() for name, tensor in audited.tensors.items()}
    close = {name.removeprefix("close."): value for name, value in arrays.items() if name.startswith("close.")}
    values = audited.values
    return Evidence(
        **{
            name: arrays[name]
            for name in (
                "labels",
                "logits",
                "ce",
                "margin",
                "repeats",
                "outcomes",
                "standing",
                "distance",
                "close_rows",
                "solved",
                "lucky",
            )
        },
        close=close,
        trail=values["trail"],
        outputs=values["outputs"],
        is_black_box=values["is_black_box"],
        ended_by_budget=values["ended_by_budget"],
    )
