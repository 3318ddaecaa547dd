"""Square, which only asks, and needs scores. It takes a module, or anything that answers images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from stillproof.attacks.attack import QueryAttack
from stillproof.attacks.driver import State, climb
from stillproof.attacks.frozen import Frozen, Slope
from stillproof.attacks.losses import margin
from stillproof.attacks.record import AttackResult, Record, Task
from stillproof.attacks.threats import L2, Linf, Threat, per_image, unit
from stillproof.core.noise import Noise, derive
from stillproof.errors import InputError

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10 000 queries: after how many Square halves the share of the image that it changes."""


@dataclass(frozen=True, kw_only=True)
class Square(QueryAttack):
    """Random squares, each kept if the margin rises (Andriushchenko et al. 2020, arXiv 1912.00049).

    first_share: of the pixels, in the first square. Every image has squares and places of its own. A classifier in
    memory is asked in fp32, whatever the runtime's precision: what bf16 sees of a small square is mostly rounding.
    """

    threat: Threat = field(default_factory=lambda: Linf(8 / 255))
    first_share: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.first_share <= 1 or not isinstance(self.threat, Linf | L2):
            raise InputError(f"{self} cannot run.", "Give a first share in (0, 1], and linf or l2.")

    def attack(self, model: Frozen, task: Task, seed: int) -> AttackResult:
        model = model.in_fp32()
        record = Record(model, task, self.threat, "first", queries=self.queries)
        rows = record.open()
        rows = rows[~record.spent(rows)]
        if len(rows):
            kind = _LinfSquares if isinstance(self.threat, Linf) else _L2Squares
            search = kind.begin(task[rows], self, derive(seed, "square"))
            climb(model, record, search, rows, steps=self.queries)
        return record.result()


@dataclass
class _Squares(State, ABC):
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
        self.best = torch.where(per_image(better), self.current, self.best)
        self.best_value = torch.where(better, slope.value, self.best_value)
        self.number += 1
        self.current = self.proposed(self.noise())

    @abstractmethod
    def start(self, noise: Noise) -> Tensor:
        """Where the search begins, (n, C, H, W)."""

    @abstractmethod
    def proposed(self, noise: Noise) -> Tensor:
        """The best so far with a square changed in each image, (n, C, H, W)."""

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
        down, across = height // side, width // side
        top, left = (height - side * down) // 2, (width - side * across) // 2
        tiles = self.signs(noise, (channels, down, across), "tiles")[..., None, None] * _pyramids(side, change.device)
        filled = tiles.transpose(3, 4).reshape(len(change), channels, down * side, across * side)
        change[:, :, top : top + down * side, left : left + across * side] = filled
        return self._on_the_sphere(change)

    def proposed(self, noise: Noise) -> Tensor:
        n, channels = self.best.shape[:2]
        epsilon = self.settings.threat.epsilon
        least = self.side(least=3)
        side = min(least + 1 - least % 2, *self.best.shape[2:])  # odd, so that the pyramids have a middle
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
        return (self.task.origin + self.settings.threat.epsilon * unit(change)).clamp_(0, 1)


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
