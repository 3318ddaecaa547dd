"""Attacks that only ask: Square, which needs scores, and HopSkipJump, which needs labels.

They take a module, or anything that answers images with logits or labels, and count every image they ask about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from stillproof.attacks.attack import QueryAttack
from stillproof.attacks.driver import State, climb
from stillproof.attacks.frozen import Frozen, Slope
from stillproof.attacks.losses import margin
from stillproof.attacks.record import POLISHING, AttackResult, Record, Task
from stillproof.attacks.threats import L2, NORMS, Linf, NormName, Threat
from stillproof.core.noise import Noise, derive
from stillproof.errors import InputError

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10 000 queries: after how many Square halves the share of the image that it changes."""


@dataclass(frozen=True, kw_only=True)
class Square(QueryAttack):
    """Random squares, each kept if the margin rises (Andriushchenko et al. 2020, arXiv 1912.00049).

    first_share: of the pixels, in the first square. Every image has squares and places of its own.
    """

    threat: Threat = field(default_factory=lambda: Linf(8 / 255))
    first_share: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.first_share <= 1 or not isinstance(self.threat, Linf | L2):
            raise InputError(f"{self} cannot run.", "Give a first share in (0, 1], and linf or l2.")

    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        record = Record(model, task, self.threat, "first", queries=self.queries)
        rows = record.open()
        rows = rows[~record.spent(rows)]
        if len(rows):
            kind = _LinfSquares if isinstance(self.threat, Linf) else _L2Squares
            search = kind.begin(task[rows], self, derive(seed, "square"))
            climb(model, record, search, rows, steps=self.queries)
        return record.result()


@dataclass
class _Squares(State):
    task: Task
    settings: Square
    seed: int
    current: Tensor
    best: Tensor
    best_value: Tensor
    number: int = 0

    @classmethod
    def begin(cls, task: Task, settings: Square, seed: int) -> _Squares:
        low = torch.full((len(task.origin),), -torch.inf, device=task.origin.device)
        search = cls(task, settings, seed, task.origin, task.origin, low)
        search.current = search.start(search.noise())
        return search

    def noise(self) -> Noise:
        return Noise(self.seed, self.task.ids, self.number)

    def ascended(self, logits: Tensor) -> Tensor:
        return margin(logits, self.task.labels, self.task.target)

    def move(self, slope: Slope, adversarial: Tensor) -> None:  # noqa: ARG002
        better = slope.value > self.best_value
        self.best = torch.where(_wide(better), self.current, self.best)
        self.best_value = torch.where(better, slope.value, self.best_value)
        self.number += 1
        self.current = self.proposed(self.noise())

    def start(self, noise: Noise) -> Tensor:
        raise NotImplementedError

    def proposed(self, noise: Noise) -> Tensor:
        raise NotImplementedError

    def side(self, least: int) -> int:
        """How long the square's sides are by now."""
        _, _, height, width = self.best.shape
        passed = self.number / self.settings.queries * 10_000
        share = self.settings.first_share / 2 ** sum(passed > limit for limit in HALVINGS)
        return min(max(round(math.sqrt(share * height * width)), least), height, width)

    def window(self, noise: Noise, side: int, stream: str) -> tuple[Tensor, Tensor, Tensor]:
        """Where each image's square lies: an index into (n, H, W, C)."""
        n, _, height, width = self.best.shape
        steps = torch.arange(side, device=self.best.device)
        rows = noise.integers(0, height - side + 1, stream=f"{stream} row")[:, None] + steps
        columns = noise.integers(0, width - side + 1, stream=f"{stream} column")[:, None] + steps
        images = torch.arange(n, device=self.best.device)
        return images[:, None, None], rows[:, :, None], columns[:, None, :]

    def signs(self, noise: Noise, shape: tuple[int, ...], stream: str) -> Tensor:
        return noise.integers(0, 2, shape, stream=stream) * 2.0 - 1


class _LinfSquares(_Squares):
    """Squares of ±2ε in each channel, on vertical stripes of ±ε."""

    def start(self, noise: Noise) -> Tensor:
        _, channels, _, width = self.best.shape
        stripes = self.signs(noise, (channels, 1, width), "stripes")
        return (self.task.origin + self.settings.threat.epsilon * stripes).clamp_(0, 1)

    def proposed(self, noise: Noise) -> Tensor:
        epsilon, channels = self.settings.threat.epsilon, self.best.shape[1]
        square = self.window(noise, self.side(least=1), "square")
        moved = self.best.clone(memory_format=torch.channels_last)
        pixels, origin = moved.permute(0, 2, 3, 1), self.task.origin.permute(0, 2, 3, 1)[square]
        shifted = pixels[square] + 2 * epsilon * self.signs(noise, (1, 1, channels), "signs")
        pixels[square] = torch.clamp(shifted, origin - epsilon, origin + epsilon).clamp_(0, 1)
        return moved


class _L2Squares(_Squares):
    """Mass of the change is moved from one square into another, where it takes the shape of two pyramids."""

    def start(self, noise: Noise) -> Tensor:
        _, channels, height, width = self.best.shape
        change = torch.zeros_like(self.best)
        side = max(1, min(height, width) // 5)
        pyramid = _pyramids(side, self.best.device)
        signs = self.signs(noise, (channels, height // side, width // side), "tiles")
        for row in range(height // side):
            for column in range(width // side):
                tile = change[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
                tile += pyramid * signs[:, :, row, column, None, None]
        return self._on_the_sphere(change)

    def proposed(self, noise: Noise) -> Tensor:
        n, channels = self.best.shape[:2]
        epsilon = self.settings.threat.epsilon
        side = self.side(least=3)
        change = (self.best - self.task.origin).clone(memory_format=torch.channels_last)
        pixels = change.permute(0, 2, 3, 1)
        gains, gives = self.window(noise, side, "gains"), self.window(noise, side, "gives")
        taken = torch.zeros(pixels.shape[:3], dtype=torch.bool, device=pixels.device)
        taken[gains] = taken[gives] = True
        unused = (epsilon**2 - pixels.square().sum(dim=(1, 2, 3))).clamp_min(0)
        in_windows = (pixels.square() * taken[..., None]).sum(dim=(1, 2))
        shape = _pyramids(side, pixels.device).expand(n, side, side)
        turned = noise.uniform(stream="turned")[:, None, None] < 0.5
        shape = torch.where(turned, shape.mT, shape)[..., None] * self.signs(noise, (1, 1, channels), "signs")
        old = pixels[gains]
        shape = shape + old / (_channel_norms(old) + 1e-12)
        length = (unused[:, None] / channels + in_windows).sqrt()[:, None, None, :]
        pixels[gives] = 0
        pixels[gains] = shape / (_channel_norms(shape) + 1e-12) * length
        return self._on_the_sphere(change)

    def _on_the_sphere(self, change: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(change, dim=(1, 2, 3)).clamp_min(1e-12)
        found: Tensor = self.task.origin + change * _wide(self.settings.threat.epsilon / length)
        return found.clamp_(0, 1)


def _channel_norms(squares: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(squares, dim=(1, 2), keepdim=True)
    return lengths


@cache
def _pyramids(side: int, device: torch.device) -> Tensor:
    """A pyramid and below it one upside down, of length 1: (side, side)."""
    half = side // 2
    found = torch.cat([_pyramid(half, side), -_pyramid(side - half, side)]).to(device)
    unit: Tensor = found / found.norm().clamp_min(1e-12)
    return unit


def _pyramid(height: int, width: int) -> Tensor:
    """Sum of 1/k² over rectangles that grow from the middle."""
    found = torch.zeros(height, width)
    row, column = height // 2, width // 2
    for number in range(max(height // 2, width // 2) + 1):
        top, left = row - number, column - number
        found[max(top, 0) : max(top + 2 * number + 1, 0), max(left, 0) : max(left + 2 * number + 1, 0)] += (
            1 / (number + 1) ** 2
        )
    unit: Tensor = found / found.norm().clamp_min(1e-12)
    return unit


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(QueryAttack):
    """Walks along the decision boundary; the gradient there is estimated from labels alone.

    first_evaluations: of labels for the first gradient, times √t for the t-th, at most `most_evaluations`; tries:
    random images that are asked about until one is adversarial; precision: of the search for the boundary, over √d
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
    precision: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        least = min(self.steps, self.first_evaluations, self.most_evaluations, self.tries)
        if least < 1 or self.precision <= 0 or self.norm not in NORMS:
            raise InputError(f"{self} cannot run.", "Give 1 or more steps, evaluations and tries, and linf or l2.")

    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        strict = model.strict()  # its bisection ends below what half precision can tell apart
        record = Record(strict, task, NORMS[self.norm], "nearest", queries=self.queries)
        rows = record.open()
        if len(rows):
            _Walk(strict, record, rows, self, derive(seed, "hop skip jump")).go()
        return record.result()


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
        for number in range(self.settings.tries):
            which = (~self.walking & (self._spent() < self.limit)).nonzero()[:, 0]
            if not len(which):
                return
            noise = Noise(self.seed, self.task.ids[which], number)
            images = noise.uniform(tuple(self.origin.shape[1:]), stream="start")
            fell = which[self._ask(which, images)]
            self.current[fell] = images[torch.isin(which, fell)]
            self.walking[fell] = True

    def _between(self, which: Tensor, images: Tensor, share: Tensor) -> Tensor:
        """From the origin to the images: by a share of the way (L2), or of the largest change (Linf)."""
        origin = self.origin[which]
        if self.is_l2:
            return origin + _wide(share) * (images - origin)
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
            images = (self.current[rows] + _wide(length[waiting]) * direction[waiting]).clamp_(0, 1)
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
        at_once = max(1, self.settings.batch_size // len(which))
        for first in range(0, evaluations, at_once):
            samples = range(first, min(first + at_once, evaluations))
            images, changes_here = zip(*(self._near(which, width, number, one) for one in samples), strict=True)
            answers = self.model.answer(torch.cat(images)).chunk(len(samples))
            self.record.forwards[self.rows[which]] += len(samples)
            for answer, change in zip(answers, changes_here, strict=True):
                fell = self.task[which].adversarial(answer).float()
                total += _wide(2 * fell - 1) * change
                changes += change
                fallen += fell
        mean = 2 * fallen / evaluations - 1
        alike = mean.abs() == 1
        found = torch.where(_wide(alike), _wide(mean) * changes, total - _wide(mean) * changes)
        if not self.is_l2:
            return found.sign()
        return found / _wide(torch.linalg.vector_norm(found, dim=(1, 2, 3)).clamp_min(1e-12))

    def _near(self, which: Tensor, width: Tensor, number: int, sample: int) -> tuple[Tensor, Tensor]:
        """Random images around the current ones, and how they differ, in units of the ball's width."""
        noise = Noise(derive(self.seed, "gradient", number), self.task.ids[which], sample)
        shape = tuple(self.origin.shape[1:])
        drawn = noise.normal(shape) if self.is_l2 else noise.uniform(shape) * 2 - 1
        drawn = drawn / _wide(torch.linalg.vector_norm(drawn, dim=(1, 2, 3)))
        images = (self.current[which] + _wide(width) * drawn).clamp_(0, 1)
        return images, (images - self.current[which]) / _wide(width)


LONGEST_SEARCH = 40
"""Halvings of a step until it stays adversarial."""


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]
