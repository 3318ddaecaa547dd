"""The one loop of the attacks on a gradient: batches, the images still under attack, the best of each, counting.

An attack says where it looks next and what it ascends (`Search`); the driver asks the classifier, keeps what is worth
keeping (`Record`), and lets images that are done leave the batch, once fp32 has confirmed that they are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from stillproof.attacks.frozen import ROUNDING_TOLERANCE, Classifier, Frozen, Slope, asked, frozen
from stillproof.attacks.losses import margin
from stillproof.attacks.threats import Norm
from stillproof.core.images import check_range
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError

Keep = Literal["first", "largest", "nearest"]
"""Which adversarial image of several: the first, and then no other is looked for; of the largest loss; the nearest."""


PUSHES = (1.0, 1.005, 1.02, 1.1)
"""How far the nearest image is pushed on, until fp32 calls it adversarial."""

BISECTIONS = 5
"""Halvings of the last tenth of the way to it."""


@dataclass(frozen=True, slots=True)
class AttackResult:
    """What an attack found, an entry an image.

    images: float32, (N, C, H, W); success: bool; distance: float32; forwards, backwards, queries: int64;
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

    @staticmethod
    def join(parts: list[AttackResult]) -> AttackResult:
        """Batches put together again."""
        names = AttackResult.__slots__
        return AttackResult(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True, slots=True)
class Task:
    """The images of a batch and what is wanted of them.

    origin: float32, (n, C, H, W); labels: int64, (n,); target: the class each is to be taken for, or None: any other
    than its label; ids: what identifies each for its noise; confidence: the margin that is asked for, κ.
    """

    origin: Tensor
    labels: Tensor
    target: Tensor | None
    ids: Tensor
    confidence: float = 0.0

    def adversarial(self, logits: Tensor) -> Tensor:
        """Whether each image is taken for what it should, (n,)."""
        if self.confidence:
            return margin(logits, self.labels, self.target) >= self.confidence
        guesses = logits.argmax(dim=1)
        return guesses != self.labels if self.target is None else guesses == self.target

    def __getitem__(self, rows: Tensor | slice) -> Task:
        target = None if self.target is None else self.target[rows]
        return replace(self, origin=self.origin[rows], labels=self.labels[rows], target=target, ids=self.ids[rows])

    def to(self, device: str) -> Task:
        target = None if self.target is None else self.target.to(device)
        origin, labels, ids = self.origin.to(device), self.labels.to(device), self.ids.to(device)
        return replace(self, origin=origin, labels=labels, target=target, ids=ids)


@dataclass
class State:
    """What a search knows: every tensor has a row an image."""

    def take(self, rows: Tensor) -> None:
        """Forget the images that are not in `rows`."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Task):
                setattr(self, field.name, value[rows])


class Search(Protocol):
    """An attack at work on a batch."""

    @property
    def task(self) -> Task:
        """The images that are still under attack."""

    @property
    def current(self) -> Tensor:
        """The images to be looked at next, (n, C, H, W), inside [0, 1]."""

    def ascended(self, logits: Tensor) -> Tensor:
        """The loss, (n,), of which the gradient is taken."""

    def move(self, slope: Slope, adversarial: Tensor) -> Tensor | None:
        """Go on from `current`. Returns which images have nothing left to try, (n,) bool, or None: none."""

    def take(self, rows: Tensor) -> None:
        """Forget the images that are not in `rows`."""


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
    what may be asked about an image, by an attack without gradients. Nothing waits for the device, but for the question
    whether any image is newly adversarial.
    """

    def __init__(self, model: Frozen, task: Task, norm: Norm, keep: Keep, *, queries: int | None = None) -> None:
        self.model, self.task, self.norm, self.keep, self.queries = model, task, norm, keep, queries
        n, device = len(task.origin), task.origin.device
        self.clean = model.judge(task.origin)
        self.misclassified = task.adversarial(self.clean)
        self.success = self.misclassified.clone()
        self.sure, self.best = task.origin.clone(), task.origin.clone()
        self.score = torch.full((n,), -torch.inf, device=device)
        self.is_hit = self.success.clone()
        self.is_confirmed = torch.ones_like(self.success)
        self.is_near = torch.zeros_like(self.success)
        self.first = torch.where(self.success, 0, -1)
        self.forwards = torch.ones(n, dtype=torch.int64, device=device)
        self.backwards = torch.zeros_like(self.forwards)
        self.looks = torch.zeros_like(self.forwards)

    def open(self) -> Tensor:
        """Rows that are still to be attacked."""
        return (~(self.success if self.keep == "first" else self.misclassified)).nonzero()[:, 0]

    def spent(self, rows: Tensor) -> Tensor:
        """Which of these images cannot pay for another look, and for what fp32 may have to judge after it, (n,)."""
        if self.queries is None:
            return torch.zeros_like(rows, dtype=torch.bool)
        return self.forwards[rows] + (3 if self.model.rounds else 1) > self.queries

    def see(
        self, rows: Tensor, task: Task, images: Tensor, value: Tensor, logits: Tensor, passes: tuple[int, int]
    ) -> Seen:
        """Keep what is worth keeping of the images of these rows.

        task: that of these rows; value: the loss, (n,); logits: of the fast copy, (n, K); passes: forward and backward,
        an image.
        """
        adversarial = task.adversarial(logits)
        self.forwards[rows] += passes[0]
        self.backwards[rows] += passes[1]
        self.looks[rows] += 1
        fresh = (adversarial & ~self.success[rows]).nonzero()[:, 0]
        if len(fresh):
            right = self._confirmed(rows[fresh], images[fresh])
            adversarial = adversarial.index_put((fresh,), right)
            fresh = fresh[right]
            confirmed = rows[fresh]
            self.sure[confirmed], self.success[confirmed] = images[fresh], True
            self.first[confirmed] = self.looks[confirmed]
        known = self.is_hit[rows]
        score = -self.norm.distance(images, task.origin) if self.keep == "nearest" else value
        better = (adversarial & ~known) | ((adversarial == known) & (score > self.score[rows]))
        if self.keep == "nearest":
            better &= adversarial
        self.best[rows] = torch.where(better[:, None, None, None], images, self.best[rows])
        self.score[rows] = torch.where(better, score, self.score[rows])
        self.is_near[rows] = torch.where(better, self._is_near(task, logits), self.is_near[rows])
        self.is_hit[rows] = known | better & adversarial
        self.is_confirmed[rows] &= ~(better & adversarial)
        return Seen(adversarial, len(fresh) > 0)

    def _is_near(self, task: Task, logits: Tensor) -> Tensor:
        """Where the fast copy is not sure enough for fp32 to be of the same opinion in any case."""
        lacking = task.confidence - margin(logits, task.labels, task.target)
        return lacking <= 2 * ROUNDING_TOLERANCE * (logits.amax(dim=1) - logits.amin(dim=1))

    def _judged(self, rows: Tensor, images: Tensor) -> Tensor:
        """Whether the original, in fp32, calls these images adversarial."""
        self.forwards[rows] += 1
        return self.task[rows].adversarial(self.model.judge(images))

    def _confirmed(self, rows: Tensor, images: Tensor) -> Tensor:
        """The same for images that the search has called so."""
        return self._judged(rows, images) if self.model.rounds else torch.ones_like(rows, dtype=torch.bool)

    def settle(self) -> None:
        """Let fp32 judge the best images; one that it does not confirm gives way to the last that it did."""
        rows = (~self.is_confirmed).nonzero()[:, 0]
        if not len(rows):
            return
        right = self._confirmed(rows, self.best[rows])
        confirmed, lost = rows[right], rows[~right]
        self.sure[confirmed] = self.best[confirmed]
        self.best[lost] = self.sure[lost]
        if self.keep == "nearest":
            self.score[lost] = -self.norm.distance(self.sure[lost], self.task.origin[lost])
        self.is_confirmed[rows] = True

    def polish(self) -> None:
        """Move the best images along the line from their origin to where fp32 just calls them adversarial.

        The fast copy's boundary is not quite the original's. What it called nearest may lie a little short of it, and
        is pushed over; then the last tenth of the way is bisected.
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
            right = self._judged(rows[missing], pushed)
            reach[missing[right]] = factor
        lost = reach.isinf()
        change = torch.where(lost[:, None, None, None], self.sure[rows] - origin, change)
        high = torch.where(lost, 1.0, reach)
        low = 0.9 * high
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            right = self._judged(rows, (origin + middle[:, None, None, None] * change).clamp_(0, 1))
            low, high = torch.where(right, low, middle), torch.where(right, middle, high)
        self.best[rows] = (origin + high[:, None, None, None] * change).clamp_(0, 1)
        self.sure[rows] = self.best[rows]
        self.is_confirmed[rows] = True

    def result(self) -> AttackResult:
        """What was found, judged in fp32 on the original."""
        if self.keep != "first":
            self.settle()
        missed = (~self.success & self.is_near).nonzero()[:, 0]
        if len(missed) and self.keep != "nearest" and self.model.rounds:  # what the fast copy may not have seen
            late = missed[self._judged(missed, self.best[missed])]
            self.success[late], self.sure[late], self.first[late] = True, self.best[late], self.looks[late]
        images = torch.where(self.success[:, None, None, None], self.sure, self.best)
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


def climb(
    model: Frozen,
    record: Record,
    search: Search,
    rows: Tensor,
    *,
    steps: int,
    samples: int = 1,
) -> None:
    """Let a search take up to `steps` steps from where it is; what it sees goes into the record.

    rows: which of the record's images the search is about, in its order. samples: passes a look (EOT). Where the record
    counts queries, there are no gradients, and it ends with the budget.
    """
    blind = record.queries is not None
    for _ in range(steps):
        if blind:
            slope = model.level(search.current, search.ascended)
        else:
            slope = model.slope(search.current, search.ascended, samples=samples)
        backwards = 0 if blind else samples
        seen = record.see(rows, search.task, search.current, slope.value, slope.logits, (samples, backwards))
        gone = search.move(slope, seen.adversarial)
        if seen.any_first and record.keep == "first":
            done = record.success[rows]
            gone = done if gone is None else gone | done
        if blind:
            gone = record.spent(rows) if gone is None else gone | record.spent(rows)
        if gone is not None and gone.any():
            stay = (~gone).nonzero()[:, 0]
            if not len(stay):
                return
            rows = rows[stay]
            search.take(stay)
    logits = model.answer(search.current)
    record.see(rows, search.task, search.current, search.ascended(logits), logits, (1, 0))


def in_batches(
    classifier: Classifier,
    task: Task,
    batch_size: int,
    runtime: Runtime,
    attack: Callable[[Frozen, Task], AttackResult],
) -> AttackResult:
    """Run an attack batch by batch; each is moved to the device, and its result back.

    classifier: a module, which is prepared (`frozen`), or anything that answers images. Where memory runs out, a batch
    is tried again at half its size, down to one image. Raises InputError.
    """
    images = task.origin
    if not (len(images) == len(task.labels) == len(task.ids)) or images.ndim != 4:
        raise InputError(
            f"{tuple(images.shape)} images, {len(task.labels)} labels and {len(task.ids)} ids do not fit.",
            "Give images (N, C, H, W), and a label each.",
        )
    if task.target is not None and len(task.target) != len(images):
        raise InputError(f"{len(task.target)} targets for {len(images)} images.", "Give one each.")
    check_range(float(images.min()), float(images.max()), "the images to attack")
    parts: list[AttackResult] = []
    with ExitStack() as prepared:
        if isinstance(classifier, nn.Module):
            model = prepared.enter_context(frozen(classifier, images, runtime))
        else:
            model = asked(classifier, runtime)
        start = 0
        while start < len(images):
            rows = slice(start, start + batch_size)
            try:
                found = attack(model, task[rows].to(runtime.device))
            except RuntimeError as error:
                if not _is_out_of_memory(error) or batch_size == 1:
                    raise
                batch_size = max(1, min(batch_size, len(images) - start) // 2)
                continue
            parts.append(AttackResult(*(getattr(found, name).cpu() for name in AttackResult.__slots__)))
            start += batch_size
    return AttackResult.join(parts)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
