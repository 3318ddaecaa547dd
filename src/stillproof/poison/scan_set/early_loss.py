"""D3: what does the probe learn first? A trigger is easier than a class."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from stillproof.poison.scan_set.probe import Learned
from stillproof.poison.scan_set.sight import Scores


def early_loss(learned: Learned) -> Scores:
    """How early the loss falls: 1 − the mean rank of an image's loss over the epochs, as a share of all images.

    Within its predicted class, since classes are not learned equally fast.
    """
    losses, found = learned.losses.double().numpy(), np.zeros(len(learned.losses))
    for rows, _ in learned.by_class():
        ranks = rankdata(losses[rows], axis=0) / len(rows)
        found[rows] = 1 - ranks.mean(axis=1)
    return learned.scores(found)
