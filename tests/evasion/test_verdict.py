"""The rule by which an audit calls gradients masked, on evidence that is made for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stillproof.evasion.indicators import Evidence
from stillproof.evasion.verdict import decide


def evidence(n: int, hidden: int, *, by: str = "white box", fallen: int = 60, dead: float = 0.0) -> Evidence:
    """Of n images, all right: cross-entropy takes `fallen`, and a later attack of a kind takes `hidden` more.

    dead: share of the images whose cross-entropy has no gradient.
    """
    deployed, other = np.zeros(n, np.int8), np.full(n, -1, np.int8)
    deployed[:fallen] = 1
    other[fallen:] = 0
    other[fallen : fallen + hidden] = 1
    steps = [("PGD-20, cross-entropy", "deployed"), ("another", by)]
    trail = [{"name": name, "kind": kind, "left_out": 0, "asked": n, "fell": 0} for name, kind in steps]
    fell = deployed == 1
    close: dict[str, Any] = dict.fromkeys(("sweep.1", "sweep.10", "apgd", "apgd.double", "trace.last"), fell)
    close |= {"unbounded.cross-entropy": np.arange(n) >= dead * n, "wider": np.ones(n, bool), "trace.ever": fell}
    close |= {"trace.range": np.zeros(n), "stability": np.zeros(n), "nearest": np.ones(n)}
    return Evidence(
        labels=np.zeros(n, int),
        logits=np.tile(np.array([[4.0, 0.0, 0.0]], np.float32), (n, 1)),
        ce=(np.arange(n) >= dead * n).astype(np.float32),
        margin=np.ones(n, np.float32),
        repeats=np.zeros(n, np.float32),
        trail=trail,
        outcomes=np.stack([deployed, other]),
        standing=~(fell | (other == 1)),
        distance=np.ones(n, np.float32),
        watched=np.ones(n, bool),
        close_rows=np.arange(n),
        close=close,
        solved=np.ones(32, bool),
        lucky=np.zeros(32, bool),
        outputs="logits",
        is_black_box=False,
        ended_by_budget=False,
    )


@pytest.mark.parametrize(
    ("given", "masked", "said"),
    [
        ({"hidden": 6}, "no", "within 3.0 points"),
        ({"hidden": 11}, "no", "5.5 points more than cross-entropy does, not surely 5"),
        ({"hidden": 17}, "inconclusive", "8.5 points more than cross-entropy does, and no sign says why"),
        ({"n": 60, "fallen": 20, "hidden": 8}, "inconclusive", "no sign says why"),
        ({"hidden": 9, "by": "gradient-free"}, "inconclusive", "which may be 5 or more: watch more images"),
        ({"hidden": 30, "by": "gradient-free"}, "yes", "15.0 points of robust accuracy are not there"),
        ({"hidden": 0, "dead": 0.3}, "inconclusive", "audit at a larger epsilon"),
        ({"hidden": 0, "dead": 0.02}, "no", "within 0.0 points"),
        ({"hidden": 40, "dead": 0.3}, "yes", "cross-entropy has no gradient, the margin has"),
    ],
)
def test_the_rule(given: dict[str, Any], masked: str, said: str) -> None:
    verdict = decide(evidence(**({"n": 200} | given)))
    assert (verdict.masked, said in verdict.why) == (masked, True), verdict.why
