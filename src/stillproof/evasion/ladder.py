"""The ladder: what is known while it is climbed, rung by rung, and how it is left and taken up again.

Which rungs there are, and why, `escalation.py` says.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stillproof.attacks.attack import Attack, GradientAttack, QueryAttack
from stillproof.attacks.frozen import Classifier, frozen
from stillproof.attacks.record import AttackResult
from stillproof.attacks.threats import L2, Linf
from stillproof.core import faults
from stillproof.core.files import write_atomically
from stillproof.core.noise import derive
from stillproof.core.runtime import Runtime
from stillproof.errors import BudgetExceeded, InputError, StillproofError, StoreError, reason
from stillproof.evasion.allowance import Allowance
from stillproof.evasion.examination import First
from stillproof.evasion.indicators import OTHERWISE, within

Kind = Literal[
    "one step",
    "deployed",
    "white box",
    "straight through",
    "gradient-free",
    "transfer",
    "adaptive",
    "detour",
    "deployed again",
    "close look",
]
"""What a rung sees. deployed: the gradient of the output as it is served, which is what can be masked; straight
through: the logits within, past steps that have no gradient; adaptive: the user's own attack or loss, which may be an
ordinary white box's; detour: a module of the user's, climbed in place of the classifier; deployed again: the deployed
gradient on what others took. What looking closely found is noted as `deployed again` or `close look`."""

CHUNK = 256
"""Images that are attacked at once."""

BUDGETED_CHUNK = 32
"""The same, at most, where there is a budget to be looked at in between."""

SMALL_CHUNK = 16
"""The same for a black box: what it was asked about a chunk that its budget ended is lost."""


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
    watched: int = 160
    """On so many of the images that are right is it seen to the end what the deployed gradient misses, where there is a
    gradient: the first of them, so that their order should be random."""


@runtime_checkable
class Metered(Protocol):
    """A black box that counts: queries so far, and how many there may be, if there is a limit."""

    queries: int
    budget: int | None


@dataclass(frozen=True, slots=True)
class Rung:
    """An attack with its reason."""

    name: str
    kind: Kind
    attack: Attack
    on: Literal["right", "watched survivors", "hidden", "standing", "standing, unwatched"]
    """watched survivors: those of the watched images that nothing on the deployed output has fooled yet; hidden: those
    of them that something else has."""
    why: str
    through: nn.Module | None = None
    """What is climbed in place of the classifier."""
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
    watched: Tensor
    """On which it is seen what the deployed gradient misses, and those among them that are wrong: bool, (n,)."""
    first: First
    """What the first look saw."""
    steps: list[Step] = field(default_factory=list)
    outcomes: list[Tensor] = field(default_factory=list)
    """By step: int8, (n,): 1 it fell, 0 it did not, −1 it was not asked."""
    shown: dict[int, Tensor] = field(default_factory=dict)
    """The first few adversarial images, (C, H, W), by row."""
    ended_by_budget: bool = False

    def fell_to(self, *kinds: str) -> Tensor:
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
            "watched survivors": self.watched & self.right & ~self.fell_to("deployed"),
            "hidden": self.watched & self.right & ~self.standing & ~self.fell_to("deployed"),
            "standing": self.standing,
            "standing, unwatched": self.standing & ~self.watched,
        }[on]
        return chosen.nonzero()[:, 0]

    def is_suspicious(self) -> bool:
        """Whether something won where the deployed output's gradient lost, or there is no gradient at all."""
        hidden = self.watched & self.fell_to(*OTHERWISE) & ~self.fell_to("deployed", "deployed again")
        # these are shown to what nothing else has fooled
        hidden |= self.fell_to("transfer", "detour", "straight through")
        return bool(hidden.any()) or bool((self.dead & self.standing).any())

    def copy(self) -> Ladder:
        """As it is now, whatever is found out later."""
        lists = {"steps": list(self.steps), "outcomes": list(self.outcomes), "shown": dict(self.shown)}
        return replace(self, standing=self.standing.clone(), distance=self.distance.clone(), **lists)  # type: ignore[arg-type]

    def note(self, name: str, kind: Kind, why: str, fell: Tensor) -> None:
        """Images, bool, (n,), that fell to something besides the rungs, if there are any; its cost is counted there."""
        fell = fell & self.standing
        if bool(fell.any()):
            self.standing = self.standing & ~fell
            step = Step(name, kind, why, fell=int(fell.sum()), standing=int(self.standing.sum()), ran=True)
            self.steps.append(step)
            self.outcomes.append(torch.where(fell, 1, -1).to(torch.int8))

    @property
    def spent(self) -> int:
        """Passes so far."""
        return sum(step.forwards + step.backwards for step in self.steps)


SHOWN = 8
"""Adversarial images that are kept for the report."""

CONFIRMING, SURELY = 100, 2.0
"""Passes of a randomised classifier by whose mean an adversarial image must still be one, and by how many standard
errors: each of a dozen rungs may be lucky once more."""


class Averaged(nn.Module):
    """A randomised classifier's mean logits over several passes: what attacks that only ask are given."""

    def __init__(self, classifier: nn.Module, passes: int) -> None:
        super().__init__()
        self.classifier, self.passes = classifier, passes

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits, (N, K)."""
        return torch.stack([self.classifier(images.clone()) for _ in range(self.passes)]).mean(0)


LAST_SHARE, SHARE = 1.0, 0.3
"""Of the queries that a black box has left: what the last rung may spend, and every other."""


@dataclass
class Climb:
    """A ladder being climbed on some images, float32 in [0, 1], (n, C, H, W), with labels, int64, (n,).

    samples: passes that an answer is the mean of, for a randomised classifier; allowance: what it may spend.
    """

    classifier: Classifier
    images: Tensor
    labels: Tensor
    threat: Linf | L2
    runtime: Runtime
    effort: Effort
    seed: int
    allowance: Allowance = field(default_factory=Allowance)
    samples: int = 1
    checkpoint: Path | None = None
    advance: Callable[[int, int, str], None] | None = None

    def go(self, ladder: Ladder, steps: Sequence[Rung]) -> Ladder:
        """Climb from where the ladder is to the end of the rungs, or of the budget."""
        for number, rung in enumerate(steps):
            if number < len(ladder.steps):
                continue  # it comes from a checkpoint
            if self.advance is not None:
                self.advance(number, len(steps), f"{int(ladder.standing.sum())} stand; {rung.name}")
            with torch.random.fork_rng(devices=[]):  # what a randomised classifier draws
                torch.manual_seed(derive(self.seed, "rung", number))
                self._try(ladder, rung, is_last=number == len(steps) - 1)
            self.save(ladder)
            faults.kill_point("rung")
        return ladder

    def save(self, ladder: Ladder, *, reserved: int = 0) -> None:
        """Leave a checkpoint, if there is a place for one. reserved: queries that are about to be asked."""
        if self.checkpoint is not None:
            asked = self.classifier.queries if isinstance(self.classifier, Metered) else 0
            save(ladder, self.checkpoint, asked=asked + reserved)

    def _try(self, ladder: Ladder, rung: Rung, *, is_last: bool) -> None:
        step = Step(rung.name, rung.kind, rung.why, standing=int(ladder.standing.sum()))
        outcome = torch.full(ladder.right.shape, -1, dtype=torch.int8)
        rows = ladder.rows(rung.on)
        if not len(rows):
            step.why = "not run: no image is left that it could tell anything about"
        elif self.allowance.is_spent:
            step.why, ladder.ended_by_budget = "not run: the budget is spent", True
        elif refusal := rung.skip(ladder):
            step.why = f"not run: {refusal}"
        else:
            self._run(ladder, rung, step, outcome, rows, is_last=is_last)
        ladder.steps.append(step)
        ladder.outcomes.append(outcome)

    def _run(self, ladder: Ladder, rung: Rung, step: Step, outcome: Tensor, rows: Tensor, *, is_last: bool) -> None:
        started, foot = time.monotonic(), ladder.copy()
        if rung.few:
            step.left_out = max(0, len(rows) - self.effort.patient)
            rows = rows[: self.effort.patient]
        attack = self._within_budget(rung.attack, len(rows), LAST_SHARE if is_last else SHARE)
        done = 0
        while done < len(rows):
            chunk = rows[done : done + self._chunk(step)]
            done += len(chunk)
            if step.ran and self.allowance.is_spent:
                ladder.ended_by_budget = True
                step.why += f"; the budget ended it after {step.asked} of {len(rows)} images"
                break
            if isinstance(self.classifier, Metered) and isinstance(attack, QueryAttack):
                # reserved before it is asked, so that who is killed in between and goes on cannot ask it twice over
                self.save(foot, reserved=attack.queries * len(chunk))
            try:
                found = self._attack(rung, attack, chunk, derive(self.seed, "rung", len(ladder.steps)))
            except BudgetExceeded as error:  # of a black box, whose queries are its own count
                ladder.ended_by_budget = True
                step.why += f"; after {step.asked} of {len(rows)} images: {error.what}"
                break
            self._note(ladder, step, outcome, chunk, found, self._passes_an_answer(attack))
            step.seconds = time.monotonic() - started

    def _passes_an_answer(self, attack: Attack) -> int:
        """What only asks a randomised module asks for the mean of several passes (`Averaged`)."""
        return self.samples if isinstance(self.classifier, nn.Module) and isinstance(attack, QueryAttack) else 1

    def _note(
        self, ladder: Ladder, step: Step, outcome: Tensor, chunk: Tensor, found: AttackResult, passes: int
    ) -> None:
        # in the norm that is audited, whatever the attack's own was
        distance = self.threat.distance(found.images, self.images[chunk])
        success, confirming = self._confirmed(found, chunk)
        fell = success & within(distance, self.threat.epsilon)
        outcome[chunk] = fell.to(torch.int8)
        nearer = torch.minimum(distance, ladder.distance[chunk])
        ladder.distance[chunk] = torch.where(success, nearer, ladder.distance[chunk])
        for row, image in zip(chunk[fell].tolist(), found.images[fell], strict=True):
            if len(ladder.shown) < SHOWN:
                ladder.shown.setdefault(row, image.clone())
        ladder.standing[chunk[fell]] = False
        step.ran = True
        step.asked += len(chunk)
        step.fell += int(fell.sum())
        forwards = passes * int(found.forwards.sum()) + confirming
        step.forwards += forwards
        step.backwards += int(found.backwards.sum())
        step.queries += int(found.queries.sum())
        self.allowance.passes += forwards + int(found.backwards.sum())
        step.standing = int(ladder.standing.sum())

    def _confirmed(self, found: AttackResult, chunk: Tensor) -> tuple[Tensor, int]:
        """Which of what was found is adversarial, bool, (n,), and the passes that it took to tell.

        What looks at a randomised classifier a thousand times finds a lucky draw. So it is asked anew, by more passes.
        """
        rows = found.success.nonzero()[:, 0]
        if self.samples == 1 or not isinstance(self.classifier, nn.Module) or not len(rows):
            return found.success, 0
        shown, labels = found.images[rows].to(self.runtime.device), self.labels[chunk[rows]]
        with frozen(self.classifier, shown, self.runtime) as prepared:
            logits = torch.stack([prepared.judge(shown).cpu() for _ in range(CONFIRMING)])
        mean = logits.mean(0)
        rival = mean.scatter(1, labels[:, None], -torch.inf).argmax(1)
        own, other = (logits[:, torch.arange(len(rows)), named] for named in (labels, rival))
        ahead = other - own
        surely = ahead.mean(0) > SURELY * ahead.std(0) / CONFIRMING**0.5
        success = found.success.clone()
        success[rows] = surely & ~mean.isnan().any(1)
        return success, CONFIRMING * len(rows)

    def _attack(self, rung: Rung, attack: Attack, rows: Tensor, seed: int) -> AttackResult:
        given: dict[str, Any] = {"seed": seed, "ids": rows, "runtime": self.runtime}
        classifier = self.classifier
        if isinstance(attack, GradientAttack):
            given["through"] = rung.through
        elif self.samples > 1 and isinstance(classifier, nn.Module):
            classifier = Averaged(classifier, self.samples)
        try:
            return attack(classifier, self.images[rows], self.labels[rows], **given)
        except Exception as error:
            if rung.kind not in ("adaptive", "detour") or isinstance(error, StillproofError):
                raise
            raise InputError(f"your adaptive attack fails: {type(error).__name__}: {error}", "Mend it.") from error

    def _within_budget(self, attack: Attack, images: int, share: float) -> Attack:
        """The attack with no more queries an image than its share of what a black box has left; or than all of the
        passes that are, where passes are limited."""
        box = self.classifier
        if not isinstance(attack, QueryAttack):
            return attack
        if isinstance(box, nn.Module):
            most = self.allowance.passes_left / self.samples
            return replace(attack, queries=max(1, int(min(attack.queries, most))))
        if not isinstance(box, Metered) or box.budget is None:
            return attack
        left = box.budget - box.queries
        return replace(attack, queries=max(1, min(attack.queries, int(share * left / images))))

    def _chunk(self, step: Step) -> int:
        """How many images are attacked next: with a budget one, and then as many as fit in."""
        if not isinstance(self.classifier, nn.Module):
            return SMALL_CHUNK
        if not self.allowance.is_limited:
            return CHUNK
        return min(BUDGETED_CHUNK, self.allowance.room(step.forwards + step.backwards, step.seconds, step.asked))


def begin(first: First, labels: Tensor, *, has_gradient: bool, watched: int) -> Ladder:
    """A ladder at its foot. watched: so many of the images that are right; all, where there is no gradient."""
    right = first.logits.argmax(1) == labels
    dead = (first.ce == 0) & (first.margin == 0) if has_gradient else torch.zeros_like(right)
    before = right.cumsum(0) - right.long()
    seen = before < max(1, watched) if has_gradient else torch.ones_like(right)
    return Ladder(right, right.clone(), torch.full(right.shape, torch.inf), dead, seen, first)


def save(ladder: Ladder, path: Path, *, asked: int) -> None:
    """Leave the state of a ladder as a file. asked: queries that a black box has answered."""
    state = {name: getattr(ladder, name) for name in SAVED}
    state["steps"] = [asdict(step) for step in ladder.steps]
    state["first"] = asdict(ladder.first)
    state["asked"] = asked
    content = io.BytesIO()
    torch.save(state, content)
    write_atomically(path, content.getvalue())


SAVED = ("right", "standing", "distance", "dead", "watched", "outcomes", "shown", "ended_by_budget")


def restore(path: Path) -> tuple[Ladder, int]:
    """The ladder that `save` left, and what a black box had been asked. Raises StoreError."""
    try:
        state = torch.load(path, weights_only=True)
        steps = [Step(**step) for step in state["steps"]]
        known = {name: state[name] for name in SAVED}
        return Ladder(**known, steps=steps, first=First(**state["first"])), int(state["asked"])
    except Exception as error:  # a pickle can fail in any way
        raise StoreError(f"the checkpoint {path} cannot be read: {reason(error)}", "Delete it, then resume.") from None
