"""The ladder: what is known while it is climbed, rung by rung, and how it is left and taken up again.

Which rungs there are, and why, `escalation.py` says.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from stillproof.attacks.attack import Attack
from stillproof.core.files import write_atomically
from stillproof.errors import StoreError, reason
from stillproof.evasion.evidence import NOT_BY_LUCK, OTHERWISE
from stillproof.evasion.examination import First

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


@dataclass(frozen=True, slots=True)
class Rung:
    """An attack with its reason."""

    name: str
    kind: Kind
    attack: Attack
    on: Literal["right", "watched survivors", "hidden", "hidden from all", "standing", "standing, unwatched"]
    """watched survivors: those of the watched images that nothing on the deployed output has fooled yet; hidden: those
    of them that something else has; hidden from all: and no attack in the white
    box, though they have a gradient."""
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
            "hidden": self._hidden("deployed"),
            "hidden from all": self._hidden("deployed", "deployed again", "white box") & ~self.dead,
            "standing": self.standing,
            "standing, unwatched": self.standing & ~self.watched,
        }[on]
        return chosen.nonzero()[:, 0]

    def _hidden(self, *kinds: str) -> Tensor:
        """Watched images that fell, and not to these."""
        return self.watched & self.right & ~self.standing & ~self.fell_to(*kinds)

    def is_suspicious(self) -> bool:
        """Whether something won where every gradient of the classifier's own lost, or there is none at all; or where
        the deployed one lost, and by more than a slip."""
        otherwise = self.fell_to(*OTHERWISE)
        hidden = self._hidden("deployed", "deployed again", "white box") & otherwise
        if int((self._hidden("deployed", "deployed again") & otherwise).sum()) >= NOT_BY_LUCK:
            return True
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
