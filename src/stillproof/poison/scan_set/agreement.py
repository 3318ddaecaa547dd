"""D1: does a reference that was trained on trusted images alone agree with the teacher?"""

from __future__ import annotations

import numpy as np

from stillproof.poison.scan_set.sight import Scores, Sight


def disagreement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 − the cosine of two sets of logits, (N, K) each, less their means: (N,), from 0 to 2.

    A divergence of probabilities grows with how sure the teacher is, and it is surer of images that it was trained on,
    as a transfer set's often are: clean ones would be flagged at twice the nominal rate. A cosine knows no scale.
    """
    one, two = (logits - logits.mean(axis=1, keepdims=True) for logits in (first.astype(float), second.astype(float)))
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    found: np.ndarray = 1 - (one * two).sum(axis=1) / np.maximum(lengths, 1e-12)
    return found


def agreement(suspects: Sight, trusted: Sight) -> Scores:
    """How far teacher and reference are apart. What deceives the teacher deceives another architecture less."""
    if suspects.teacher.shape[1] == 2:
        return _of_two_classes(suspects, trusted)
    found, usual = (disagreement(sight.teacher.numpy(), sight.reference.numpy()) for sight in (suspects, trusted))
    return Scores(found, usual, least=1e-6)


def _of_two_classes(suspects: Sight, trusted: Sight) -> Scores:
    """The teacher's class less the reference's margin for it, both over their usual size.

    The cosine of two centred logits is 1 or −1, whatever they are.
    """

    def margins(logits: np.ndarray) -> np.ndarray:
        found: np.ndarray = logits[:, 0].astype(float) - logits[:, 1]
        return found

    scale = max(float(np.median(np.abs(margins(trusted.reference.numpy())))), 1e-12)
    found, usual = (
        -np.sign(margins(sight.teacher.numpy())) * margins(sight.reference.numpy()) / scale
        for sight in (suspects, trusted)
    )
    return Scores(found, usual, least=1e-6)
