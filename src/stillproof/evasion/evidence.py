"""What an audit has seen of a classifier: what its signs are made of, and its verdict. NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stillproof.core import measures

Array = npt.NDArray[Any]

WAVERING = 0.01
"""Median difference of two passes, of the logits' spread, from which attacks may disagree about a classifier."""

REPEAT_TOLERANCE = 1e-4
"""Two passes that differ by more, of the logits' spread, are those of a randomised classifier."""


def within(distance: Any, epsilon: float) -> Any:
    """Whether images this far away (an array, or a tensor) lie in the ball, up to rounding."""
    return distance <= epsilon * (1 + 1e-5) + 1e-7


DEPLOYED, DEPLOYED_AGAIN, WHITE_BOX, STRAIGHT = "deployed", "deployed again", "white box", "straight through"

UNSURE = 0.9
"""Median probability of the guess, below which cross-entropy pulls at all classes rather than at the nearest rival."""

OTHERWISE = ("gradient-free", "transfer", "one step", "detour")
"""Kinds of attacks that do not follow the classifier's own gradient, or take one step of it. A loss of the user's does
follow it: where it wins, that is no sign of masking."""


NOT_BY_LUCK = 3
"""Images that must fall elsewhere, however few stood."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that was seen. Arrays have a row an image (n), or a row an image that was looked at closely (m).

    labels, logits: int (n,), (n, K); ce, margin: the largest entry of that loss's gradient, (n,); repeats: difference
    of two passes, (n,); trail: the steps of the ladder, in order; outcomes: (steps, n), 1 fell, 0 not, −1 not asked;
    standing: bool (n,); distance: (n,); watched: bool (n,), images that all of cross-entropy on the deployed output was
    for, and what may win where it lost; close_rows: int (m,); close: what `examine` returns, each (m,); solved, lucky:
    the binarisation test's problems that the attack, and random draws, solved; outputs: what the classifier returns
    (logits, probabilities, labels);
    is_black_box: nothing but answers was seen; ended_by_budget: not all was tried.
    """

    labels: Array
    logits: Array
    ce: Array
    margin: Array
    repeats: Array
    trail: Sequence[Mapping[str, Any]]
    outcomes: Array
    standing: Array
    distance: Array
    watched: Array
    close_rows: Array
    close: Mapping[str, Array]
    solved: Array
    lucky: Array
    outputs: str
    is_black_box: bool
    ended_by_budget: bool

    @property
    def right(self) -> Array:
        """Whether each image is classified rightly to begin with."""
        found: Array = self.logits.argmax(axis=1) == self.labels
        return found

    def fell_to(self, *kinds: str) -> Array:
        """Which images fell to any step of these kinds."""
        chosen = [row for row, step in zip(self.outcomes, self.trail, strict=True) if step["kind"] in kinds]
        found: Array = (np.stack(chosen) == 1).any(axis=0) if chosen else np.zeros(len(self.labels), bool)
        return found

    def stood(self, *kinds: str) -> Array:
        """Which images were given to a step of these kinds, and fell to none."""
        chosen = [row for row, step in zip(self.outcomes, self.trail, strict=True) if step["kind"] in kinds]
        found: Array = (np.stack(chosen) == 0).any(axis=0) if chosen else np.zeros(len(self.labels), bool)
        return found & ~self.fell_to(*kinds)

    @property
    def settled(self) -> Array:
        """Which watched images cross-entropy on the deployed output was given to the end, or fooled before: (n,)."""
        rows = [row for row, step in zip(self.outcomes, self.trail, strict=True) if step["kind"] == DEPLOYED]
        if not rows:
            return np.zeros(len(self.labels), bool)
        found: Array = self.watched & self.right & ((np.stack(rows) == 1).any(axis=0) | (rows[-1] != -1))
        return found

    @property
    def stood_deployed(self) -> Array:
        """Which images stood against all of that."""
        found: Array = self.settled & ~self.fell_to(DEPLOYED, DEPLOYED_AGAIN)
        return found

    @property
    def is_unsure(self) -> bool:
        """Whether its probabilities are far from 0 and 1, and every image has a gradient: nothing is lost in them."""
        rows = self.logits[self.right]
        sure = np.exp(measures.log_softmax(rows)).max(axis=1) if len(rows) else np.ones(1)
        return bool(np.median(sure) < UNSURE) and not bool((self.ce[self.right] == 0).any())

    @property
    def is_random(self) -> bool:
        """Whether two passes differed."""
        return bool((self.repeats > REPEAT_TOLERANCE).any())

    @property
    def wavers(self) -> bool:
        """Whether two passes differ by so much that attacks may disagree about it."""
        repeats = self.repeats[self.right]
        return bool(len(repeats)) and float(np.median(repeats)) > WAVERING

    @property
    def hard(self) -> Array:
        """Which problems of the binarisation test random draws do not solve: the others test no attack."""
        found: Array = ~self.lucky
        return found

    @property
    def unasked(self) -> float:
        """About how many more images would have fallen to a slow attack that only some were given."""
        slow = [step for step in self.trail if step["left_out"] and step["asked"]]
        return max((step["left_out"] * step["fell"] / step["asked"] for step in slow), default=0.0)
