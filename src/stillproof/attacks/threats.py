"""What an attacker may change: the ball around an image, with its projection, start and steepest ascent."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from stillproof.core.noise import Noise
from stillproof.errors import InputError


class Norm(Protocol):
    """How long a change of an image is. Images and changes are float32, (n, C, H, W)."""

    def distance(self, images: Tensor, origin: Tensor) -> Tensor:
        """How far each image is from its origin, (n,)."""

    def cut(self, change: Tensor, radius: Tensor) -> Tensor:
        """The nearest changes of at most these lengths, (n,)."""

    def dual(self, gradient: Tensor) -> Tensor:
        """What a change of length 1 gains at the most, (n,)."""


@runtime_checkable
class Ball(Protocol):
    """The images that a threat allows around others, of [0, 1]; computed once for a search."""

    def project_(self, images: Tensor) -> Tensor:
        """The nearest images within, in place."""

    def __getitem__(self, rows: Tensor) -> Ball:
        """The balls around some of the images."""


class Threat(Norm, Protocol):
    """A ball in pixel space. Images are float32 in [0, 1], (n, C, H, W)."""

    @property
    def epsilon(self) -> float:
        """The radius."""

    def around(self, origin: Tensor) -> Ball:
        """The balls around these images."""

    def project(self, images: Tensor, origin: Tensor) -> Tensor:
        """Images within the ball around `origin` and within [0, 1]: Linf, the nearest; L2, cut to the ball and then to
        [0, 1], which leaves it no farther out."""

    def random_start(self, origin: Tensor, noise: Noise) -> Tensor:
        """Random images of the ball."""

    def steepest(self, gradient: Tensor) -> Tensor:
        """The direction of length 1 in which a step of this norm gains the most."""


@dataclass(frozen=True, slots=True)
class _Box:
    low: Tensor
    high: Tensor

    def project_(self, images: Tensor) -> Tensor:
        return images.clamp_(self.low, self.high)

    def __getitem__(self, rows: Tensor) -> _Box:
        return _Box(self.low[rows], self.high[rows])


@dataclass(frozen=True, slots=True)
class _Sphere:
    origin: Tensor
    threat: L2

    def project_(self, images: Tensor) -> Tensor:
        change = images.sub_(self.origin)
        radius = torch.full((len(change),), self.threat.epsilon, device=change.device)
        # the cut to [0, 1] moves pixels towards the origin, so it cannot leave the ball
        return self.threat.cut(change, radius).add_(self.origin).clamp_(0, 1)

    def __getitem__(self, rows: Tensor) -> _Sphere:
        return _Sphere(self.origin[rows], self.threat)


@dataclass(frozen=True, slots=True)
class Linf:
    """No pixel changes by more than epsilon."""

    epsilon: float

    def __post_init__(self) -> None:
        _check(self.epsilon)

    def around(self, origin: Tensor) -> Ball:
        return _Box((origin - self.epsilon).clamp_(min=0), (origin + self.epsilon).clamp_(max=1))

    def project(self, images: Tensor, origin: Tensor) -> Tensor:
        return self.around(origin).project_(images.clone())

    def random_start(self, origin: Tensor, noise: Noise) -> Tensor:
        shift = noise.uniform(tuple(origin.shape[1:]), stream="start") * 2 - 1
        return self.project(origin + self.epsilon * shift, origin)

    def steepest(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def distance(self, images: Tensor, origin: Tensor) -> Tensor:
        return (images - origin).abs().amax(dim=(1, 2, 3))

    def cut(self, change: Tensor, radius: Tensor) -> Tensor:
        return torch.clamp(change, -per_image(radius), per_image(radius))

    def dual(self, gradient: Tensor) -> Tensor:
        return gradient.abs().sum(dim=(1, 2, 3))


@dataclass(frozen=True, slots=True)
class L2:
    """The Euclidean length of the change is at most epsilon."""

    epsilon: float

    def __post_init__(self) -> None:
        _check(self.epsilon)

    def around(self, origin: Tensor) -> Ball:
        return _Sphere(origin, self)

    def project(self, images: Tensor, origin: Tensor) -> Tensor:
        return self.around(origin).project_(images.clone())

    def random_start(self, origin: Tensor, noise: Noise) -> Tensor:
        direction = noise.normal(tuple(origin.shape[1:]), stream="direction")
        radius = noise.uniform(stream="radius") ** (1 / math.prod(origin.shape[1:]))
        return self.project(origin + self.epsilon * per_image(radius) * self.steepest(direction), origin)

    def steepest(self, gradient: Tensor) -> Tensor:
        return unit(gradient)

    def distance(self, images: Tensor, origin: Tensor) -> Tensor:
        return _lengths(images - origin)

    def cut(self, change: Tensor, radius: Tensor) -> Tensor:
        lengths = _lengths(change).clamp_min(torch.finfo(torch.float32).tiny)
        return change * per_image(torch.clamp(radius / lengths, max=1.0))

    def dual(self, gradient: Tensor) -> Tensor:
        return _lengths(gradient)


def per_image(values: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1, 1), so that each image gets its own."""
    return values.view(-1, 1, 1, 1)


def unit(changes: Tensor) -> Tensor:
    """Each change at Euclidean length 1, (n, C, H, W); what is zero stays zero."""
    tiny = torch.finfo(torch.float32).tiny
    # scaled first: the squares of a distilled model's gradients underflow
    scaled = changes / changes.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
    return scaled / per_image(_lengths(scaled)).clamp_min(tiny)


def _lengths(change: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(change, dim=(1, 2, 3))
    return lengths


def _check(epsilon: float) -> None:
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise InputError(f"epsilon={epsilon} is no radius.", "Give a finite number, 0 or more, such as 8/255.")


NormName = Literal["linf", "l2"]

NORMS: Mapping[NormName, Norm] = {"linf": Linf(0), "l2": L2(0)}
"""For attacks that look for the smallest change, and know no epsilon."""


def parse_threat(text: str) -> Linf | L2:
    """`linf:8/255` or `l2:0.5`. Raises InputError."""
    found = re.fullmatch(r"(linf|l2):([0-9.]+(?:e-?[0-9]+)?)(?:/([0-9.]+))?", text.strip().lower())
    try:
        if found:
            epsilon = float(found[2]) / float(found[3] or 1)
            return Linf(epsilon) if found[1] == "linf" else L2(epsilon)
    except (ValueError, ZeroDivisionError):
        pass
    raise InputError(f"{text!r} is no threat.", "Write linf:8/255 or l2:0.5.")
