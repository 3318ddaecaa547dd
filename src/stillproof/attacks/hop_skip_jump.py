"""HopSkipJump, which only asks, and needs no more than labels. It takes a module, or anything that answers images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stillproof.attacks.attack import QueryAttack
from stillproof.attacks.frozen import Frozen
from stillproof.attacks.losses import margin
from stillproof.attacks.record import POLISHING, AttackResult, Record, Task
from stillproof.attacks.threats import NORMS, NormName, per_image, unit
from stillproof.core.images import check_images
from stillproof.core.noise import Noise, derive
from stillproof.errors import InputError


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(QueryAttack):
    """Walks along the decision boundary; the gradient there is estimated from labels alone.

    first_evaluations: of labels for the first gradient, times √t for the t-th, at most `most_evaluations`; starts:
    images, float32 in [0, 1], (m, C, H, W), that are asked about until one is adversarial (for a targeted attack, some
    of every class); tries: random images after them; precision: of the search for the boundary, over √d
    (L2) or d (Linf), as ART has it, and the size of the ball that a gradient is estimated in, over the distance.
    Stops after `steps`, or where the next step might take more than is left of `queries`.
    Source: Chen et al. 2020, arXiv 1904.02144.
    """

    norm: NormName = "l2"
    steps: int = 50
    queries: int = 25_000
    first_evaluations: int = 100
    most_evaluations: int = 10_000
    tries: int = 100
    starts: Tensor | None = field(default=None, repr=False, compare=False)
    precision: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        least = min(self.steps, self.first_evaluations, self.most_evaluations, self.tries)
        if least < 1 or self.precision <= 0 or self.norm not in NORMS:
            raise InputError(f"{self} cannot run.", "Give 1 or more steps, evaluations and tries, and linf or l2.")
        if self.starts is not None:
            check_images(self.starts, "the images to start from")

    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        if self.starts is not None and self.starts.shape[1:] != task.origin.shape[1:]:
            raise InputError(
                f"images of shape {tuple(task.origin.shape[1:])}, and starts of {tuple(self.starts.shape[1:])}.",
                "Start from images of the same shape.",
            )
        # its bisection ends below what half precision can tell apart; a folded copy is faster, but the original's last
        # word about what it found is paid for in queries
        model = model.in_fp32() if self.queries >= FOLDED_FROM else model.strict()
        record = Record(model, task, NORMS[self.norm], "nearest", queries=self.queries)
        rows = record.open()
        if len(rows):
            _Walk(model, record, rows, self, derive(seed, "hop skip jump")).go()
        return record.result()


FOLDED_FROM = 2000
"""Queries from which a few for the original's judgement do not matter."""

FIRST_WIDTH = 0.1
"""Radius of the ball that the first gradient is estimated in."""


class _Walk:
    """HopSkipJump on the images of a batch, all in step; an image that cannot pay for a question is left out."""

    def __init__(self, model: Frozen, record: Record, rows: Tensor, settings: HopSkipJump, seed: int) -> None:
        self.model, self.record, self.rows, self.settings, self.seed = model, record, rows, settings, seed
        self.task = record.task[rows]
        self.origin = self.task.origin
        self.pixels = math.prod(self.origin.shape[1:])
        self.is_l2 = settings.norm == "l2"
        self.theta = settings.precision / (math.sqrt(self.pixels) if self.is_l2 else self.pixels)
        self.norm = NORMS[settings.norm]
        self.limit = settings.queries - (1 + POLISHING if record.judges_again else 0)
        self.current = self.origin.clone()
        self.walking = torch.zeros_like(self.task.labels, dtype=torch.bool)

    def go(self) -> None:
        """Find a start for each image, then walk."""
        self._start()
        self._to_boundary(self.walking)
        for number in range(1, self.settings.steps + 1):
            self._hop(number)
            if not self.walking.any():
                break
        if self.record.judges_again:
            self.record.polish()

    def _spent(self) -> Tensor:
        return self.record.forwards[self.rows]

    def _ask(self, which: Tensor, images: Tensor) -> Tensor:
        """Whether images, one of each of these, are adversarial; a question an image."""
        task = self.task[which]
        logits = self.model.answer(images)
        value = margin(logits, task.labels, task.target)
        return self.record.see(self.rows[which], task, images, value, logits, (1, 0)).adversarial

    def _start(self) -> None:
        starts = self.settings.starts if self.settings.starts is not None else self.origin[:0]
        for number in range(len(starts) + self.settings.tries):
            which = (~self.walking & (self._spent() < self.limit)).nonzero()[:, 0]
            if not len(which):
                return
            if number < len(starts):
                images = starts[number].to(self.origin.device).expand_as(self.origin[which])
            else:
                noise = Noise(self.seed, self.task.ids[which], number - len(starts))
                images = noise.uniform(tuple(self.origin.shape[1:]), stream="start")
            fell = which[self._ask(which, images)]
            self.current[fell] = images[torch.isin(which, fell)]
            self.walking[fell] = True

    def _between(self, which: Tensor, images: Tensor, share: Tensor) -> Tensor:
        """From the origin to the images: by a share of the way (L2), or of the largest change (Linf)."""
        origin = self.origin[which]
        if self.is_l2:
            return origin + per_image(share) * (images - origin)
        return origin + self.norm.cut(images - origin, share * self.norm.distance(images, origin))

    def _to_boundary(self, which_mask: Tensor) -> None:
        """Bisect from the adversarial image towards its origin, until the bracket is narrower than the precision."""
        which = which_mask.nonzero()[:, 0]
        ends = self.current[which]
        high = torch.ones(len(which), device=ends.device)
        low = torch.zeros_like(high)
        while True:
            wide = ((high - low > self.theta) & (self._spent()[which] < self.limit)).nonzero()[:, 0]
            if not len(wide):
                break
            middle = (high[wide] + low[wide]) / 2
            fell = self._ask(which[wide], self._between(which[wide], ends[wide], middle))
            high[wide] = torch.where(fell, middle, high[wide])
            low[wide] = torch.where(fell, low[wide], middle)
        self.current[which] = self._between(which, ends, high)

    def _hop(self, number: int) -> None:
        distance = self.norm.distance(self.current, self.origin)
        evaluations = int(min(self.settings.first_evaluations * math.sqrt(number), self.settings.most_evaluations))
        self.walking &= (self._spent() + evaluations + 1 <= self.limit) & (distance > 0)
        which = self.walking.nonzero()[:, 0]
        if not len(which):
            return
        far = distance[which]
        width = FIRST_WIDTH + torch.zeros_like(far) if number == 1 else self.settings.precision * far
        direction = self._direction(which, width, evaluations, number)
        length = far / math.sqrt(number)
        stepped = torch.zeros_like(self.walking)
        waiting = torch.arange(len(which), device=far.device)
        for _ in range(LONGEST_SEARCH):
            waiting = waiting[self._spent()[which[waiting]] < self.limit]
            if not len(waiting):
                break
            rows = which[waiting]
            images = (self.current[rows] + per_image(length[waiting]) * direction[waiting]).clamp_(0, 1)
            fell = self._ask(rows, images)
            self.current[rows[fell]] = images[fell]
            stepped[rows[fell]] = True
            waiting = waiting[~fell]
            length = length / 2
        self._to_boundary(stepped)

    def _direction(self, which: Tensor, width: Tensor, evaluations: int, number: int) -> Tensor:
        """The gradient of the boundary, estimated from how many of the images around the current one fall."""
        total = torch.zeros_like(self.origin[which])
        changes = torch.zeros_like(total)
        fallen = torch.zeros(len(which), device=total.device)
        at_once = max(1, (self.settings.batch_size or self.model.runtime.images_at_once) // len(which))
        for first in range(0, evaluations, at_once):
            samples = range(first, min(first + at_once, evaluations))
            images, changes_here = zip(*(self._near(which, width, number, one) for one in samples), strict=True)
            answers = self.model.answer(torch.cat(images)).chunk(len(samples))
            self.record.forwards[self.rows[which]] += len(samples)
            for answer, change in zip(answers, changes_here, strict=True):
                fell = self.task[which].adversarial(answer).float()
                total += per_image(2 * fell - 1) * change
                changes += change
                fallen += fell
        mean = 2 * fallen / evaluations - 1
        alike = mean.abs() == 1
        found = torch.where(per_image(alike), per_image(mean) * changes, total - per_image(mean) * changes)
        if not self.is_l2:
            return found.sign()
        return unit(found)

    def _near(self, which: Tensor, width: Tensor, number: int, sample: int) -> tuple[Tensor, Tensor]:
        """Random images around the current ones, and how they differ, in units of the ball's width."""
        noise = Noise(derive(self.seed, "gradient", number), self.task.ids[which], sample)
        shape = tuple(self.origin.shape[1:])
        drawn = noise.normal(shape) if self.is_l2 else noise.uniform(shape) * 2 - 1
        drawn = drawn / per_image(torch.linalg.vector_norm(drawn, dim=(1, 2, 3)))
        images = (self.current[which] + per_image(width) * drawn).clamp_(0, 1)
        return images, (images - self.current[which]) / per_image(width)


LONGEST_SEARCH = 40
"""Halvings of a step until it stays adversarial."""
