"""Activation clustering, a baseline: does a class fall into two clusters of unequal size?"""

from __future__ import annotations

import math

import numpy as np

from stillproof.core.noise import derive
from stillproof.poison.scan_set.probe import Learned
from stillproof.poison.scan_set.sight import Scores

DIMENSIONS = 10

SMALLEST = 1e-5
"""Singular values below this share of the largest are rounding."""


def activation_clustering(learned: Learned) -> Scores:
    """How small an image's cluster is: 1 − its share of the class.

    Two clusters (k-means) of ten independent components of the features. Source: Chen et al. 2018, arXiv 1811.03728.
    """
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    found = np.zeros(len(learned.features))
    for rows, here in learned.by_class():
        axes, sizes, _ = np.linalg.svd(here - here.mean(0), full_matrices=False)
        count = min(DIMENSIONS, int((sizes > SMALLEST * max(sizes[0], np.abs(here).max())).sum()))
        if not count:  # images that are all alike fall into no clusters
            continue
        # whitened here: features that hardly vary would be divided by nothing
        white = axes[:, :count] * math.sqrt(len(here))
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                parts = FastICA(random_state=0, whiten=False).fit_transform(white)
            except ValueError:  # its iteration may lose itself; then the principal components are clustered
                parts = white
            labels = KMeans(2, n_init=10, random_state=derive(0, "clusters") % 2**31).fit_predict(parts)
        share = np.bincount(labels, minlength=2) / len(labels)
        found[rows] = 1 - share[labels]
    return learned.scores(found)
