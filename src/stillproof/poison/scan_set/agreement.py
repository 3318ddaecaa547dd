"""D1: does a reference that was trained on trusted images alone agree with the teacher?"""

from __future__ import annotations

import numpy as np

from stillproof.core.measures import log_softmax
from stillproof.poison.scan_set.sight import Scores, Sight


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """JS divergence of two sets of logits, (N, K) each: (N,), in nats, from 0 to ln 2."""
    one, two = log_softmax(first), log_softmax(second)
    middle = np.logaddexp(one, two) - np.log(2)
    found: np.ndarray = ((np.exp(one) * (one - middle)).sum(1) + (np.exp(two) * (two - middle)).sum(1)) / 2
    return found


def agreement(suspects: Sight, trusted: Sight) -> Scores:
    """JS(teacher ‖ reference). What deceives the teacher deceives another architecture less."""
    found, usual = (jensen_shannon(sight.teacher.numpy(), sight.reference.numpy()) for sight in (suspects, trusted))
    return Scores(found, usual)
