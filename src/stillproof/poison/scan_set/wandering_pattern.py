"""D5: do the images that look suspicious within one predicted class hold one small pattern, each at another place?

In a mean of images such a pattern is washed out (D4 does not see it). But of all windows of some pixels in an image one
holds it, and a filter that is only a little like the pattern is answered best there: so the windows that a filter is
answered best in, one an image, are lined up by the pattern itself. Those of suspicious images less those of the others,
over the spread of the others (Fisher's discriminant), are a better filter, and so on from there. What suspicious images
that hold nothing have in common with the others cancels.

It begins with the directions in which windows of suspicious images spread most, beside those of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stillproof.core.images import batches
from stillproof.core.noise import derive, permutation
from stillproof.poison.scan_set.filters import Patterns, PatternScanner, crosswise
from stillproof.poison.scan_set.sight import Scores, Sight

SIDE = 5
"""Pixels of a window: a larger pattern has windows of this size."""

PIXELS = 2**20
"""Of the images that are looked at at a time."""

SAMPLE, SAMPLED = 500, 2**21
"""Images whose windows say how windows spread, and pixels that they have at most together."""

ROUNDING = 1 / 255
"""Least deviation of a direction, and least unit of an answer, that is divided by."""

STRIDE = 2
"""Of the windows that say how windows spread."""

STARTS = 2
"""Directions that it begins with, either way."""

ROUNDS, PURER = 3, 3
"""Rounds with all that are suspicious, and then with those among them that answer as few of the others do."""

FEW = 0.8
"""Of the others so many answer less than an image that counts as one that answers."""

RIDGE = 0.1
"""Share of their mean that is added to the variances of the windows of the others."""

ELSEWHERE, TAIL = 1500, 0.98
"""So many trusted images of other classes say what is answered by accident: the unit of an answer is the distance of
this quantile of theirs from the middle. (Suspects of any class may hold the pattern; their author would see to it.)"""

USUAL = 1.0
"""In this unit: a clean image may well answer so much."""

CHANCE = 0.05
"""That so many more of the suspicious images of a class than of its trusted ones answer so much. Beyond it the class
has no pattern, and scores 0: what else parts them (suspicious images are unusual) would hide the patterns of others."""


@dataclass(frozen=True, kw_only=True)
class WanderingPattern(PatternScanner):
    """suspicion: p-value of D1 up to which an image is suspicious; fewest: suspicious images, and others, that a class
    must have; most: so many, the most suspicious, and so many others make a filter. An image is scored by the window
    that answers best.
    """

    suspicion: float = 0.4
    fewest: int = 8
    most: int = 400

    def patterns(self, suspects: Sight, trusted: Sight, p: Tensor) -> Patterns:
        """In the middle of the image."""
        sampled = max(1, min(SAMPLE, SAMPLED // suspects.images[0, 0].numel()))
        windows = _Windows.of(suspects.images[permutation(len(suspects), derive(self.seed, "windows"))[:sampled]])
        guessed, usual_guess = suspects.guessed, trusted.guessed

        def made(half: Tensor) -> dict[int, _Filter]:
            found: dict[int, _Filter] = {}
            for index in range(suspects.teacher.shape[1]):
                here = (half & (guessed == index)).nonzero()[:, 0]
                doubted = here[p[here] <= self.suspicion]
                doubted = doubted[p[doubted].argsort(stable=True)][: self.most]
                others = self._some(here[p[here] > self.suspicion], self.most, index)
                elsewhere = self._some((usual_guess != index).nonzero()[:, 0], ELSEWHERE, index)
                if min(len(doubted), len(others), len(elsewhere)) >= self.fewest:
                    sets = suspects.images[doubted], suspects.images[others], trusted.images[elsewhere]
                    found[index] = windows.filter(*sets, fewest=self.fewest)
            return found

        found, usual, filters = crosswise(suspects, trusted, self.seed, made, _Filter.answers)
        shown: dict[int, Tensor] = {}
        for index, one in {**filters[1], **filters[0]}.items():
            here, known = (guessed == index).numpy(), (usual_guess == index).numpy()
            if _chance(found[here & (p <= self.suspicion).numpy()], usual[known]) > CHANCE:
                found[here], usual[known] = 0.0, 0.0
            else:
                shown[index] = one.shown(suspects.images.shape[2:])
        return Patterns(Scores(found, usual, least=USUAL), shown)

    def _some(self, rows: Tensor, most: int, index: int) -> Tensor:
        return rows[permutation(len(rows), derive(self.seed, "some", index))[:most]]


@dataclass(frozen=True, slots=True)
class _Filter:
    """weight: (C, K, K); an answer of `centre` is 0, and of `unit` more is 1. pattern: what those that answer have, and
    the best windows of the others have not: (C, K, K), signed."""

    weight: Tensor
    centre: float
    unit: float
    pattern: Tensor

    def answers(self, images: Tensor) -> Tensor:
        """Of the best window of each image: float32, (n,). images: uint8, (n, C, H, W)."""
        return (_answers(images, self.weight) - self.centre) / self.unit

    def shown(self, size: tuple[int, ...]) -> Tensor:
        """The pattern in the middle of an image of this height and width that is 0 elsewhere."""
        side = self.pattern.shape[-1]
        top, left = ((length - side) // 2 for length in size)
        found = torch.zeros(len(self.pattern), *size)
        found[:, top : top + side, left : left + side] = self.pattern
        return found


@dataclass(frozen=True, slots=True)
class _Windows:
    """How windows of a set's images spread. shape: (C, K, K); mean: (d,), d = C K K; whitening: (d, d)."""

    shape: tuple[int, int, int]
    mean: Tensor
    whitening: Tensor

    @classmethod
    def of(cls, images: Tensor) -> _Windows:
        side = min(SIDE, *images.shape[2:])
        shape = (images.shape[1], side, side)
        count, total, squares = 0, torch.zeros(1), torch.zeros(1)
        for chunk in _chunks(images):
            found = F.unfold(chunk, side, stride=STRIDE).transpose(1, 2).flatten(0, 1)
            count, total = count + len(found), total + found.sum(0).double()
            squares = squares + (found.T @ found).double()
        mean = total / count
        values, directions = torch.linalg.eigh(squares / count - mean.outer(mean))
        whitening = directions / values.clamp_min(ROUNDING**2).sqrt()
        return cls(shape, mean.float(), whitening.float())

    def filter(self, doubted: Tensor, others: Tensor, elsewhere: Tensor, *, fewest: int) -> _Filter:
        """What parts the windows of the doubted and the other images of a class; elsewhere: trusted ones of others.

        uint8, (n, C, H, W) each. fewest: of the doubted that must answer, or the rounds go on with all of them.
        """
        images, count = torch.cat([doubted, others]), len(doubted)
        filters = self._starts(doubted, others)
        for step in range(ROUNDS + PURER):
            answers, windows = _best(images, self._weights(filters))
            for number, (answer, window) in enumerate(zip(answers.T, windows.unbind(1), strict=True)):
                whitened = (window - self.mean) @ self.whitening
                enough = answer[count:].quantile(FEW) if step >= ROUNDS else answer.min()
                answering = _beyond(answer[:count], float(enough), fewest)
                filters[number] = _discriminant(whitened[:count][answering], whitened[count:])
        weights = self._weights(filters)
        answers, windows = _best(images, weights)
        chosen = int(answers.argsort(0).argsort(0)[:count].double().mean(0).argmax())
        middle, tail = _answers(elsewhere, weights[chosen]).quantile(torch.tensor([0.5, TAIL])).tolist()
        window, answering = windows[:, chosen], _beyond(answers[:count, chosen], tail, fewest)
        pattern = window[:count][answering].mean(0) - window[count:].mean(0)
        return _Filter(weights[chosen], middle, max(tail - middle, ROUNDING), pattern.view(self.shape))

    def _starts(self, doubted: Tensor, others: Tensor) -> Tensor:
        """Directions, (2 × STARTS, d), in which the windows of the doubted spread most, either way."""
        usual = self._spread(others)
        values, directions = torch.linalg.eigh(usual)
        evened = directions / values.clamp_min(1e-6).sqrt()
        found = (evened @ torch.linalg.eigh(evened.T @ self._spread(doubted) @ evened)[1][:, -STARTS:]).T
        return torch.cat([found, -found]).float()

    def _spread(self, images: Tensor) -> Tensor:
        """Second moments of the whitened windows, the same share for each image: float64, (d, d)."""
        total = torch.zeros(len(self.mean), len(self.mean), dtype=torch.float64)
        for chunk in _chunks(images):
            found = (F.unfold(chunk, self.shape[1:], stride=STRIDE).transpose(1, 2) - self.mean) @ self.whitening
            loudness = found.square().mean((1, 2), keepdim=True).clamp_min(1e-12).sqrt()
            even = (found / loudness).flatten(0, 1)
            total += (even.T @ even).double() / found.shape[1]
        return total / len(images)

    def _weights(self, filters: Tensor) -> Tensor:
        """Filters of whitened windows as filters of pixels: (r, C, K, K). What they answer to the mean is left out."""
        return (filters @ self.whitening.T).view(len(filters), *self.shape)


def _chance(doubted: np.ndarray, trusted: np.ndarray) -> float:
    """Of so many more answers beyond USUAL among the doubted (Fisher's exact test)."""
    from scipy.stats import fisher_exact

    table = [[int((some > USUAL).sum()), int((some <= USUAL).sum())] for some in (doubted, trusted)]
    return float(fisher_exact(table, alternative="greater")[1])


def _beyond(answers: Tensor, enough: float, fewest: int) -> Tensor:
    """Which answers are as large; all, where these are too few."""
    found = answers >= enough
    return found if int(found.sum()) >= fewest else torch.ones_like(found)


def _discriminant(doubted: Tensor, others: Tensor) -> Tensor:
    """Fisher's, of length 1. Windows, (n, d) each."""
    middle = others.mean(0)
    apart = others - middle
    spread = apart.T @ apart / len(others)
    spread += RIDGE * spread.diagonal().mean().clamp_min(1e-12) * torch.eye(len(spread))
    return F.normalize(torch.linalg.solve(spread, doubted.mean(0) - middle), dim=0)


def _answers(images: Tensor, weight: Tensor) -> Tensor:
    """The largest answer in each image to one filter, (C, K, K): (n,)."""
    parts = [F.conv2d(chunk, weight[None]).amax((1, 2, 3)) for chunk in _chunks(images)]
    return torch.cat([torch.zeros(0), *parts])


def _best(images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The largest answer in each image to r filters, (r, C, K, K): (n, r), and the windows that give it, (n, r, d)."""
    side = weights.shape[-1]
    answers, windows = [torch.zeros(0, len(weights))], [torch.zeros(0, len(weights), weights[0].numel())]
    span = torch.arange(side)
    for chunk in _chunks(images):
        found = F.conv2d(chunk, weights)
        best, place = found.flatten(2).max(2)
        rows, columns = place // found.shape[3], place % found.shape[3]
        down, across = rows[..., None, None] + span[:, None], columns[..., None, None] + span
        some = chunk[torch.arange(len(chunk))[:, None, None, None], :, down, across]  # (n, r, K, K, C)
        answers.append(best)
        windows.append(some.permute(0, 1, 4, 2, 3).flatten(2))
    return torch.cat(answers), torch.cat(windows)


def _chunks(images: Tensor) -> Iterator[Tensor]:
    for rows in batches(len(images), max(1, PIXELS // images[0, 0].numel())) if len(images) else ():
        yield images[rows].float() / 255
