"""Encoded pictures -> uint8 images of one size. Raster formats alone; a damaged picture is named by its place."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from stillproof.core.runtime import cores
from stillproof.errors import InputError, reason

Array = npt.NDArray[Any]
Encoded = bytes | Path | None
Place = Callable[[int], str]
"""Says in a message where the n-th picture is."""

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
"""What is decoded: raster formats alone (others, EPS for one, start other programs)."""

MOST_SIDE = 4096
"""The largest ?size= that pictures are scaled to."""

MOST_PIXELS = 2**26
"""A picture of more is refused before its pixels are unpacked: some small files unpack to more than memory."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """How pictures of one set become images of one shape.

    shape: (C, H, W) of every image; resize: scale the shorter side and crop the centre, instead of refusing
    pictures of another size; mixed: make colour grey if C is 1, instead of refusing it.
    """

    shape: tuple[int, int, int]
    resize: bool
    mixed: bool

    @classmethod
    def for_pictures_like(cls, first: Encoded, place: str, size: int = 0, channels: int = 0) -> Decoder:
        """The decoder of a set that begins with this picture. Raises InputError.

        size: scale to size×size; 0 keeps the size. channels: 1 or 3; 0 is 1 if the first picture is grey, else 3.
        """
        if not 0 <= size <= MOST_SIDE or channels not in (0, 1, 3):
            raise InputError(
                f"size={size}, channels={channels} are no images.", f"Give a size of 1 to {MOST_SIDE}, 1 or 3 channels."
            )
        with _picture(first, place) as picture:
            width, height = (size, size) if size else picture.size
            grey = picture.mode in ("1", "L")
        return cls((channels or (1 if grey else 3), height, width), bool(size), bool(channels))

    def decode(self, pictures: Sequence[Encoded], place: Place) -> Tensor:
        """Decode in parallel: uint8, (n, C, H, W). Raises InputError, naming the picture."""
        channels, height, width = self.shape
        images = np.empty((len(pictures), height, width, channels), np.uint8)

        def decode(row: int) -> None:
            images[row] = self._decoded(pictures[row], place(row))

        with ThreadPoolExecutor(max_workers=cores()) as pool:
            for _ in pool.map(decode, range(len(pictures)), chunksize=256):
                pass
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def _decoded(self, data: Encoded, place: str) -> Array:
        channels, height, width = self.shape
        with _picture(data, place) as picture:
            if not self.resize and picture.size != (width, height):
                raise InputError(
                    f"image sizes differ: {(height, width)} in the first, {picture.size[::-1]} in {place}.",
                    "Resize the images to one size first, or add ?size=PIXELS to the SPEC.",
                )
            if channels == 1 and not self.mixed and picture.mode not in ("1", "L"):
                raise InputError(
                    f"the first image is grey, and {place} is in colour ({picture.mode}).",
                    "Add ?channels=3 or ?channels=1 to the SPEC.",
                )
            pixels = picture.convert("L" if channels == 1 else "RGB")
            pixels = _scaled(pixels, width) if self.resize else pixels
            return np.asarray(pixels).reshape(height, width, channels)


@contextmanager
def _picture(data: Encoded, place: str) -> Iterator[Image.Image]:
    if data is None:
        raise InputError(f"there is no image ({place}).", "Leave that row out.")
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise InputError(
                    f"a picture of {picture.width}×{picture.height} pixels is refused ({place}).",
                    f"Scale it down: at most {MOST_PIXELS // 2**20} megapixels are unpacked.",
                )
            if picture.mode.startswith(("I", "F")):
                raise InputError(f"an image has more than 8 bits a channel ({place}).", "Convert the images to 8 bits.")
            yield picture
    except InputError:
        raise
    except Exception as error:  # a damaged image can fail in any way
        raise InputError(f"an image cannot be decoded: {reason(error)} ({place}).", "Mend or remove it.") from None


def _scaled(picture: Image.Image, size: int) -> Image.Image:
    """The shorter side scaled to `size`, the centre cut out; smoothed where it shrinks."""
    side = min(picture.size)
    left, top = ((length - side) / 2 for length in picture.size)
    return picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
