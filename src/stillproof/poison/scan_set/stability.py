"""D2: does the teacher's answer move, under small changes of the image, as that of a clean image does?

As published, what moves more is poison. Strongly optimised images move less (AUROC .42 so counted), so that here any
other way of moving is suspicious: more, less, or more under one change and less under another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from stillproof.core.classifiers import predict
from stillproof.core.images import ImageSet, as_float, as_uint8, batches
from stillproof.core.noise import Noise
from stillproof.core.runtime import Runtime
from stillproof.poison.codec import Codec
from stillproof.poison.scan_set.agreement import disagreement
from stillproof.poison.scan_set.sight import Scores, folds

CHUNK = 2048

SHIFT = 2
"""Pixels."""

LEAST = 1e-4
"""What a disagreement is taken for at least: below it is the rounding of float32."""

View = Callable[[Tensor, Noise], Tensor]
"""Images, uint8, (n, C, H, W), and their randomness -> the same images changed, uint8."""


def _five_bits(images: Tensor, _noise: Noise) -> Tensor:
    return images & 0b11111000


def _median(images: Tensor, _noise: Noise) -> Tensor:
    """Of 2 × 2 pixels: the lower of the two middle ones."""
    wide = torch.cat([images, images[..., -1:]], dim=-1)
    wide = torch.cat([wide, wide[..., -1:, :]], dim=-2)
    four = [wide[..., :-1, :-1], wide[..., :-1, 1:], wide[..., 1:, :-1], wide[..., 1:, 1:]]
    return torch.stack(four).sort(dim=0).values[1]


def _shifted(images: Tensor, noise: Noise) -> Tensor:
    """By SHIFT pixels along both axes, each way at random; the edge is repeated."""
    height, width = images.shape[2:]
    found = images.clone()
    signs = noise.integers(0, 4, stream="shift")
    for number in range(4):
        down, right = SHIFT * (1 - 2 * (number // 2)), SHIFT * (1 - 2 * (number % 2))
        rows = (torch.arange(height) - down).clamp(0, height - 1)
        columns = (torch.arange(width) - right).clamp(0, width - 1)
        which = signs == number
        found[which] = images[which][:, :, rows][..., columns]
    return found


def _flipped(images: Tensor, _noise: Noise) -> Tensor:
    return images.flip(-1)


def _noisy(stream: str) -> View:
    def view(images: Tensor, noise: Noise) -> Tensor:
        drawn = noise.normal(tuple(images.shape[1:]), stream=stream)
        return as_uint8(as_float(images) + NOISE * drawn)

    return view


NOISE = 0.05
"""Standard deviation, of pixels in [0, 1]."""

VIEWS: dict[str, View] = {
    "JPEG 75": lambda images, _noise: Codec(75)(images),
    "5 bits": _five_bits,
    "median of 2 × 2": _median,
    "shift": _shifted,
    "flip": _flipped,
    "noise": _noisy("first"),
    "noise again": _noisy("second"),
    "noise a third time": _noisy("third"),
}


def movements(teacher: nn.Module, images: ImageSet, plain: Tensor, *, runtime: Runtime, seed: int) -> Tensor:
    """How far each view moves the teacher's answer: log of 1 − the cosine of its logits, float32, (N, views).

    plain: its logits without a view. A cosine, as for D1: the teacher is surer of images that it was trained on. Of two
    classes, where the cosine is 1 or −1, by how much of its size the margin moves.
    """
    parts: list[Tensor] = []
    for rows, chunk in _chunks(images.images):
        noise = Noise(seed, rows, 0)
        moved = [
            _moved(plain[rows].numpy(), predict(teacher, _as_set(view(chunk, noise)), runtime).numpy())
            for view in VIEWS.values()
        ]
        parts.append(torch.from_numpy(np.stack(moved, axis=1)).clamp_min(LEAST).log().float())
    return torch.cat(parts) if parts else torch.zeros(0, len(VIEWS))


def _moved(plain: np.ndarray, viewed: np.ndarray) -> np.ndarray:
    """Two sets of logits, (n, K) each -> how far apart, (n,)."""
    if plain.shape[1] > 2:
        return disagreement(plain, viewed)
    first, second = (logits[:, 0].astype(float) - logits[:, 1] for logits in (plain, viewed))
    found: np.ndarray = np.abs(second - first) / np.maximum(np.abs(first) + np.abs(second), 1e-12)
    return found


def _chunks(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in batches(len(images), CHUNK):
        yield torch.arange(rows.start, rows.stop), images[rows]


def _as_set(images: Tensor) -> ImageSet:
    return ImageSet(images, None, (), "views")


def stability(suspects: Tensor, trusted: Tensor, *, seed: int) -> Scores:
    """How unusual the movements are: their distance from those of trusted images, in deviations (Mahalanobis).

    suspects, trusted: what `movements` found, (N, views). Each image is compared with the half of the trusted ones that
    it is not in, so that trusted and clean images are treated alike.
    """
    found, usual = np.zeros(len(suspects)), np.zeros(len(trusted))
    halves = [folds(len(some), 2, seed).numpy() for some in (suspects, trusted)]
    for half in (0, 1):
        known = trusted.double().numpy()[halves[1] != half]
        centre = np.median(known, axis=0)
        spread = np.cov(known, rowvar=False) + 1e-6 * np.eye(known.shape[1])
        unmixing = np.linalg.inv(np.linalg.cholesky(spread))
        for score, some, own in zip((found, usual), (suspects, trusted), halves, strict=True):
            score[own == half] = np.linalg.norm((some.double().numpy()[own == half] - centre) @ unmixing.T, axis=1)
    return Scores(found, usual, least=1e-6)


def fragility(suspects: Tensor, trusted: Tensor) -> Scores:
    """D2, one-sided: how far the views move the answer, on average. (The paper of the idea scores T_ŷ of the views.)"""
    found, usual = (some.double().mean(dim=1).numpy() for some in (suspects, trusted))
    return Scores(found, usual, least=1e-6)
