"""The account of an audit: all that was seen, as tables and curves. NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from stillproof.core import measures
from stillproof.core.measurement import Measurement
from stillproof.evasion.evidence import Evidence, within
from stillproof.evasion.indicators import NO_RISE, margins_of
from stillproof.evasion.verdict import STRONG_ENOUGH, Verdict
from stillproof.findings import Curve, Series, Table


def tables(verdict: Verdict, evidence: Evidence) -> list[Table]:
    """The ladder, the signs, and the red team's table."""
    found = [_trail(evidence), _signs(verdict), _symptoms(verdict, evidence)]
    return found if evidence.is_black_box else [*found, _tested(evidence)]


def _tested(evidence: Evidence) -> Table:
    posed, hard = len(evidence.solved), evidence.hard
    rows: list[list[str | int | float | Measurement | None]] = [
        ["the attack", measures.share(int(evidence.solved.sum()), posed)],
        ["as many random draws", measures.share(int(evidence.lucky.sum()), posed)],
        ["the attack, of what they do not", measures.share(int((evidence.solved & hard).sum()), int(hard.sum()))],
    ]
    note = (
        f"Problems that have a solution by construction, posed around {posed} images. An attack that is strong enough "
    )
    note += f"for this classifier solves {STRONG_ENOUGH:.0%} of those that random draws do not solve."
    return Table(title="Is the attack strong enough? (binarisation test)", columns=["", "solved"], rows=rows, note=note)


def self_test(verdicts: Mapping[str, Verdict]) -> Table:
    """What the audit says of the user's own classifier, and of twins that were planted to be told apart."""
    expected = {"masked twin": "yes", "clean twin": "no"}
    rows: list[list[str | int | float | Measurement | None]] = [
        [name, expected.get(name, ""), verdict.masked, verdict.claimed, verdict.robust, verdict.why]
        for name, verdict in verdicts.items()
    ]
    columns = ["classifier", "masked as planted", "masked as found", "claimed", "worst case", "why"]
    note = "The masked twin is the model with its logits multiplied: the same decisions, hidden gradients."
    return Table(title="Self-test", columns=columns, rows=rows, note=note)


def _trail(evidence: Evidence) -> Table:
    rows: list[list[str | int | float | Measurement | None]] = []
    n = len(evidence.right)
    for step in evidence.trail:
        cost = f"{step['queries']:,} queries" if step["queries"] else f"{step['forwards'] + step['backwards']:,} passes"
        rows.append(
            [
                step["name"],
                step["asked"],
                step["fell"],
                measures.share(step["standing"], n),
                cost if step["ran"] else "",
                round(step["seconds"], 1) if step["ran"] else None,
                step["why"],
            ]
        )
    columns = ["attack", "images", "fell", "robust accuracy after it", "cost", "seconds", "why"]
    note = "An image that falls leaves the ladder."
    if not evidence.is_black_box:
        watched, right = int((evidence.watched & evidence.right).sum()), int(evidence.right.sum())
        which = "all images" if watched == right else f"those of the first {watched} images that it classifies rightly"
        note += f" What shows whether the deployed gradient misleads is given {which} that this was not yet fooled on, "
        note += "also those that something else has fooled."
    return Table(title="The ladder", columns=columns, rows=rows, note=note)


def _signs(verdict: Verdict) -> Table:
    said = {True: "yes", False: "no", None: "not measured"}
    rows: list[list[str | int | float | Measurement | None]] = [
        [
            f"{sign.number}{', causal' if sign.is_causal else ''}: {sign.name}",
            sign.measured,
            sign.threshold,
            said[sign.is_present],
            sign.says + (f" (images {', '.join(map(str, sign.images))})" if sign.images else ""),
        ]
        for sign in verdict.signs
    ]
    columns = ["sign", "measured", "a sign if", "present", "what it says"]
    return Table(title="Signs of masked gradients", columns=columns, rows=rows, note=f"Masked: {verdict.masked}.")


def _symptoms(verdict: Verdict, evidence: Evidence) -> Table:
    stood, right = int(evidence.stood_deployed.sum()), int(evidence.settled.sum())
    survived = measures.share(stood, right)
    often = survived.value is not None and survived.value > 0.5
    hidden = next(sign for sign in verdict.signs if sign.number == 3)
    flat = next((sign for sign in verdict.signs if sign.name == NO_RISE), None)
    dead = [sign for sign in verdict.signs if sign.number == 1 and sign.is_present]
    rows: list[list[str | int | float | Measurement | None]] = [
        [
            "FGSM and PGD nearly never succeed",
            survived,
            "not seen"
            if not often
            else "gradients vanish or are noise"
            if dead or verdict.masked == "yes"
            else "it may be robust: see the worst case",
            "an attack that does not use the standard loss's gradient: C&W or a margin loss on the logits",
        ],
        [
            "robust in the white box, but queries or transfer succeed",
            hidden.measured,
            "the defence hides, it does not remove" if hidden.is_present else "not seen",
            "C&W on the logits; Square and HopSkipJump; transfer from a twin",
        ],
        [
            "outputs hardly move under small changes",
            flat.measured if flat else None,
            "the surface was smoothed artificially" if flat and flat.is_present else "not seen",
            "raise epsilon and the iterations until the cliffs show",
        ],
    ]
    return Table(title="The red team's table", columns=["symptom", "seen here", "cause", "do next"], rows=rows)


SHARES_OF_EPSILON = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
"""Where the curve is drawn, in units of epsilon."""


def curves(evidence: Evidence, epsilon: float) -> list[Curve]:
    """The ladder as a picture; accuracy against epsilon; margins; gradients."""
    return [_ladder(evidence), _against_epsilon(evidence, epsilon), *_histograms(evidence)]


def _ladder(evidence: Evidence) -> Curve:
    n = len(evidence.right)
    ran = [step for step in evidence.trail if step["ran"]]
    shares = [measures.share(int(evidence.right.sum()), n)] + [measures.share(step["standing"], n) for step in ran]
    series = Series(
        name="standing",
        x=["no attack", *(step["name"] for step in ran)],
        y=[share.value for share in shares],
        low=[share.low for share in shares],
        high=[share.high for share in shares],
    )
    return Curve(title="The ladder", kind="bars", x_label="after", y_label="robust accuracy", series=[series])


def _against_epsilon(evidence: Evidence, epsilon: float) -> Curve:
    nearest = np.minimum(evidence.distance[evidence.close_rows], evidence.close.get("nearest", np.inf))
    accuracy = float(evidence.right.mean()) if len(evidence.right) else 0.0
    radii = [factor * epsilon for factor in SHARES_OF_EPSILON]
    if len(nearest) and np.isfinite(nearest).any():
        radii += [float(nearest[np.isfinite(nearest)].max()) * 1.01]
    radii = sorted(set(radii))
    beyond = [~within(nearest, radius) for radius in radii]
    shares = [measures.share(int(away.sum()), len(nearest)) for away in beyond]

    def of_all(value: float | None) -> float | None:
        return None if value is None else value * accuracy

    series = Series(
        name="worst case",
        x=radii,
        y=[of_all(share.value) for share in shares],
        low=[of_all(share.low) for share in shares],
        high=[of_all(share.high) for share in shares],
    )
    never = int(np.isinf(nearest).sum())
    note = f"From the nearest adversarial images of {len(nearest)} that are classified rightly. " + (
        f"{never} of them never fell, so the curve does not reach 0: do not trust it."
        if never
        else "It reaches 0, as it must."
        if len(nearest)
        else "There is none."
    )
    return Curve(
        title="Accuracy against epsilon",
        kind="line",
        x_label="epsilon",
        y_label="robust accuracy",
        series=[series],
        note=note,
    )


BINS = 12


def _histograms(evidence: Evidence) -> list[Curve]:
    if evidence.outputs == "labels":
        return []
    found = [_histogram("Margins of the logits", "margin", margins_of(evidence.logits, evidence.labels), 0)]
    if not evidence.is_black_box:
        alive = evidence.ce[evidence.ce > 0]
        dead = int((evidence.ce == 0).sum())
        title, label = "Gradients of the cross-entropy", "log₁₀ of the largest entry"
        found.append(_histogram(title, label, np.log10(alive) if len(alive) else alive, dead))
    return found


def _histogram(title: str, label: str, values: np.ndarray, zeros: int) -> Curve:
    counts, edges = np.histogram(values, bins=BINS) if len(values) else (np.zeros(0), np.zeros(1))
    names = [f"{low:.3g}" for low in edges[:-1]]
    heights = [float(count) for count in counts]
    if zeros:
        names, heights = ["exactly 0", *names], [float(zeros), *heights]
    series = Series(name="images", x=names, y=list(heights))
    return Curve(title=title, kind="bars", x_label=label, y_label="images", series=[series])
