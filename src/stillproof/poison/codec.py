"""The codec that a set of images came through, and passing others through the same one.

Images that alone lack what a codec leaves behind are found by that, which says nothing of the rest of a scanner.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stillproof.core.images import ImageSet
from stillproof.core.noise import derive, permutation
from stillproof.core.runtime import cores
from stillproof.errors import InputError

QUALITIES = tuple(range(36, 101))
"""Of JPEG, that are tried; those at the ends, with too few beside them, only to compare with."""

BRIGHTNESS = (0.299, 0.587, 0.114)
"""Of red, green and blue, as JPEG has it."""

BESIDE = 4
"""Qualities on each side that one is compared with."""

AUTO = "auto"
"""The codec that the images came through."""

LOOKED_AT = 64
"""Images that a codec is recognised by."""

STANDS_OUT = 0.6
"""What JPEG of the right quality changes in a JPEG image, over what the qualities beside it do, at the most."""


@dataclass(frozen=True, slots=True)
class Codec:
    """JPEG of a quality, with halved colour (4:2:0); None leaves images as they are."""

    quality: int | None = None

    def __post_init__(self) -> None:
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise InputError(f"JPEG has no quality {self.quality}.", "Give 1 to 100.")

    def __str__(self) -> str:
        return "none" if self.quality is None else f"JPEG {self.quality}"

    def __call__(self, images: Tensor) -> Tensor:
        """uint8, (n, C, H, W), in and out."""
        if self.quality is None or not len(images):
            return images
        with ThreadPoolExecutor(cores()) as threads:
            return torch.stack(list(threads.map(self._passed, images)))

    def linear(self, images: Tensor) -> Tensor:
        """What it does that has a gradient: colour at half the resolution. float32, (n, C, H, W), in and out."""
        if self.quality is None or images.shape[1] != 3:
            return images
        brightness = torch.einsum("nchw,c->nhw", images, images.new_tensor(BRIGHTNESS))[:, None]
        height, width = images.shape[2:]
        colour = F.avg_pool2d(images - brightness, 2, ceil_mode=True)
        doubled = F.interpolate(colour, scale_factor=2.0, mode="nearest")[:, :, :height, :width]
        return brightness + doubled

    def _passed(self, image: Tensor) -> Tensor:
        grey = image.shape[0] == 1
        pixels = image[0].numpy() if grey else image.permute(1, 2, 0).numpy()
        content = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(content, "JPEG", quality=self.quality, subsampling="4:2:0")
        decoded = torch.from_numpy(np.array(Image.open(content)))
        return decoded[None] if grey else decoded.permute(2, 0, 1).contiguous()


def parse_codec(text: str) -> Codec | None:
    """`jpeg:75`, `none`, or `auto`, which is None. Raises InputError."""
    kind, _, quality = text.partition(":")
    if text == AUTO:
        return None
    if text == "none":
        return Codec()
    if kind != "jpeg" or not quality.isdecimal():
        raise InputError(f"there is no codec {text!r}.", "Write auto, none, or jpeg:75.")
    return Codec(int(quality))


def codec_of(images: ImageSet) -> Codec:
    """The codec that most of these images came through, as far as it shows.

    JPEG of the quality that an image had before changes it less than the qualities beside it do.
    """
    if min(images.shape[1:]) < 16:  # too few blocks of 8×8 to tell
        return Codec()
    rows = permutation(len(images), derive(0, "codec"))[:LOOKED_AT]
    some = images.images[rows]
    changed = np.array([_changed(some, quality) for quality in QUALITIES])
    inner = range(BESIDE, len(QUALITIES) - BESIDE)
    beside = [np.median(changed[place - BESIDE : place + BESIDE + 1]) for place in inner]
    share = changed[BESIDE:-BESIDE] / np.maximum(beside, 1e-9)
    best = int(share.argmin())
    return Codec(QUALITIES[best + BESIDE]) if share[best] < STANDS_OUT else Codec()


def _changed(images: Tensor, quality: int) -> float:
    """How much JPEG changes brightness; halved colours change whatever the quality."""
    change = Codec(quality)(images).float() - images.float()
    weights = torch.tensor(BRIGHTNESS) if images.shape[1] == 3 else torch.ones(1)
    return float(torch.einsum("nchw,c->nhw", change, weights).square().mean())
