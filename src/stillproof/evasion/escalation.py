"""The ladder: which attack comes next, and why. An image that falls leaves it.

It starts with what most evaluations run, and goes on to what does not need the deployed output's gradient. What ran, on
how many images, what fell, what it cost, and why the next was tried or left out, is the audit trail.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillproof.attacks.attack import Attack, GradientAttack
from stillproof.attacks.frozen import Classifier
from stillproof.attacks.gradient import APGD, FGSM, PGD
from stillproof.attacks.hop_skip_jump import HopSkipJump
from stillproof.attacks.inner_logits import inner_logits
from stillproof.attacks.losses import Loss
from stillproof.attacks.minimal import FMN
from stillproof.attacks.random_draws import RandomDraws
from stillproof.attacks.record import AttackResult
from stillproof.attacks.square import Square
from stillproof.attacks.straight_through import StraightThrough
from stillproof.attacks.surrogate import Transfer
from stillproof.attacks.threats import L2, Linf
from stillproof.core import faults
from stillproof.core.files import write_atomically
from stillproof.core.images import batches
from stillproof.core.runtime import Runtime
from stillproof.errors import BudgetExceeded, InputError, StoreError, reason

Kind = Literal["one step", "deployed", "white box", "gradient-free", "transfer", "adaptive"]
"""What a rung sees. deployed: the gradient of the output as it is served, which is what can be masked."""

CHUNK = 256
"""Images between two looks at the budget."""

SMALL_CHUNK = 16
"""The same for a black box: what it was asked about a chunk that its budget ended is lost."""

TOLERANCE = 1e-6
"""Of a distance that a nearest-image attack found, over epsilon: what rounding may add."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard the ladder tries: steps and queries an image."""

    pgd: int = 20
    apgd: int = 100
    targets: int = 9
    targeted: int = 50
    nearest: int = 100
    draws: int = 100
    probing: int = 200
    square: int = 5000
    hop: int = 3000
    patient: int = 100
    """So many images at most are given to the attacks that take thousands of queries each."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Where the ladder must stop, if not at its end. passes: forward and backward, of one image each."""

    passes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Rung:
    """An attack with its reason."""

    name: str
    kind: Kind
    attack: Attack
    on: Literal["right", "deployed survivors", "standing"]
    why: str
    through: nn.Module | None = None
    skip: Callable[[Ladder], str] = lambda _: ""
    """Why it need not run, or nothing."""
    few: bool = False
    """Whether it is so slow that only `Effort.patient` images are given to it."""


@dataclass(slots=True)
class Step:
    """A line of the audit trail."""

    name: str
    kind: Kind
    why: str
    asked: int = 0
    fell: int = 0
    standing: int = 0
    forwards: int = 0
    backwards: int = 0
    queries: int = 0
    seconds: float = 0.0
    ran: bool = False
    left_out: int = 0
    """Images that stood and were not given to it, as it is slow."""


@dataclass
class Ladder:
    """What is known while it is climbed. Tensors have a row an image."""

    right: Tensor
    """Whether it was right to begin with: bool, (n,). Of the others nothing is asked."""
    standing: Tensor
    """Right to begin with, and not fallen to anything yet."""
    distance: Tensor
    """Of the nearest adversarial image found, infinite where there is none: float32, (n,)."""
    dead: Tensor
    """Whether the gradients of cross-entropy and margin are both exactly zero."""
    steps: list[Step] = field(default_factory=list)
    outcomes: list[Tensor] = field(default_factory=list)
    """By step: int8, (n,): 1 it fell, 0 it did not, −1 it was not asked."""
    shown: dict[int, Tensor] = field(default_factory=dict)
    """The first few adversarial images, (C, H, W), by row."""
    ended_by_budget: bool = False

    def fell_to(self, *kinds: Kind) -> Tensor:
        """Which images fell to any rung of these kinds, bool, (n,)."""
        found = torch.zeros_like(self.right)
        for step, outcome in zip(self.steps, self.outcomes, strict=True):
            if step.kind in kinds:
                found |= outcome == 1
        return found

    def rows(self, on: str) -> Tensor:
        """Which images a rung is for, int64."""
        chosen = {
            "right": self.right,
            "deployed survivors": self.right & ~self.fell_to("deployed"),
            "standing": self.standing,
        }[on]
        return chosen.nonzero()[:, 0]

    def is_suspicious(self) -> bool:
        """Whether something won where the deployed output's gradient lost, or there is no gradient at all."""
        hidden = self.fell_to("gradient-free", "transfer", "one step") & ~self.fell_to("deployed")
        return bool(hidden.any()) or bool((self.dead & self.standing).any())

    @property
    def spent(self) -> int:
        """Passes so far."""
        return sum(step.forwards + step.backwards for step in self.steps)


SHOWN = 8
"""Adversarial images that are kept for the report."""


def rungs(
    classifier: Classifier,
    some: Tensor,
    threat: Linf | L2,
    effort: Effort,
    *,
    samples: int,
    differentiable: bool,
    twins: Sequence[nn.Module],
    adaptive: object,
) -> Iterator[Rung]:
    """The ladder from the ground up.

    some: a few of the images; samples: passes a look, for a randomised classifier; differentiable: whether any gradient
    reaches the image; twins: undistilled surrogates; adaptive: the user's own attack, loss, or module to climb through,
    or None.
    """
    module = classifier if isinstance(classifier, nn.Module) else None
    ball: dict[str, Any] = {"threat": threat}
    white: dict[str, Any] = ball | {"samples": samples}
    norm: Any = "linf" if isinstance(threat, Linf) else "l2"
    if module is not None:
        yield Rung("FGSM", "one step", FGSM(**white), "right", "the cheapest look")
        pgd = PGD(**white, steps=effort.pgd)
        yield Rung(f"PGD-{effort.pgd}, cross-entropy", "deployed", pgd, "right", "what most evaluations stop at")
        apgd = APGD(**white, steps=effort.apgd)
        why = "converged on the deployed output: the robustness that is claimed"
        yield Rung(f"APGD-{effort.apgd}, cross-entropy", "deployed", apgd, "deployed survivors", why)
    why = "luck: where it beats a gradient attack, the gradients mislead"
    yield Rung("random draws", "gradient-free", RandomDraws(**ball, queries=effort.draws), "deployed survivors", why)
    why = "asks for scores only: where it beats a gradient attack, the gradients mislead"
    probe = Square(**ball, queries=effort.probing)
    yield Rung(f"Square, {effort.probing} queries", "gradient-free", probe, "deployed survivors", why)
    if module is not None:
        why = "the scale of the logits cannot hide the gradient from it"
        for loss in ("standardised", "margin"):
            apgd = APGD(**white, steps=effort.apgd, loss=loss)
            yield Rung(f"APGD-{effort.apgd}, {loss}", "white box", apgd, "standing", why, skip=_without_gradient)
        targeted = APGD(**white, steps=effort.targeted, loss="dlr", targets=effort.targets)
        why = f"goes to each of the {effort.targets} likeliest classes in turn"
        name = f"APGD-T-{effort.targeted}, DLR"
        yield Rung(name, "white box", targeted, "standing", why, skip=_without_gradient)
        nearest = FMN(norm=norm, steps=effort.nearest, samples=samples)
        why = "follows the boundary instead of filling the ball"
        yield Rung(f"FMN-{effort.nearest}", "white box", nearest, "standing", why, skip=_without_gradient)
        through = APGD(**white, steps=effort.apgd, loss="margin")
        inner = module if differentiable else inner_logits(module, some)
        why = "takes the logits before any softmax, and passes gradients through rounding, signs, casts and detach()"
        yield Rung(
            f"APGD-{effort.apgd}, straight through",
            "white box",
            through,
            "standing",
            why,
            through=StraightThrough(inner),
            skip=lambda ladder: "" if not differentiable or _is_dead(ladder) else "every image has a gradient",
        )
    if adaptive is not None and module is not None:
        yield _adaptive(adaptive, white, effort)
    if twins:
        transfer = Transfer(**ball, surrogates=tuple(twins))
        yield Rung(
            "transfer from twins", "transfer", transfer, "standing", "what fools an undistilled twin, shown once"
        )
    calm = "nothing beat the deployed gradients so far, and every image has one"
    skip = None if module is None else (lambda ladder: "" if ladder.is_suspicious() else calm)
    never: Callable[[Ladder], str] = lambda _: ""  # noqa: E731
    square = Square(**ball, queries=effort.square)
    why = "gradients mislead here, so queries decide"
    name = f"Square, {effort.square} queries"
    yield Rung(name, "gradient-free", square, "standing", why, skip=skip or never, few=True)
    hop = HopSkipJump(norm=norm, queries=effort.hop)
    why = "needs labels only: neither scores nor gradients can hide from it"
    name = f"HopSkipJump, {effort.hop} queries"
    yield Rung(name, "gradient-free", hop, "standing", why, skip=skip or never, few=True)


def _is_dead(ladder: Ladder) -> bool:
    return bool((ladder.dead & ladder.standing).any())


def _without_gradient(ladder: Ladder) -> str:
    standing = int(ladder.standing.sum())
    return "no image that stands has a gradient" if int((ladder.dead & ladder.standing).sum()) == standing else ""


def _adaptive(given: object, white: dict[str, Any], effort: Effort) -> Rung:
    why = "yours, written for this defence"
    if isinstance(given, Attack):
        return Rung("adaptive attack", "adaptive", given, "standing", why)
    apgd = APGD(**white, steps=effort.apgd, loss="margin")
    if isinstance(given, nn.Module):
        return Rung("adaptive, through your module", "adaptive", apgd, "standing", why, through=given)
    if callable(given):
        loss: Loss = given
        return Rung("adaptive loss", "adaptive", APGD(**white, steps=effort.apgd, loss=loss), "standing", why)
    raise InputError(
        f"the adaptive attack is a {type(given).__name__}.",
        "Its factory must return an attack, a loss (logits, labels, target) -> (n,), or a torch.nn.Module.",
    )


@dataclass
class Climb:
    """A ladder being climbed on some images, float32 in [0, 1], (n, C, H, W), with labels, int64, (n,)."""

    classifier: Classifier
    images: Tensor
    labels: Tensor
    threat: Linf | L2
    runtime: Runtime
    effort: Effort
    seed: int
    budget: Budget = Budget()
    checkpoint: Path | None = None
    advance: Callable[[int, int, str], None] | None = None

    def go(self, ladder: Ladder, steps: Sequence[Rung]) -> Ladder:
        """Climb from where the ladder (or its checkpoint) is to the end of the rungs, or of the budget."""
        if self.checkpoint is not None and self.checkpoint.exists():
            restore(ladder, self.checkpoint)
        began = time.monotonic() - sum(step.seconds for step in ladder.steps)
        for number, rung in enumerate(steps):
            if number < len(ladder.steps):
                continue  # the checkpoint has it
            if self.advance is not None:
                self.advance(number, len(steps), f"{int(ladder.standing.sum())} stand; {rung.name}")
            self._try(ladder, rung, began)
            if self.checkpoint is not None:
                save(ladder, self.checkpoint)
                faults.kill_point("rung")
        return ladder

    def _try(self, ladder: Ladder, rung: Rung, began: float) -> None:
        step = Step(rung.name, rung.kind, rung.why, standing=int(ladder.standing.sum()))
        outcome = torch.full(ladder.right.shape, -1, dtype=torch.int8)
        rows = ladder.rows(rung.on)
        if not len(rows):
            step.why = "not run: nothing is left to learn, no image stands"
        elif self._is_spent(ladder, began):
            step.why, ladder.ended_by_budget = "not run: the budget is spent", True
        elif refusal := rung.skip(ladder):
            step.why = f"not run: {refusal}"
        else:
            self._run(ladder, rung, step, outcome, rows, began)
        ladder.steps.append(step)
        ladder.outcomes.append(outcome)

    def _run(self, ladder: Ladder, rung: Rung, step: Step, outcome: Tensor, rows: Tensor, began: float) -> None:
        started = time.monotonic()
        if rung.few:
            step.left_out = max(0, len(rows) - self.effort.patient)
            rows = rows[: self.effort.patient]
        size = CHUNK if isinstance(self.classifier, nn.Module) else SMALL_CHUNK
        for part in batches(len(rows), size):
            chunk = rows[part]
            if step.ran and self._is_spent(ladder, began, step):
                ladder.ended_by_budget = True
                step.why += f"; the budget ended it after {step.asked} of {len(rows)} images"
                break
            try:
                found = self._attack(rung, chunk)
            except BudgetExceeded as error:  # of a black box, whose queries are its own count
                ladder.ended_by_budget = True
                step.why += f"; after {step.asked} of {len(rows)} images: {error.what}"
                break
            fell = found.success & (found.distance <= self.threat.epsilon + TOLERANCE)
            outcome[chunk] = fell.to(torch.int8)
            ladder.distance[chunk] = torch.where(
                found.success, torch.minimum(found.distance, ladder.distance[chunk]), ladder.distance[chunk]
            )
            for row, image in zip(chunk[fell].tolist(), found.images[fell], strict=True):
                if len(ladder.shown) < SHOWN:
                    ladder.shown.setdefault(row, image.clone())
            ladder.standing[chunk[fell]] = False
            step.ran = True
            step.asked += len(chunk)
            step.fell += int(fell.sum())
            step.forwards += int(found.forwards.sum())
            step.backwards += int(found.backwards.sum())
            step.queries += int(found.queries.sum())
            step.standing = int(ladder.standing.sum())
            step.seconds = time.monotonic() - started

    def _attack(self, rung: Rung, rows: Tensor) -> AttackResult:
        given: dict[str, Any] = {"seed": self.seed, "ids": rows, "runtime": self.runtime}
        if isinstance(rung.attack, GradientAttack) and rung.through is not None:
            given["through"] = rung.through
        return rung.attack(self.classifier, self.images[rows], self.labels[rows], **given)

    def _is_spent(self, ladder: Ladder, began: float, step: Step | None = None) -> bool:
        passes = ladder.spent + (0 if step is None else step.forwards + step.backwards)
        over = self.budget.passes is not None and passes >= self.budget.passes
        return over or (self.budget.seconds is not None and time.monotonic() - began >= self.budget.seconds)


def begin(right: Tensor, dead: Tensor) -> Ladder:
    """A ladder at its foot."""
    return Ladder(right, right.clone(), torch.full(right.shape, torch.inf), dead)


def save(ladder: Ladder, path: Path) -> None:
    """Leave the state of a ladder as a file."""
    state = {
        "standing": ladder.standing,
        "distance": ladder.distance,
        "steps": [asdict(step) for step in ladder.steps],
        "outcomes": ladder.outcomes,
        "shown": ladder.shown,
        "ended_by_budget": ladder.ended_by_budget,
    }
    content = io.BytesIO()
    torch.save(state, content)
    write_atomically(path, content.getvalue())


def restore(ladder: Ladder, path: Path) -> None:
    """Put a ladder where `save` left it. Raises StoreError."""
    try:
        state = torch.load(path, weights_only=True)
        ladder.standing, ladder.distance = state["standing"], state["distance"]
        ladder.steps = [Step(**step) for step in state["steps"]]
        ladder.outcomes, ladder.shown = state["outcomes"], state["shown"]
        ladder.ended_by_budget = state["ended_by_budget"]
    except Exception as error:  # a pickle can fail in any way
        raise StoreError(f"the checkpoint {path} cannot be read: {reason(error)}", "Delete it, then resume.") from None
