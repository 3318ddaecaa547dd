"""Activation clustering, a baseline: does a class fall into two clusters of unequal size?"""

from __future__ import annotations

import numpy as np

from stillproof.core.noise import derive
from stillproof.poison.scan_set.probe import Learned
from stillproof.poison.scan_set.sight import Scores

DIMENSIONS = 10


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
        count = min(
            DIMENSIONS, int(np.linalg.matrix_rank(here - here.mean(0), tol=1e-6 * max(1.0, np.abs(here).max())))
        )
        if not count:  # images that are all alike fall into no clusters
            continue
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            parts = FastICA(count, random_state=0, whiten="unit-variance").fit_transform(here)
            labels = KMeans(2, n_init=10, random_state=derive(0, "clusters") % 2**31).fit_predict(parts)
        share = np.bincount(labels, minlength=2) / len(labels)
        found[rows] = 1 - share[labels]
    return learned.scores(found)
