"""From what was seen to what is said: is it robust, are its gradients masked, and what should the reader do next?

The rule: gradients are **masked** if robust accuracy under converged cross-entropy on the deployed output is 5 points
or more above the worst case over all attacks, image by image (McNemar p < .01), and a sign says why: no gradient (1), a
temperature that undoes it (2), attacks without gradients that win (3), or saturated probabilities (9). Honestly robust
classifiers show about 3 points of difference and no such sign. The question stays open where there is a sign and the
difference may be 5 points (95 %); where there is none and the difference is 8 points, or surely 5; and where the ball
is so small that the difference is too, but images have no gradient and an unbounded attack fails. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stillproof.core import measures
from stillproof.core.measurement import Measurement
from stillproof.evasion.evidence import DEPLOYED, WHITE_BOX, Evidence
from stillproof.evasion.indicators import (
    ELSEWHERE,
    NOT_THE_SLOPE,
    POINTS,
    SIGNIFICANT,
    UNBOUNDED,
    UNCONVERGED,
    Sign,
    signs,
)
from stillproof.findings import Finding, Status, judge

STRONG_ENOUGH = 0.95
"""Share of the binarisation test's problems that a strong enough attack solves."""

Masked = Literal["yes", "no", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the audit says.

    clean, robust: accuracy, and worst-case robust accuracy; claimed: what a standard attack (PGD on the deployed
    output) leaves; gap: of the watched images, what converged cross-entropy leaves, less the worst case, with
    McNemar's p; why: in words.
    """

    masked: Masked
    why: str
    clean: Measurement
    robust: Measurement
    claimed: Measurement
    hidden: Measurement
    gap: Measurement
    p: float
    signs: tuple[Sign, ...]

    @property
    def causes(self) -> list[Sign]:
        """The signs that are there and explain masking."""
        return [sign for sign in self.signs if sign.is_present and sign.is_causal]


def decide(evidence: Evidence) -> Verdict:
    """Apply the rule."""
    right, worst = evidence.right, evidence.standing
    n = len(right)
    # an image that the deployed output's attacks were not given has not stood against them
    watched = evidence.watched
    is_settled = bool((evidence.settled == (right & watched)).all()) and not evidence.is_black_box
    first = _first_deployed(evidence)
    deployed, less = evidence.stood_deployed[watched], worst[watched]
    missing = measures.unmeasured("attacks on the deployed output did not run to their end", n=n)
    # what stands at the end stood before: a plain share, whose interval is not 0 where none was seen
    gap = measures.share(int(deployed.sum() - less.sum()), len(less)) if is_settled else missing
    p = measures.mcnemar(deployed, less) if is_settled else 1.0
    found = tuple(signs(evidence))
    masked, why = _masked(evidence, found, gap, p)
    return Verdict(
        masked,
        why,
        clean=measures.share(int(right.sum()), n),
        robust=measures.share(int(worst.sum()), n),
        claimed=missing if first is None else measures.share(int(first.sum()), n),
        hidden=missing if first is None else measures.share(int(first.sum() - worst.sum()), n),
        gap=gap,
        p=p,
        signs=found,
    )


def _first_deployed(evidence: Evidence) -> np.ndarray | None:
    """What stood against the first attack on the deployed output, if it was given every image that is right."""
    given = (row for row, step in zip(evidence.outcomes, evidence.trail, strict=True) if step["kind"] == DEPLOYED)
    first = next(given, None)
    if first is None or (first[evidence.right] == -1).any():
        return None
    found: np.ndarray = evidence.right & (first != 1)
    return found


def _masked(evidence: Evidence, found: Sequence[Sign], gap: Measurement, p: float) -> tuple[Masked, str]:
    if evidence.is_black_box:
        return "inconclusive", "a black box shows no gradients; what stands here may fall to an attack that sees them"
    if not evidence.right.any():
        return "inconclusive", "no image is classified rightly to begin with"
    if gap.value is None:
        return "inconclusive", "the budget ended the attacks on the deployed output before their end"
    causes = [sign for sign in found if sign.is_present and sign.is_causal]
    points = f"{100 * gap.value:.1f} points"
    if gap.value >= POINTS and p < SIGNIFICANT:
        if not causes and _is_a_poor_loss(evidence):
            said = f"cross-entropy leaves {points} too many only because the logits are nearly flat"
            return _unless_weak(evidence, found, f"{said}: a margin loss on the same output takes them")
        if not causes and not _is_a_close_call(evidence, gap):
            return "inconclusive", f"other attacks take {points} more than cross-entropy does, and no sign says why"
        if not causes:
            said = f"other attacks take {points} more than cross-entropy does, not surely {100 * POINTS:.0f}"
            return _unless_weak(evidence, found, f"{said}, and no sign speaks of masking")
        if evidence.wavers and all(sign.name == ELSEWHERE for sign in causes) and not evidence.fell_to("detour").any():
            said = f"it answers at random, and attacks that average over passes disagree by {points}"
            return "inconclusive", f"{said}: which of them is right, more passes would tell; the worst case is theirs"
        explained = any(sign.number in EXPLAINING for sign in causes)
        if _has(found, UNCONVERGED) and not explained and not _hides_from_twice_the_steps(evidence):
            return (
                "inconclusive",
                f"cross-entropy leaves {points} too many, but it has not converged: give it more steps",
            )
        return "yes", f"{points} of robust accuracy are not there (p = {p:.1g}): {causes[0].name}"
    if causes and (gap.high is None or gap.high >= POINTS):
        return (
            "inconclusive",
            f"{causes[0].name}, and other attacks take {points} more than cross-entropy does, which may be "
            f"{100 * POINTS:.0f} or more: watch more images (--profile thorough)",
        )
    watched = int((evidence.watched & evidence.right).sum())
    if gap.value >= POINTS or watched < FEWEST_WATCHED:
        return (
            "inconclusive",
            f"other attacks take {points} more than cross-entropy does, of only {watched} right images: audit more",
        )
    dead = [sign for sign in causes if sign.number == 1]
    if dead and _has(found, UNBOUNDED):
        return (
            "inconclusive",
            f"at this epsilon cross-entropy is within {points} of the worst case, but {dead[0].name} on "
            f"{dead[0].measured.value:.0%} of the images, and fails where all are allowed: audit at a larger epsilon",
        )
    return _unless_weak(evidence, found, f"cross-entropy on the deployed output is within {points} of the worst case")


ENOUGH, CLOSE = 150, 0.08
"""Watched images from which signs would have shown; a difference that may be an honest one beyond 5 points."""


EXPLAINING = (1, 9)
"""Causes that say why cross-entropy stops where it does: it has no gradient, or probabilities that are all 0 or 1."""


def _hides_from_twice_the_steps(evidence: Evidence) -> bool:
    """Whether cross-entropy leaves too many with twice the steps as well, of the images that were looked at closely."""
    rows = evidence.close_rows
    stood = ~evidence.close["apgd.double"] & ~evidence.fell_to(DEPLOYED)[rows]
    less = stood & evidence.standing[rows]
    return float(stood.mean() - less.mean()) >= POINTS and measures.mcnemar(stood, less) < SIGNIFICANT


def _is_a_poor_loss(evidence: Evidence) -> bool:
    """Whether the classifier is so unsure that cross-entropy does not follow the nearest rival, and margins do."""
    watched = evidence.watched
    margins = evidence.right & ~evidence.fell_to(DEPLOYED, WHITE_BOX) & watched
    return evidence.is_unsure and float((margins & ~evidence.standing)[watched].mean()) < POINTS


def _is_a_close_call(evidence: Evidence, gap: Measurement) -> bool:
    """Whether a difference of 5 points without a sign may be less, on images enough for signs to show."""
    sure = gap.value is None or gap.low is None or gap.low >= POINTS or gap.value >= CLOSE
    return not sure and int((evidence.watched & evidence.right).sum()) >= ENOUGH


def _has(found: Sequence[Sign], name: str) -> bool:
    return any(sign.is_present for sign in found if sign.name == name)


def _unless_weak(evidence: Evidence, found: Sequence[Sign], why: str) -> tuple[Masked, str]:
    """Not masked for this reason, unless what stands may stand because the attacks are weak, or were not tried."""
    standing = evidence.standing
    if len(evidence.logits) > 1 and not np.ptp(evidence.logits, axis=0).any():
        return "inconclusive", "it answers the same whatever the image is"
    if evidence.ended_by_budget:
        return "inconclusive", "the budget ended the ladder before its end"
    silent = np.isnan(evidence.close["stability"])
    if silent.any():
        return (
            "inconclusive",
            f"it answers NaN to random changes of {int(silent.sum())} images: no attack gets past that",
        )
    if evidence.unasked > LITTLE * len(standing):
        return "inconclusive", f"about {evidence.unasked:.0f} more images would fall to slow attacks that only some got"
    blind = standing & (evidence.ce == 0) & (evidence.margin == 0)
    if blind.sum() > POINTS * standing.sum():
        return "inconclusive", f"{int(blind.sum())} images that stand have no gradient, and only queries were left"
    if standing.any() and _has(found, NOT_THE_SLOPE):
        return "inconclusive", f"{NOT_THE_SLOPE}: no attack that follows it says anything about what stands"
    if standing.any():
        hard, solved_hard = int(evidence.hard.sum()), int((evidence.solved & evidence.hard).sum())
        solved = measures.share(solved_hard, hard)
        if hard < FEWEST_HARD and len(evidence.solved):
            said = f"only {hard} of the {len(evidence.solved)} problems that could be posed test the attack"
            return "inconclusive", f"{said} (binarisation test)"
        if not len(evidence.solved):
            drawn = "it answers at random, and " if evidence.is_random else ""
            return "inconclusive", f"{drawn}no problem could be posed to test the attack by (binarisation test)"
        is_one_slip = hard - solved_hard == 1 and hard >= ENOUGH_FOR_A_SLIP
        if (solved.value or 0.0) < STRONG_ENOUGH and not is_one_slip:
            tally = f"{solved_hard} of {hard}"
            return "inconclusive", f"the attack solves {tally} problems that are hard (binarisation test)"
        unbounded = next(sign for sign in found if sign.name == UNBOUNDED)
        if (unbounded.measured.value or 0.0) > MISSED:
            share = f"{unbounded.measured.value:.0%}"
            return "inconclusive", f"cross-entropy fails on {share} of the images even where all images are allowed"
    never = np.isinf(evidence.close["nearest"])
    if never.any():
        return "inconclusive", f"{int(never.sum())} images never fell, whatever the distance"
    return "no", why


FEWEST_WATCHED = 50
"""Right images below which nothing is said: of fewer, none may be missed where one in twenty would be."""

FEWEST_HARD, ENOUGH_FOR_A_SLIP = 4, 8
"""Problems that random draws do not solve, below which the binarisation test shows nothing; and from which on one that
the attack misses is no failure, though it is more than one in twenty."""

MISSED = 0.03
"""Share of the images that an unbounded attack may miss by chance."""

LITTLE = 0.02
"""Share of the images that may be expected to fall to what they were not given, before nothing is said."""


def findings(subject: str, verdict: Verdict, evidence: Evidence, bar: float) -> list[Finding]:
    """SP-E1, SP-E2, SP-E3."""
    return [_robust(subject, verdict, evidence, bar), _gradients(subject, verdict), _claim(subject, verdict, evidence)]


def _robust(subject: str, verdict: Verdict, evidence: Evidence, bar: float) -> Finding:
    n = len(evidence.right)
    expected = measures.share(max(0, round(float(evidence.standing.sum()) - evidence.unasked)), n)
    more = round(evidence.unasked)
    status = judge(expected, bar, good="above")
    if status == "pass" and verdict.masked != "no":
        status = "inconclusive"  # an attack that failed where gradients may be hidden proves nothing
    titles: dict[Status, str] = {
        "pass": f"Robust: at least {bar:.0%} survive all that was tried",
        "fail": f"Not robust: under {bar:.0%} survive",
        "inconclusive": "What survived may not be robust",
    }
    return Finding(
        rule="SP-E1",
        subject=subject,
        title=titles[status],
        status=status,
        severity="high",
        measurements={"worst-case robust accuracy": verdict.robust, "accuracy": verdict.clean}
        | ({"expected, had slow attacks been given all": expected} if more else {}),
        evidence=[
            f"masked: {verdict.masked}; {verdict.why}",
            *(
                f"{step['left_out']} images that stand were not given to {step['name']}, which is slow: "
                "the number is an upper bound"
                for step in evidence.trail
                if step["left_out"]
            ),
            *_on_few(evidence),
        ],
        advice=""
        if status == "pass"
        else "PGD training, or distillation from a PGD-trained teacher (stillproof distill --robust rslad), moves this "
        "number; defensive distillation, rounding and randomness do not.",
    )


def _on_few(evidence: Evidence) -> list[str]:
    """What some of the standing images were not given, in words."""
    spared = int((evidence.standing & ~evidence.watched).sum())
    if not spared:
        return []
    said = (
        f"{spared} images that stand met PGD and the attacks in the white box; converged cross-entropy, random draws "
    )
    return [said + "and a few queries were for the others, to see whether gradients mislead."]


def _gradients(subject: str, verdict: Verdict) -> Finding:
    statuses: dict[Masked, Status] = {"yes": "fail", "no": "pass", "inconclusive": "inconclusive"}
    titles = {
        "yes": "Gradients are masked",
        "no": "Gradients are not masked",
        "inconclusive": "Whether gradients are masked is not known",
    }
    advice = {
        "yes": "Do not report robustness measured with cross-entropy on this output. "
        "Attack the logits with a margin loss (APGD, FMN, C&W), ask without gradients (Square, HopSkipJump), "
        "and show it what fools an undistilled twin.",
        "no": "",
        "inconclusive": "Look at the ladder: give it a larger budget, more images, or an attack written for this "
        "defence (--adaptive).",
    }
    return Finding(
        rule="SP-E2",
        subject=subject,
        title=titles[verdict.masked],
        status=statuses[verdict.masked],
        severity="high",
        measurements={"deployed minus worst case": verdict.gap},
        evidence=[verdict.why, *(f"sign {sign.number}, {sign.name}: {sign.says}" for sign in verdict.causes)],
        advice=advice[verdict.masked],
    )


def _claim(subject: str, verdict: Verdict, evidence: Evidence) -> Finding:
    if evidence.is_black_box:
        status: Status = "inconclusive"
    else:
        status = judge(verdict.hidden, POINTS, good="below")
        if status == "pass" and verdict.masked != "no":
            status = "inconclusive"  # what no attack found cannot be missed by a standard one
    titles: dict[Status, str] = {
        "pass": "A standard attack tells about the truth",
        "fail": "The robustness that a standard attack shows is not there",
        "inconclusive": "Whether a standard attack tells the truth is not settled",
    }
    return Finding(
        rule="SP-E3",
        subject=subject,
        title=titles[status],
        status=status,
        severity="medium",
        measurements={"claimed": verdict.claimed, "actual": verdict.robust, "claimed minus actual": verdict.hidden},
        evidence=["claimed: what PGD on the deployed output leaves standing; actual: the worst case over all attacks"],
        advice="" if status == "pass" else "Report the worst case over several attacks, image by image.",
    )
