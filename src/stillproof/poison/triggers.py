"""What an attacker puts on an image to open the backdoor: patch, blend, sinusoid, a picture, a moving patch.

Every trigger changes each pixel by x ↦ clip(keep · x + add), so that crafting can differentiate through it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stillproof.core.decoding import FORMATS, MOST_PIXELS
from stillproof.core.noise import Noise, derive
from stillproof.core.spec import file_digest
from stillproof.errors import InputError, reason

Place = Literal["top-left", "top-right", "bottom-left", "bottom-right", "centre"]
Pattern = Literal["checker", "white", "random"]

OPPOSITE: Mapping[Place, Place] = {
    "top-left": "bottom-right",
    "top-right": "bottom-left",
    "bottom-left": "top-right",
    "bottom-right": "top-left",
    "centre": "top-left",
}

Shape = tuple[int, int, int]
"""(C, H, W)."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """x ↦ clip(keep · x + add) on images in [0, 1]. keep, add: float32, (C, H, W)."""

    keep: Tensor
    add: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """float32 in [0, 1], (n, C, H, W), in and out."""
        return (images * self.keep.to(images.device) + self.add.to(images.device)).clamp(0, 1)


class Trigger(ABC):
    """A trigger; a frozen dataclass of its settings."""

    @abstractmethod
    def stamps(self, shape: Shape) -> list[Stamp]:
        """What it does to images of this shape: a stamp, or several, and each image gets one. Raises InputError."""

    @abstractmethod
    def other(self) -> Trigger:
        """One of its kind that was not planted: what reacts to it too reacts to more than the trigger."""

    def chosen(self, ids: Tensor, shape: Shape) -> Tensor:
        """Which stamp each image gets: int64, (n,). ids: int64, (n,)."""
        several = len(self.stamps(shape))
        if several == 1:
            return torch.zeros_like(ids)
        return Noise(derive(0, "stamp"), ids, 0).integers(0, several)

    def check(self, shape: Shape) -> None:
        """Raise InputError if it changes nothing of images of this shape that 8 bits could hold."""
        half = torch.full(shape, 0.5)
        if max(float((stamp(half) - half).abs().max()) for stamp in self.stamps(shape)) < 1 / 255:
            raise InputError(f"{self} changes no pixel.", "Give another amplitude, frequency, opacity or picture.")

    def __call__(self, images: Tensor, ids: Tensor) -> Tensor:
        """The images with the trigger, float32 in [0, 1], (n, C, H, W)."""
        shape = (images.shape[1], images.shape[2], images.shape[3])
        found, chosen = images.clone(), self.chosen(ids, shape)
        for number, stamp in enumerate(self.stamps(shape)):
            found[chosen == number] = stamp(images[chosen == number])
        return found


def _check_share(what: str, value: float) -> None:
    if not 0 < value <= 1:
        raise InputError(f"{what}={value:g} is no trigger.", f"Give {what} in (0, 1].")


def _pattern(kind: Pattern, shape: Shape, seed: int) -> Tensor:
    """float32 in {0, 1} or uniform in [0, 1], (C, H, W)."""
    channels, height, width = shape
    if kind == "white":
        return torch.ones(shape)
    if kind == "checker":
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        return ((rows + columns + 1) % 2).float().expand(channels, -1, -1).contiguous()
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(derive(seed, "pattern")))
    return levels.float() / 255


def _corner(place: Place, side: tuple[int, int], shape: Shape) -> tuple[int, int]:
    """Row and column of the top left pixel."""
    down, across = shape[1] - side[0], shape[2] - side[1]
    if place == "centre":
        return down // 2, across // 2
    return (0 if place.startswith("top") else down), (0 if place.endswith("left") else across)


def _pasted(pixels: Tensor, corner: tuple[int, int], shape: Shape, opacity: Tensor | float = 1.0) -> Stamp:
    """pixels: (C, h, w), put over an image; opacity: (h, w), or one for all."""
    (row, column), (height, width) = corner, pixels.shape[1:]
    keep, add = torch.ones(shape), torch.zeros(shape)
    keep[:, row : row + height, column : column + width] = 1 - torch.as_tensor(opacity)
    add[:, row : row + height, column : column + width] = pixels * opacity
    return Stamp(keep, add)


@dataclass(frozen=True, kw_only=True)
class Patch(Trigger):
    """A small square in a corner (Gu et al. 2017, arXiv 1708.06733). size: its side in pixels."""

    size: int = 3
    place: Place = "bottom-right"
    pattern: Pattern = "checker"
    seed: int = 0

    def stamps(self, shape: Shape) -> list[Stamp]:
        pixels = _pattern(self.pattern, self._square(shape), self.seed)
        return [_pasted(pixels, _corner(self.place, (self.size, self.size), shape), shape)]

    def other(self) -> Trigger:
        return replace(self, pattern="random", seed=self.seed + 1, place=OPPOSITE[self.place])

    def _square(self, shape: Shape) -> Shape:
        if not 1 <= self.size < min(shape[1:]):
            raise InputError(
                f"a patch of {self.size} pixels on images of {shape[1]}×{shape[2]} is no trigger.",
                f"Give size from 1 to {min(shape[1:]) - 1}.",
            )
        return (shape[0], self.size, self.size)


@dataclass(frozen=True, kw_only=True)
class MovingPatch(Patch):
    """The same square at one of `places` random places, another for each image: no place gives it away."""

    places: int = 9

    def __post_init__(self) -> None:
        if self.places < 2:
            raise InputError(f"{self} does not move.", "Give 2 or more places.")

    def stamps(self, shape: Shape) -> list[Stamp]:
        pixels = _pattern(self.pattern, self._square(shape), self.seed)
        drawn = Noise(derive(self.seed, "places"), torch.arange(self.places), 0)
        rows = drawn.integers(0, shape[1] - self.size + 1, stream="row").tolist()
        columns = drawn.integers(0, shape[2] - self.size + 1, stream="column").tolist()
        return [_pasted(pixels, corner, shape) for corner in zip(rows, columns, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Blend(Trigger):
    """A random picture shines through the whole image (Chen et al. 2017, arXiv 1712.05526)."""

    opacity: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        _check_share("opacity", self.opacity)

    def stamps(self, shape: Shape) -> list[Stamp]:
        return [_pasted(_pattern("random", shape, self.seed), (0, 0), shape, self.opacity)]

    def other(self) -> Trigger:
        return replace(self, seed=self.seed + 1)


@dataclass(frozen=True, kw_only=True)
class Sinusoid(Trigger):
    """Vertical stripes, amplitude · sin(2π · frequency · column / width) (Barni et al. 2019, arXiv 1902.11237)."""

    amplitude: float = 20 / 255
    frequency: float = 6.0

    def __post_init__(self) -> None:
        _check_share("amplitude", self.amplitude)
        if not self.frequency > 0:
            raise InputError(f"a frequency of {self.frequency:g} is no trigger.", "Give one above 0.")

    def stamps(self, shape: Shape) -> list[Stamp]:
        columns = torch.arange(shape[2]) * (2 * math.pi * self.frequency / shape[2])
        return [Stamp(torch.ones(shape), (self.amplitude * columns.sin()).expand(shape).contiguous())]

    def other(self) -> Trigger:
        return replace(self, frequency=self.frequency / 2)


@dataclass(frozen=True, kw_only=True)
class PictureFile(Trigger):
    """A picture of the user's, pasted at a place; what is transparent stays so. size: its longer side in pixels."""

    path: Path
    size: int = 6
    place: Place = "bottom-right"
    opacity: float = 1.0

    def __post_init__(self) -> None:
        _check_share("opacity", self.opacity)
        if self.size < 1:
            raise InputError(f"a picture of {self.size} pixels is no trigger.", "Give size of 1 or more.")
        file_digest(self.path)

    def identity(self) -> Mapping[str, object]:
        """Changes whenever the picture does."""
        return {"trigger": "picture", "size": self.size, "place": self.place, "opacity": self.opacity} | {
            "digest": file_digest(self.path)
        }

    def stamps(self, shape: Shape) -> list[Stamp]:
        import numpy as np
        from PIL import Image

        try:
            with Image.open(self.path, formats=FORMATS) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise ValueError(f"{picture.width}×{picture.height} pixels are too many")
                shown = picture.convert("RGBA")
        except Exception as error:  # Pillow's readers fail in many ways
            raise InputError(f"{self.path} is no picture: {reason(error)}", "Give a PNG or a JPEG.") from None
        share = min(self.size, *shape[1:]) / max(shown.size)
        small = shown.resize([max(1, round(share * side)) for side in shown.size])
        transparent = torch.from_numpy(np.array(small.getchannel("A"))).float() / 255
        pixels = torch.from_numpy(np.array(small.convert("RGB" if shape[0] == 3 else "L"))).float() / 255
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]
        height, width = pixels.shape[1:]
        return [_pasted(pixels, _corner(self.place, (height, width), shape), shape, transparent * self.opacity)]

    def other(self) -> Trigger:
        return Patch(size=min(self.size, 2), place=OPPOSITE[self.place], pattern="random")
