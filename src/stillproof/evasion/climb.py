"""Climbing the ladder: each rung is tried on the images that it is for, and what falls is noted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stillproof.attacks.attack import Attack, GradientAttack, QueryAttack
from stillproof.attacks.frozen import Classifier, frozen
from stillproof.attacks.record import AttackResult
from stillproof.attacks.threats import L2, Linf
from stillproof.core import faults
from stillproof.core.noise import derive
from stillproof.core.runtime import Runtime
from stillproof.errors import BudgetExceeded, InputError, StillproofError
from stillproof.evasion.allowance import Allowance
from stillproof.evasion.evidence import within
from stillproof.evasion.ladder import Effort, Ladder, Rung, Step, save

CHUNK = 256
"""Images that are attacked at once."""

BUDGETED_CHUNK = 32
"""The same, at most, where there is a budget to be looked at in between."""

SMALL_CHUNK = 16
"""The same for a black box: what it was asked about a chunk that its budget ended is lost."""


@runtime_checkable
class Metered(Protocol):
    """A black box that counts: queries so far, and how many there may be, if there is a limit."""

    queries: int
    budget: int | None


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
