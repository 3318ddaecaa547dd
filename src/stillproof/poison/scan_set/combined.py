"""All scanners together, on one scale, with a threshold that the trusted images set."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from stillproof.poison.scan_set.sight import Scores

RARE = 0.995
"""Of the trusted images so many score less than 1 after `exceedance`."""


def exceedance(scores: Scores) -> Scores:
    """Scores as multiples of how far the rarest trusted images are from the middle."""
    centre = float(np.median(scores.trusted))
    reach = max(float(np.quantile(scores.trusted, RARE)) - centre, scores.least)
    return Scores((scores.suspects - centre) / reach, (scores.trusted - centre) / reach)


def combined(scores: Mapping[str, Scores]) -> Scores:
    """The largest exceedance of each image: what one scanner is sure of needs no second. Silent ones have no say."""
    heard = [one for one in scores.values() if one.suspects.any() or one.trusted.any()] or list(scores.values())
    parts = [exceedance(one) for one in heard]
    return Scores(
        np.maximum.reduce([part.suspects for part in parts]), np.maximum.reduce([part.trusted for part in parts])
    )
