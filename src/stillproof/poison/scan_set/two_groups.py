"""D3: are the images of one class of two kinds, one of them rare?

Source: Tang et al. 2021, SCAn, arXiv 1908.00686.
"""

from __future__ import annotations

import numpy as np

from stillproof.poison.scan_set.probe import Learned
from stillproof.poison.scan_set.sight import Scores

ROUNDS = 50

SHRUNK = 1e-3
"""Share of the mean variance that is added to every direction's."""


def whitened(learned: Learned) -> np.ndarray:
    """Features in which the images of a class spread alike in all directions, over all classes: float64, (N, D).

    By all images: by the trusted ones alone these would spread less than clean suspects do.
    """
    features, guessed = learned.features.double().numpy(), learned.guessed.numpy()
    spread = np.zeros((features.shape[1], features.shape[1]))
    for index in np.unique(guessed):
        here = features[guessed == index]
        spread += (here - here.mean(0)).T @ (here - here.mean(0))
    spread /= len(features)
    values, directions = np.linalg.eigh(spread)
    scale = np.sqrt(values.clip(0) + max(SHRUNK * values.clip(0).mean(), 1e-12))
    found: np.ndarray = (features @ directions) / scale
    return found


def two_groups(learned: Learned) -> Scores:
    """How far into its class's rare group an image is, times how much better two groups explain the class than one.

    In whitened features two groups of one covariance part at the plane midway between their means; the means are sought
    from both ends of the direction in which the class spreads most. The square root of the gain in log-likelihood, 2
    per unit, is compared with the other classes' by its median absolute deviation (after SCAn's index).
    """
    features = whitened(learned)
    gains: list[float] = []
    parted: list[tuple[np.ndarray, np.ndarray]] = []
    for rows, _ in learned.by_class():
        here = features[rows]
        gain, depth = _parted(here - here.mean(0))
        gains.append(gain)
        parted.append((rows, depth))
    found = np.zeros(len(features))
    if gains:
        values = np.sqrt(np.array(gains))
        spread = max(float(np.median(np.abs(values - np.median(values)))) / 0.6745, 1e-9)
        index = ((values - np.median(values)) / spread).clip(0)
        for weight, (rows, depth) in zip(index, parted, strict=True):
            found[rows] = weight * depth
    return learned.scores(found)


def _parted(centred: np.ndarray) -> tuple[float, np.ndarray]:
    """What two groups gain over one, and how deep in the smaller group each image is, above 0 on its side."""
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    along = centred @ directions[0]
    best, depth = -1.0, np.zeros(len(centred))
    for end in (np.quantile(along, 0.95), np.quantile(along, 0.05), 0.0):
        first = along > end if end >= 0 else along < end
        for _ in range(ROUNDS):
            if not 0 < first.sum() < len(first):
                break
            one, other = centred[first].mean(0), centred[~first].mean(0)
            again = (centred - (one + other) / 2) @ (one - other) > 0
            if (again == first).all():
                break
            first = again
        share = first.mean()
        if not 0 < share < 1:
            continue
        between = centred[first].mean(0) - centred[~first].mean(0)
        gain = len(centred) * share * (1 - share) * float(between @ between)
        if gain > best:
            middle = (centred[first].mean(0) + centred[~first].mean(0)) / 2
            signed = (centred - middle) @ between / max(float(np.linalg.norm(between)), 1e-12)
            best, depth = gain, signed if share <= 1 / 2 else -signed
    return max(best, 0.0), depth
