"""What is asked of a batch, and what was found: the best image of each so far, judged in fp32, with its cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from stillproof.attacks.frozen import ROUNDING_TOLERANCE, Frozen
from stillproof.attacks.losses import margin
from stillproof.attacks.threats import Norm, per_image
from stillproof.core.measurement import Cost
from stillproof.errors import InputError

Keep = Literal["first", "largest", "nearest"]
"""Which adversarial image of several: the first, and then no other is looked for; of the largest loss; the nearest."""


PUSHES = (1.0, 1.005, 1.02, 1.1, 1.3, 2.0)
"""How far the nearest image is pushed on, until fp32 calls it adversarial."""

BISECTIONS = 5
"""Halvings of the last tenth of the way to it, or of all of it, if nine tenths are still adversarial."""

POLISHING = len(PUSHES) + 1 + BISECTIONS
"""Passes in fp32 that `Record.polish` may need."""

CLEARANCE = 1e-5
"""Margin of the nearest images, as a share of the logits' spread: another batch size rounds otherwise."""


@dataclass(frozen=True, slots=True)
class AttackResult:
    """What an attack found, an entry an image.

    images: float32, (N, C, H, W); success: bool; distance: float32; forwards, backwards, queries: int64 (passes about
    the image: what fills a batch up on a CPU, at most an eighth more, is nobody's);
    first_success: int64, the pass of the first success (as judged within the attack), −1 where there was
    none. An image that was misclassified to begin with is a success at distance 0.
    """

    images: Tensor
    success: Tensor
    distance: Tensor
    forwards: Tensor
    backwards: Tensor
    queries: Tensor
    first_success: Tensor

    @property
    def cost(self) -> Cost:
        """All passes and queries together."""
        forwards, backwards, queries = (int(count.sum()) for count in (self.forwards, self.backwards, self.queries))
        return Cost(forwards=forwards, backwards=backwards, queries=queries)

    @classmethod
    def of(cls, images: Tensor) -> AttackResult:
        """Room for what is found of so many images, once: batches are written into it."""
        n = len(images)
        counts = [torch.zeros(n, dtype=torch.int64) for _ in range(4)]
        room = torch.empty(images.shape, dtype=torch.float32)
        return cls(room, torch.zeros(n, dtype=torch.bool), torch.zeros(n), *counts)


@dataclass(frozen=True, slots=True)
class Task:
    """The images of a batch and what is wanted of them.

    origin: float32, (n, C, H, W); labels: int64, (n,); target: the class each is to be taken for, or None: any other
    than its label; ids: what identifies each for its noise; confidence: the margin that is asked for, κ; uint8:
    whether what is handed back is to lie on the grid of 8 bits, and be adversarial there; clearance: the margin that is
    asked for as a share of the spread of the logits.
    """

    origin: Tensor
    labels: Tensor
    target: Tensor | None
    ids: Tensor
    confidence: float = 0.0
    uint8: bool = False
    clearance: float = 0.0

    def misclassified(self, logits: Tensor) -> Tensor:
        """Whether each image is taken for what it should, (n,). NaN is taken for nothing."""
        guesses = logits.argmax(dim=1)
        wrong = guesses != self.labels if self.target is None else guesses == self.target
        return wrong & ~logits.isnan().any(dim=1)

    def adversarial(self, logits: Tensor) -> Tensor:
        """The same, and by the margin that is asked for."""
        if not (self.confidence or self.clearance):
            return self.misclassified(logits)
        asked = self.confidence + self.clearance * (logits.amax(dim=1) - logits.amin(dim=1))
        return self.misclassified(logits) & (margin(logits, self.labels, self.target) >= asked)

    def __getitem__(self, rows: Tensor | slice) -> Task:
        target = None if self.target is None else self.target[rows]
        return replace(self, origin=self.origin[rows], labels=self.labels[rows], target=target, ids=self.ids[rows])

    def to(self, device: str, memory_format: torch.memory_format) -> Task:
        target = None if self.target is None else self.target.to(device)
        origin = self.origin.to(device).contiguous(memory_format=memory_format)
        labels, ids = self.labels.to(device), self.ids.to(device)
        return replace(self, origin=origin, labels=labels, target=target, ids=ids)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the record says of the images that it was shown.

    adversarial: (n,), as the fast copy sees it, but where an image would fall for the first time: there fp32 has
    judged; any_first: whether one has fallen for the first time.
    """

    adversarial: Tensor
    any_first: bool


class Record:
    """The best image of each of a batch so far, whether fp32 has confirmed it, and what the search has cost.

    `best` is what the fast copy calls better than all before; `sure` is the last that the original confirmed. queries:
    what may be asked about an image, by an attack without gradients. While no image falls, nothing waits for the device
    but the question whether one has.
    """

    def __init__(self, model: Frozen, task: Task, norm: Norm, keep: Keep, *, queries: int | None = None) -> None:
        if keep == "nearest":
            task = replace(task, clearance=CLEARANCE)
        self.model, self.task, self.norm, self.keep, self.queries = model, task, norm, keep, queries
        n, device = len(task.origin), task.origin.device
        self.clean = model.judge(task.origin)
        _check(self.clean, task)
        self.misclassified = task.misclassified(self.clean)
        self.success = self.misclassified.clone()
        self.sure, self.best = task.origin.clone(), task.origin.clone()
        self.score = torch.full((n,), -torch.inf, device=device)
        self.is_confirmed = torch.ones_like(self.success)
        self.is_near = torch.zeros_like(self.success)
        self.first = torch.where(self.success, 0, -1)
        self.forwards = torch.full((n,), model.draws, device=device)
        self.backwards = torch.zeros_like(self.forwards)
        self.looks = torch.zeros_like(self.forwards)

    @property
    def judges_again(self) -> bool:
        """Whether what the search has seen is not yet what is handed back, judged in fp32."""
        return self.model.is_rounded or self.task.uint8

    def open(self) -> Tensor:
        """Rows that are still to be attacked."""
        return (~(self.success if self.keep == "first" else self.misclassified)).nonzero()[:, 0]

    def spent(self, rows: Tensor) -> Tensor:
        """Which of these images cannot pay for another look, and for what fp32 may have to judge after it, (n,)."""
        if self.queries is None:
            return torch.zeros_like(rows, dtype=torch.bool)
        needed = 3 if self.judges_again else 1  # the look, the confirmation, the last judgement
        return self.forwards[rows] + needed > self.queries

    def see(
        self, rows: Tensor, task: Task, images: Tensor, value: Tensor, logits: Tensor, passes: tuple[int, int]
    ) -> Seen:
        """Keep what is worth keeping of the images of these rows.

        task: that of these rows; value: the loss, (n,); logits: of the fast copy, (n, K); passes: forward and backward,
        an image.
        """
        adversarial, known = task.adversarial(logits), self.success[rows]
        self.forwards[rows] += passes[0]
        self.backwards[rows] += passes[1]
        self.looks[rows] += 1
        fresh = (adversarial & ~known).nonzero()[:, 0]
        if len(fresh):
            right, final = self._confirmed(rows[fresh], images[fresh])
            adversarial = adversarial.index_put((fresh,), right)
            fresh = fresh[right]
            confirmed = rows[fresh]
            self.sure[confirmed], self.success[confirmed] = final[right], True
            self.first[confirmed] = self.looks[confirmed]
        score = -self.norm.distance(images, task.origin) if self.keep == "nearest" else value
        better = (adversarial & ~known) | ((adversarial == known) & (score > self.score[rows]))
        if self.keep == "nearest":
            better &= adversarial
        self.best = _put(self.best, rows, per_image(better), images)
        self.score = _put(self.score, rows, better, score)
        self.is_near = _put(self.is_near, rows, better, self._is_near(task, logits))
        self.is_confirmed[rows] &= ~(better & adversarial)
        return Seen(adversarial, len(fresh) > 0)

    def _is_near(self, task: Task, logits: Tensor) -> Tensor:
        """Where the fast copy is not sure enough for fp32 to be of the same opinion in any case."""
        lacking = task.confidence - margin(logits, task.labels, task.target)
        return lacking <= 2 * ROUNDING_TOLERANCE * (logits.amax(dim=1) - logits.amin(dim=1))

    def _judged(self, rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the original, in fp32, calls these images adversarial as they are handed back; and these."""
        self.forwards[rows] += self.model.draws
        final = self._handed_back(rows, images)
        return self.task[rows].adversarial(self.model.judge(final)), final

    def _confirmed(self, rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same for images that the search has called so."""
        if self.judges_again:
            return self._judged(rows, images)
        return torch.ones_like(rows, dtype=torch.bool), images

    def _handed_back(self, rows: Tensor, images: Tensor) -> Tensor:
        """On the grid of 8 bits, if that was asked for: the nearest there, or that towards the origin, if it is farther
        away than the image was."""
        if not self.task.uint8:
            return images
        origin, levels = self.task.origin[rows], images * 255
        nearest = levels.round() / 255
        if self.keep == "nearest":
            return nearest
        slack = 1e-3  # of a level: 255 · (k / 255) is not always k
        inward = torch.where(images > origin, (levels + slack).floor(), (levels - slack).ceil()) / 255
        farther = self.norm.distance(nearest, origin) > self.norm.distance(images, origin)
        return torch.where(per_image(farther), inward, nearest)

    def settle(self) -> None:
        """Let fp32 judge the best images; where it does not confirm one, the last that it did stays."""
        rows = (~self.is_confirmed).nonzero()[:, 0]
        if not len(rows):
            return
        right, final = self._confirmed(rows, self.best[rows])
        self.sure[rows[right]] = final[right]
        self.is_confirmed[rows] = True

    def polish(self) -> None:
        """Move the best images along the line from their origin to where fp32 just calls them adversarial.

        The fast copy's boundary is not quite the original's. What it called nearest may lie a little short of it, and
        is pushed over; then the last tenth of the way is bisected, or, if it is adversarial before that, the rest.
        """
        rows = (self.success & ~self.misclassified).nonzero()[:, 0]
        if not len(rows):
            return
        origin = self.task.origin[rows]
        change = self.best[rows] - origin
        reach = torch.full((len(rows),), torch.inf, device=origin.device)
        for factor in PUSHES:
            missing = reach.isinf().nonzero()[:, 0]
            if not len(missing):
                break
            pushed = (origin[missing] + factor * change[missing]).clamp_(0, 1)
            right, final = self._judged(rows[missing], pushed)
            reach[missing[right]] = factor
            self.sure[rows[missing[right]]] = final[right]
        lost = reach.isinf()
        change = torch.where(per_image(lost), self.sure[rows] - origin, change)
        high = torch.where(lost, 1.0, reach)
        low = torch.zeros_like(high)
        for number in range(1 + BISECTIONS):
            middle = (low + high) / 2 if number else 0.9 * high
            right, final = self._judged(rows, (origin + per_image(middle) * change).clamp_(0, 1))
            low, high = torch.where(right, low, middle), torch.where(right, middle, high)
            self.sure[rows[right]] = final[right]
        self.is_confirmed[rows] = True

    def result(self) -> AttackResult:
        """What was found, judged in fp32 on the original."""
        if self.keep != "first":
            self.settle()
        missed = (~self.success & self.is_near).nonzero()[:, 0]
        if len(missed) and self.keep != "nearest" and self.judges_again:  # what the fast copy may not have seen
            right, final = self._judged(missed, self.best[missed])
            late = missed[right]
            self.success[late], self.sure[late], self.first[late] = True, final[right], self.looks[late]
        every = torch.arange(len(self.best), device=self.best.device)
        images = torch.where(per_image(self.success), self.sure, self._handed_back(every, self.best))
        distance = self.norm.distance(images, self.task.origin)
        if self.keep == "nearest":
            distance = torch.where(self.success, distance, torch.inf)
        return AttackResult(
            images=images,
            success=self.success,
            distance=distance,
            forwards=self.forwards,
            backwards=self.backwards,
            queries=torch.zeros_like(self.forwards) if self.queries is None else self.forwards.clone(),
            first_success=self.first,
        )


def _put(kept: Tensor, rows: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
    """What is kept, with the chosen of these values in these rows (all different, in ascending order)."""
    if len(rows) == len(kept):  # all of them, the common case: one pass instead of three
        return torch.where(chosen, values, kept)
    kept[rows] = torch.where(chosen, values, kept[rows])
    return kept


def _check(logits: Tensor, task: Task) -> None:
    """Raise InputError where the answers cannot be of these labels."""
    if logits.ndim != 2 or len(logits) != len(task.labels) or logits.shape[1] < 2:
        raise InputError(
            f"the classifier answers {len(task.labels)} images with a tensor of shape {tuple(logits.shape)}.",
            "It must return logits, (n, K), K of 2 or more.",
        )
    for name, classes in (("labels", task.labels), ("targets", task.target)):
        if classes is not None and not 0 <= int(classes.min()) <= int(classes.max()) < logits.shape[1]:
            raise InputError(
                f"{name} are from {int(classes.min())} to {int(classes.max())}, and the classifier knows "
                f"{logits.shape[1]} classes.",
                "Number the classes from 0.",
            )
