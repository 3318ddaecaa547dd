"""Spectral scores: how far is an image along the direction in which the features of its class spread most?"""

from __future__ import annotations

import numpy as np

from stillproof.poison.scan_set.probe import Learned
from stillproof.poison.scan_set.sight import Scores
from stillproof.poison.scan_set.two_groups import whitened


def spectral_signatures(learned: Learned) -> Scores:
    """The baseline: the square of the centred projection (Tran et al. 2018, arXiv 1811.00636)."""
    found = np.zeros(len(learned.features))
    for rows, here in learned.by_class():
        found[rows] = _along(here - here.mean(0)) ** 2
    return learned.scores(found)


def whitened_spectrum(learned: Learned) -> Scores:
    """D3: of whitened features, as a robust z within the class (median and its absolute deviation)."""
    features, found = whitened(learned), np.zeros(len(learned.features))
    for rows, _ in learned.by_class():
        along = _along(features[rows] - features[rows].mean(0))
        far = np.abs(along - np.median(along))
        found[rows] = 0.6745 * far / max(float(np.median(far)), 1e-12)
    return learned.scores(found)


def _along(centred: np.ndarray) -> np.ndarray:
    """Projections on the first right singular vector, (n,)."""
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    found: np.ndarray = centred @ directions[0]
    return found
