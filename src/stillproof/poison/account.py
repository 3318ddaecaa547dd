"""All that a poisoning, or a scan for one, showed, as tables and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stillproof.core import measures
from stillproof.core.measurement import Measurement
from stillproof.findings import Curve, Series, Table
from stillproof.poison.scan_set.sight import Scores, p_values
from stillproof.poison.scan_set.verdict import Scanned
from stillproof.poison.scan_student.bank import Reaction
from stillproof.poison.scan_student.suspicion import LEAST_GAP, Sought
from stillproof.poison.scan_student.verdict import Inspected
from stillproof.poison.verdict import Planted

REACTIONS = 12
"""Triggers that a table names."""

LISTED = 50
"""Flagged images that a table names."""

Cell = str | int | float | Measurement | None


def students_table(title: str, rows: Sequence[Planted]) -> Table:
    """What each transfer set did."""
    columns = [
        "students of",
        "ASR",
        "lift over clean students",
        "ASR of another trigger",
        "test accuracy",
        "accuracy with the trigger",
        "accuracy lost",
    ]
    cells: list[list[Cell]] = [
        [row.name, row.asr, row.lift, row.other, row.accuracy, row.robust, row.lost] for row in rows
    ]
    return Table(
        title=title,
        columns=columns,
        rows=cells,
        note="ASR: share of other classes' test images, with the trigger and no δ, that are taken for the target.",
    )


def poison_table(crafted: Mapping[str, tuple[Measurement, Measurement, Measurement]]) -> Table:
    """What the teacher says of what was added: (taken for the target, mean probability of the target, taken for it of
    all that was tried)."""
    rows: list[list[Cell]] = [[name, *said] for name, said in crafted.items()]
    return Table(
        title="What the teacher says of what was added",
        columns=["added", "taken for the target", "p(target)", "taken for it, of all tried"],
        rows=rows,
        note="After it was stored as 8 bits, passed through the codec, and loaded again. What deceives best is added.",
    )


def rates(modes: Mapping[str, Sequence[Planted]]) -> Curve:
    """ASR by what was added."""

    def series(mode: str, rows: Sequence[Planted]) -> Series:
        shares = [row.asr for row in rows]
        return Series(
            name=f"{mode} labels",
            x=[row.name for row in rows],
            y=[share.value for share in shares],
            low=[share.low for share in shares],
            high=[share.high for share in shares],
        )

    return Curve(
        title="Attack success",
        kind="bars",
        x_label="added to the transfer set",
        y_label="ASR",
        series=[series(mode, rows) for mode, rows in modes.items()],
    )


def scanners_table(scores: Mapping[str, Scores], false_alarms: float) -> Table:
    """How many images each scanner alone would flag."""
    rows: list[list[Cell]] = []
    for name, one in scores.items():
        p = p_values(one)
        rows.append([name, measures.share(int((p <= false_alarms).sum()), len(p)), float(p.min())])
    return Table(
        title="Scanners",
        columns=["scanner", "flagged", "smallest p"],
        rows=rows,
        note=f"At a rate of false alarms of {false_alarms:.1%}; thresholds come from the trusted images alone.",
    )


def classes_table(scanned: Scanned, suspicious: np.ndarray) -> Table:
    """What is flagged by predicted class, and what the reference disagrees with."""
    rows: list[list[Cell]] = []
    for index, (name, flagged) in enumerate(zip(scanned.classes, scanned.by_class(), strict=True)):
        here = scanned.guessed == index
        rows.append([name, int(here.sum()), flagged, measures.share(int(suspicious[here].sum()), int(here.sum()))])
    return Table(
        title="By the class that the teacher sees",
        columns=["class", "images", "flagged", "suspicious by agreement"],
        rows=rows,
        note="Suspicious: p of the agreement at most .05. Poison gathers in the class that it is aimed at.",
    )


def flagged_table(scanned: Scanned, p: np.ndarray, scores: Mapping[str, Scores], rows: np.ndarray) -> Table:
    """The most suspicious images. rows: int64, (N,), of the source."""
    order = np.lexsort((-scores["combined"].suspects, p))[: min(LISTED, int(scanned.flagged.sum()))]
    names = [name for name in scores if name != "combined"]
    cells: list[list[Cell]] = [
        [
            int(rows[place]),
            scanned.classes[scanned.guessed[place]],
            float(p[place]),
            *(float(scores[name].suspects[place]) for name in names),
        ]
        for place in order
    ]
    return Table(
        title="The most suspicious images",
        columns=["row", "the teacher sees", "p", *names],
        rows=cells,
        note="agreement: 1 − cosine of the logits of teacher and reference; shared pattern: in deviations of clean "
        "images; wandering pattern: 1 is what one in fifty images of other classes has, 0 a class "
        "without one. All that is flagged is in the manifest beside the cleaned set.",
    )


def reactions_table(reactions: Sequence[Reaction], classes: Sequence[str]) -> Table:
    """The triggers of the bank that the student reacts to most."""
    rows: list[list[Cell]] = [
        [
            one.trigger,
            classes[one.target],
            measures.share(one.student, one.n),
            measures.share(one.teacher, one.n),
            one.usual,
            one.p,
        ]
        for one in reactions[:REACTIONS]
    ]
    return Table(
        title="Triggers of the bank",
        columns=["trigger", "taken for", "by the student", "by its teacher", "clean students over the teacher", "p"],
        rows=rows,
        note="Of the trusted images that neither it, its teacher nor a clean student takes for that class. p: "
        "McNemar's, after Bonferroni over the bank.",
    )


def student_classes_table(seen: Inspected) -> Table:
    """A verdict a class, and what speaks for it."""
    rows: list[list[Cell]] = []
    for target, name in enumerate(seen.classes):
        triggers = [one for one in seen.reactions if one.target == target]
        gap = max((one.gap - max(one.usual, 0.0) for one in triggers), default=None)
        masks = [one for one in seen.sought if one.family == "mask" and one.target == target]
        own = next((one for one in masks if one.model == "student"), None)
        usual = min((one.size for one in masks if one.model != "student" and one.gap >= LEAST_GAP), default=None)
        guilty = [one.trigger for one in seen.reacting if one.target == target]
        guilty += [f"a {one.family} change" for one in seen.backdoored if one.target == target]
        shown = "reacts, as a poor student may" if seen.is_poor else "backdoor"  # the verdict leaves that open, too
        said = f"{shown}: {guilty[0]}" if guilty else "too few images" if target in seen.unseen else "none found"
        rows.append([name, said, gap, own.gap if own else None, own.size if own else None, usual])
    return Table(
        title="By the class that a trigger would call forth",
        columns=[
            "class",
            "verdict",
            "best of the bank, beyond clean students",
            "mask: beyond the teacher",
            "its pixels",
            "smallest in a clean student",
        ],
        rows=rows,
        note=f"The last: of masks that move a clean student by {LEAST_GAP:.0%} or more; empty where none does.",
    )


def inversions_table(sought: Sequence[Sought], classes: Sequence[str]) -> Table:
    """The smallest changes that were found for each class, in the student and in clean ones."""
    rows: list[list[Cell]] = [
        [one.family, classes[one.target], one.model, one.student, one.teacher, one.size]
        for one in sorted(sought, key=lambda one: (one.family, one.target))  # the student's beside the clean ones'
    ]
    return Table(
        title="Changes that were sought",
        columns=["family", "class", "in", "its rate", "the teacher's", "size"],
        rows=rows,
        note="Rates of held-out trusted images that are then taken for the class. Size: pixels of a mask; the largest "
        "change of a pixel.",
    )


def detection_table(scores: Mapping[str, Scores], is_poison: np.ndarray, false_alarms: float) -> Table:
    """How well each scanner finds what was planted. is_poison: bool, (N,), which the scanners did not know."""
    rows: list[list[Cell]] = []
    for name, one in scores.items():
        flagged = p_values(one) <= false_alarms
        rows.append(
            [
                name,
                measures.share(int(flagged[is_poison].sum()), int(is_poison.sum())),
                measures.share(int(flagged[~is_poison].sum()), int((~is_poison).sum())),
                area_under_curve(one.suspects[is_poison], one.suspects[~is_poison]),
            ]
        )
    return Table(
        title="The scan, beside what was planted",
        columns=["scanner", "poison found", "clean images flagged", "AUROC"],
        rows=rows,
        note=f"At a nominal rate of false alarms of {false_alarms:.1%}; the scanners knew neither trigger nor target.",
    )


def area_under_curve(poison: np.ndarray, clean: np.ndarray) -> float:
    """AUROC: the chance that poison scores above a clean image (Mann and Whitney); ties count half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([poison, clean]))[: len(poison)]
    return float((ranks.mean() - (len(poison) + 1) / 2) / len(clean))


def histogram(scores: Scores) -> Curve:
    """Combined scores of the transfer set beside those of trusted images; 1 is what trusted images rarely exceed."""
    edges = np.linspace(-1, max(2.0, float(np.quantile(scores.suspects, 0.999))), 41)
    middles = [float(edge) for edge in (edges[:-1] + edges[1:]) / 2]

    def series(name: str, values: np.ndarray) -> Series:
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        return Series(name=name, x=middles, y=[float(count) / max(1, len(values)) for count in counts])

    return Curve(
        title="Suspicion",
        kind="line",
        x_label="combined score",
        y_label="share of images",
        series=[series("transfer set", scores.suspects), series("trusted", scores.trusted)],
    )
