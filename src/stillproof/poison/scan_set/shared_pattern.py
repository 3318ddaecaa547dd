"""D4: do the images that look suspicious within one predicted class share a pattern, wherever and however large it is?

In a class that poison is aimed at, the suspicious images have the trigger and the others have not. The difference of
their means, whitened, is the trigger as a matched filter; an image is scored by how much of it it holds. What a class's
images have in common (a logo, a border) is in both means, and cancels.

Whitening is by frequency: natural images are nearly uncorrelated after a cosine transform and a turn of their colours.
Each image is scored by a filter made of the other half of the suspects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stillproof.core.images import batches
from stillproof.poison.scan_set.filters import Patterns, PatternScanner, crosswise
from stillproof.poison.scan_set.sight import Scores, Sight

CHUNK = 2048

ROUNDING = 1 / 255
"""Least deviation of a coefficient that is divided by: a codec leaves some that are always 0."""

USUAL = 3.0
"""Deviations by which a clean image may well hold a filter that it has nothing to do with."""

LOUD = 4.0
"""Deviations beyond which a coefficient counts as this many in a mean: no single image makes a filter."""

CHANCE = 2.0
"""Variances of a difference of means that are taken off its square: where a pattern is not, a filter is 0 (Wiener)."""


@dataclass(frozen=True, kw_only=True)
class SharedPattern(PatternScanner):
    """suspicions: p-values of D1 up to which an image is suspicious; fewest: suspicious images a class must have.

    Scores are in deviations.

    Of the suspicions that one is taken, class by class, whose filter stands out most from chance: good references give
    much of the poison a small p, and weak ones do not.
    """

    suspicions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    fewest: int = 8

    def patterns(self, suspects: Sight, trusted: Sight, p: Tensor) -> Patterns:
        """As wide as the image."""
        spectrum = _Spectrum.of(suspects.images)

        def made(half: Tensor) -> dict[int, Tensor]:
            return self._filters(spectrum, suspects, p, half)

        found, usual, filters = crosswise(suspects, trusted, self.seed, made, spectrum.holds)
        patterns: dict[int, Tensor] = {}
        for index, one in (pair for half in filters for pair in half.items()):
            patterns[index] = patterns.get(index, torch.zeros_like(one)) + one
        return Patterns(
            Scores(found, usual, least=USUAL), {index: spectrum.image(one) for index, one in patterns.items()}
        )

    def _filters(self, spectrum: _Spectrum, suspects: Sight, p: Tensor, other_half: Tensor) -> dict[int, Tensor]:
        """A filter of length 1 for each class that has enough suspicious images in the other half."""
        guessed, found = suspects.guessed, {}
        levels = torch.tensor(sorted(self.suspicions), dtype=p.dtype)
        for index in range(suspects.teacher.shape[1]):
            here, clearest = (other_half & (guessed == index)).nonzero()[:, 0], 0.0
            between = torch.bucketize(p[here], levels)  # each level holds what those below it hold
            sums = spectrum.sums(suspects.images[here], between, len(levels) + 1).cumsum(0)
            counts = torch.bincount(between, minlength=len(levels) + 1).cumsum(0).tolist()
            for suspicious, rows in zip(sums[:-1], counts[:-1], strict=True):
                others = counts[-1] - rows
                if rows < self.fewest or others < self.fewest:
                    continue
                difference = suspicious / rows - (sums[-1] - suspicious) / others
                by_chance = CHANCE * (1 / rows + 1 / others)
                kept = difference * (1 - by_chance / difference.square().clamp_min(1e-12)).clamp_min(0)
                clear = float(kept.square().sum()) / by_chance
                if clear > clearest:
                    found[index], clearest = (kept / kept.norm().clamp_min(1e-12)).float(), clear
        return found


@dataclass(frozen=True, slots=True)
class _Spectrum:
    """The whitening transform: colours turned, cosine transform, each coefficient over its deviation."""

    colours: Tensor
    rows: Tensor
    columns: Tensor
    centre: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, images: Tensor) -> _Spectrum:
        channels, height, width = images.shape[1:]
        turn = _cosines(channels)
        plain = cls(turn, _cosines(height), _cosines(width), torch.zeros(1), torch.ones(1))
        count, total, squares = 0, torch.zeros(channels, height, width), torch.zeros(channels, height, width)
        for chunk in plain.chunks(images):
            count += len(chunk)
            total += chunk.sum(0)
            squares += chunk.square().sum(0)
        centre = total / count
        deviation = (squares / count - centre.square()).clamp_min(0).sqrt()
        return cls(plain.colours, plain.rows, plain.columns, centre, deviation.clamp_min(ROUNDING))

    def chunks(self, images: Tensor) -> Iterator[Tensor]:
        """The whitened coefficients of some images at a time, float32, (n, C, H, W)."""
        for rows in batches(len(images), CHUNK):
            pixels = torch.einsum("dc,nchw->ndhw", self.colours, images[rows].float() / 255)
            yield (self.rows @ pixels @ self.columns.T - self.centre) / self.deviation

    def sums(self, images: Tensor, group: Tensor, groups: int) -> Tensor:
        """Of the coefficients of each group's images: (groups, C, H, W). group: int64, (N,)."""
        total, start = torch.zeros(groups, *images.shape[1:], dtype=torch.float64), 0
        for chunk in self.chunks(images):
            total.index_add_(0, group[start : start + len(chunk)], chunk.clamp(-LOUD, LOUD).double())
            start += len(chunk)
        return total

    def holds(self, pattern: Tensor, images: Tensor) -> Tensor:
        """How much of a filter each image holds: float64, (n,)."""
        parts = [torch.einsum("nchw,chw->n", chunk, pattern) for chunk in self.chunks(images)]
        return torch.cat([torch.zeros(0), *parts]).double()

    def image(self, coefficients: Tensor) -> Tensor:
        """What coefficients look like as a change of an image."""
        pixels = self.rows.T @ (coefficients * self.deviation) @ self.columns
        return torch.einsum("dc,dhw->chw", self.colours, pixels)


def _cosines(n: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II), (n, n)."""
    places = torch.arange(n)
    found = torch.cos(math.pi * (2 * places + 1) * places[:, None] / (2 * n)) * math.sqrt(2 / n)
    found[0] /= math.sqrt(2)
    return found
