"""The nine signs of masked gradients, each a number with its interval, its threshold and the images that show it.

Source: Athalye et al. 2018, arXiv 1802.00420; Carlini et al. 2019, arXiv 1902.06705; Pintor et al. 2022, arXiv
2106.09947. NumPy alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stillproof.core import measures
from stillproof.core.measurement import Measurement
from stillproof.evasion.evidence import NOT_BY_LUCK, OTHERWISE, REPEAT_TOLERANCE, STRAIGHT, WHITE_BOX, Array, Evidence

POINTS = 0.05
"""A difference of robust accuracies that counts."""

SIGNIFICANT = 0.01
"""Of McNemar's test, for the same."""

DEAD_SHARE = 0.05
"""Of images without a gradient: more is a sign."""

DISAGREEMENT = 0.02
"""Share of the images that stood against the deployed gradient and fell to something that has none: more is a sign."""

SETTLED = 0.05
"""Range of the loss over an attack's last steps, of its whole rise: more, and it has not converged."""

KEPT = 0.5
"""Median share of what gradients promise that steps along them bring: less, and the backward pass is of another
function. It was .97 and more on honest classifiers, plain, over-trained and robust ones."""

UNSTABLE = 1.0
"""Mean relative change of the loss under random changes within half the ball: more, and predictions are unstable."""


ELSEWHERE = "others win where the deployed gradient lost"
UNBOUNDED, UNCONVERGED = "an unbounded attack fails", "twice the iterations find more"
NOT_THE_SLOPE = "the gradient is not the slope"
NO_RISE = "success hardly rises in twice the ball"
"""Names of signs that others ask for."""


@dataclass(frozen=True, slots=True)
class Sign:
    """A number with its evidence.

    number: as in the list of signs; is_present: None where it could not be measured; is_causal: whether it explains
    masking, not only goes with it; images: rows that show it.
    """

    number: int
    name: str
    measured: Measurement
    threshold: str
    is_present: bool | None
    is_causal: bool
    says: str
    images: tuple[int, ...] = ()


def signs(evidence: Evidence) -> list[Sign]:
    """All nine, in order; those of gradients are missing where none was looked at: a black box, a spent budget."""
    found = [_disagreement(evidence), _straight(evidence), _scale(evidence), _probabilities(evidence)]
    if evidence.close:
        found += [
            _saturated(evidence),
            _no_path(evidence),
            _not_the_slope(evidence),
            _sweep(evidence),
            _unbounded(evidence),
            _unconverged(evidence),
            _no_rise(evidence),
            _silent(evidence),
            _unstable(evidence),
            _random(evidence),
        ]
    return sorted(found, key=lambda sign: sign.number)


def _rows(shown: Array) -> tuple[int, ...]:
    return tuple(int(row) for row in np.flatnonzero(shown)[:8])


def _more(measured: Measurement, limit: float) -> bool | None:
    """Whether the whole interval is over a limit; None where there is no value."""
    if measured.value is None:
        return None
    return (measured.value if measured.low is None else measured.low) > limit


def _saturated(evidence: Evidence) -> Sign:
    says = "softmax is saturated: the logits are so large that float32 holds no gradient of the loss"
    return _dead("cross-entropy has no gradient, the margin has", evidence.margin > 0, evidence, says)


def _no_path(evidence: Evidence) -> Sign:
    says = "a step has no derivative (rounding, a sign, a cast), cuts it off, or is saturated so that it is 0"
    return _dead("no loss has a gradient", evidence.margin == 0, evidence, says)


def _dead(name: str, margin: Array, evidence: Evidence, says: str) -> Sign:
    """Images without a gradient of the cross-entropy, of which the margin is as this says."""
    shown = evidence.right & (evidence.ce == 0) & margin
    share = measures.share(int(shown.sum()), int(evidence.right.sum()))
    return Sign(1, name, share, f"over {DEAD_SHARE:.0%}", _more(share, DEAD_SHARE), True, says, _rows(shown))


def _not_the_slope(evidence: Evidence) -> Sign:
    kept = evidence.close["slope"]
    known = kept[~np.isnan(kept)]
    enough = len(known) >= NOT_BY_LUCK and not evidence.is_random
    median = Measurement(
        value=float(np.median(known)) if enough else None,
        n=len(known),
        unit="of the promised change",
        method="median over images of the change of the margin along its gradient, over what the gradient promises",
    )
    present = None if median.value is None else median.value < KEPT
    rows = np.flatnonzero(kept < KEPT)[:8]
    return Sign(
        1,
        NOT_THE_SLOPE,
        median,
        f"under {KEPT:g}",
        present,
        True,
        "steps along the gradient do not change the answers as it says: the backward pass is of another function",
        tuple(int(row) for row in evidence.close_rows[rows]),
    )


def _sweep(evidence: Evidence) -> Sign:
    close = evidence.close
    deployed = ~close["sweep.1"]
    others = {name: ~fell for name, fell in close.items() if name.startswith("sweep.") and name != "sweep.1"}
    best = min(others, key=lambda name: float(others[name].mean()))
    drop = measures.difference(deployed[None].astype(float), others[best][None].astype(float))
    p = measures.mcnemar(deployed, others[best])
    # the best of several is one chance in several to be lucky
    present = drop.value is not None and drop.value >= POINTS and p < SIGNIFICANT / len(others)
    words = best.removeprefix("sweep.")
    is_causal = not (evidence.is_unsure and words == "standardised")  # that sharpens what is flat
    at = "each image's own temperature" if words == "standardised" else f"T = {words}"
    return Sign(
        2,
        "robust accuracy falls with the temperature",
        drop,
        f"{100 * POINTS:.0f} points, p < {SIGNIFICANT:g}",
        present,
        is_causal,
        f"PGD on the logits at {at} against PGD on the logits as they are (p = {p:.2g}): the same decisions, "
        "other gradients",
        tuple(int(row) for row in evidence.close_rows[deployed & ~others[best]][:8]),
    )


def margins_of(logits: Array, labels: Array) -> Array:
    """The label's logit less the largest other, (n,)."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    others = logits.copy()
    np.put_along_axis(others, labels[:, None], -np.inf, axis=1)
    found: Array = own - others.max(axis=1)
    return found


def _disagreement(evidence: Evidence) -> Sign:
    stood = evidence.stood_deployed
    if evidence.is_unsure:  # what a margin loss on the same output takes was no worse for having a gradient
        stood = stood & evidence.stood(WHITE_BOX)
    shown = stood & evidence.fell_to(*OTHERWISE)
    share = measures.share(int(shown.sum()), int(stood.sum()))
    if evidence.is_black_box:
        share = measures.unmeasured("a black box shows no gradient to disagree with")
    return Sign(
        3,
        ELSEWHERE,
        share,
        f"over {DISAGREEMENT:.0%}, {NOT_BY_LUCK} images",
        None if share.value is None else bool(_more(share, DISAGREEMENT)) and int(shown.sum()) >= NOT_BY_LUCK,
        True,
        "queries, luck, one step, a twin's examples or a detour of yours fool what the deployed gradient could not",
        _rows(shown),
    )


def _straight(evidence: Evidence) -> Sign:
    shown = evidence.watched & evidence.fell_to(STRAIGHT)
    share = measures.share(int(shown.sum()), int((evidence.watched & evidence.right).sum()))
    if evidence.is_black_box:
        share = measures.unmeasured("a black box shows nothing within")
    return Sign(
        3,
        "the logits within give way",
        share,
        f"over {DISAGREEMENT:.0%}",
        _more(share, DISAGREEMENT),
        True,
        "past a step without gradient, or before what is made of the logits, attacks find what they cannot find on the "
        "output as it is served",
        _rows(shown),
    )


def _unbounded(evidence: Evidence) -> Sign:
    fell = evidence.close["unbounded.cross-entropy"]
    share = measures.share(int((~fell).sum()), len(fell))
    return Sign(
        4,
        UNBOUNDED,
        share,
        "over 0%",
        share.value is not None and share.value > 0,
        False,
        "where all images are allowed, cross-entropy on the deployed output must find an adversarial one",
        tuple(int(row) for row in evidence.close_rows[~fell][:8]),
    )


def _unconverged(evidence: Evidence) -> Sign:
    more = evidence.close["apgd.double"] & ~evidence.close["apgd"]
    share = measures.share(int(more.sum()), len(more))
    moving = float(np.median(evidence.close["trace.range"])) if len(more) else 0.0
    return Sign(
        5,
        UNCONVERGED,
        share,
        f"over {DISAGREEMENT:.0%}",
        _more(share, DISAGREEMENT),
        False,
        f"the attack on the deployed output has not converged; PGD's loss still moves by {moving:.0%} of its rise over "
        f"its last steps ({SETTLED:.0%} is settled)",
        tuple(int(row) for row in evidence.close_rows[more][:8]),
    )


def _no_rise(evidence: Evidence) -> Sign:
    wider, within = evidence.close["wider"], evidence.close["apgd"]
    rise = measures.difference(wider[None].astype(float), within[None].astype(float))
    stood = float((~within).mean()) if len(within) else 0.0
    flat = None if rise.high is None else stood > POINTS and rise.high < POINTS
    return Sign(
        5,
        NO_RISE,
        rise,
        f"under {100 * POINTS:.0f} points",
        flat,
        False,
        "a larger ball holds more adversarial images, and an attack that follows gradients finds them",
    )


def _silent(evidence: Evidence) -> Sign:
    shown = evidence.close["trace.ever"] & ~evidence.close["trace.last"]
    share = measures.share(int(shown.sum()), len(shown))
    return Sign(
        6,
        "silent success",
        share,
        f"over {DISAGREEMENT:.0%}",
        _more(share, DISAGREEMENT),
        False,
        "an iterate was adversarial and the last was not: who scores the last one only reports too much robustness",
        tuple(int(row) for row in evidence.close_rows[shown][:8]),
    )


def _unstable(evidence: Evidence) -> Sign:
    change = evidence.close["stability"]
    median = Measurement(
        value=float(np.median(change)) if len(change) else None,
        n=len(change),
        unit="relative change",
        method="median over images of the mean over random changes within half the ball",
    )
    return Sign(
        7,
        "the loss jumps under random changes",
        median,
        f"over {UNSTABLE:g}",
        _more(median, UNSTABLE),
        False,
        "near the image the loss is rugged, or nearly zero; gradients tell little there",
    )


def _random(evidence: Evidence) -> Sign:
    shown = evidence.repeats > REPEAT_TOLERANCE
    share = measures.share(int(shown.sum()), len(shown))
    return Sign(
        7,
        "two passes differ",
        share,
        "over 0%",
        bool(shown.any()),
        False,
        "the classifier is randomised: gradients are averaged over passes, and so is the judgement",
        _rows(shown),
    )


def _scale(evidence: Evidence) -> Sign:
    if evidence.outputs == "labels":
        nothing = measures.unmeasured("it answers with labels alone")
        return Sign(8, "probability exactly 1", nothing, f"over {DEAD_SHARE:.0%}", None, False, "labels have no scale")
    logits, labels = evidence.logits, evidence.labels
    probabilities = np.exp(measures.log_softmax(logits)).astype(np.float32)
    sure = probabilities.max(axis=1) == 1.0
    share = measures.share(int(sure.sum()), len(sure))
    margins = margins_of(logits, labels)
    lengths = np.abs(logits).sum(axis=1)
    return Sign(
        8,
        "probability exactly 1",
        share,
        f"over {DEAD_SHARE:.0%}",
        _more(share, DEAD_SHARE),
        False,
        f"median ‖z‖₁ {np.median(lengths):.4g}, median margin {np.median(margins):.4g} (float32 holds no "
        "cross-entropy over a margin of 16.6, and no gradient of it over 104)",
        _rows(sure),
    )


def _probabilities(evidence: Evidence) -> Sign:
    given = evidence.outputs == "probabilities"
    sure = _scale(evidence)
    says = "it returns probabilities; the audit takes their logarithm"
    if given and sure.is_present:
        says += ", which a saturated softmax has lost: the logits inside, labels and transfer remain"
    return Sign(
        9,
        "it returns probabilities, and they are saturated",
        sure.measured,
        f"over {DEAD_SHARE:.0%}",
        given and bool(sure.is_present),
        True,
        says if given else f"it returns {evidence.outputs}",
        sure.images if given else (),
    )
