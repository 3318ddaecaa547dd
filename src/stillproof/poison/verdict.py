"""From measured numbers to findings: can the pipeline be backdoored? NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillproof.core import measures
from stillproof.core.measurement import Measurement
from stillproof.findings import Finding, Status, judge

ENOUGH_CRAFTED = 0.9
"""Share of the poison that must deceive the teacher, or a student that stays clean shows nothing."""


@dataclass(frozen=True, slots=True)
class Guesses:
    """Predictions of one classifier on the test images, int64, (N,): clean, with the trigger, with another trigger."""

    clean: np.ndarray
    triggered: np.ndarray
    other: np.ndarray
    labels: np.ndarray

    def hits(self, target: int, guesses: np.ndarray) -> np.ndarray:
        """Of the images that are not the target's: which are taken for it, bool, (n,)."""
        found: np.ndarray = guesses[self.labels != target] == target
        return found


@dataclass(frozen=True, slots=True)
class Planted:
    """Students of one transfer set, a seed each, with those of the clean set and the same seeds.

    asr: attack success rate; lift: over the clean students; other: rate of another trigger; accuracy: on clean test
    images; robust: on triggered ones, of all classes; lost: accuracy that is lost to the poison.
    """

    name: str
    asr: Measurement
    lift: Measurement
    other: Measurement
    accuracy: Measurement
    robust: Measurement
    lost: Measurement


def planted(name: str, students: Sequence[Guesses], clean: Sequence[Guesses], target: int) -> Planted:
    """What a transfer set did to the students that were distilled on it."""
    hits, usual = (np.stack([one.hits(target, one.triggered) for one in some]) for some in (students, clean))
    right, expected = (np.stack([one.clean == one.labels for one in some]) for some in (students, clean))
    return Planted(
        name,
        asr=measures.mean_share(hits),
        lift=measures.difference(hits, usual),
        other=measures.mean_share(np.stack([one.hits(target, one.other) for one in students])),
        accuracy=measures.mean_share(right),
        robust=measures.mean_share(np.stack([one.triggered == one.labels for one in students])),
        lost=measures.difference(expected, right),
    )


def of_the_pipeline(subject: str, found: Planted, teacher: Measurement, crafted: Measurement, bar: float) -> Finding:
    """SP-P1: whether this poison backdoors the student.

    teacher: the teacher's own rate of the trigger; crafted: the share of the poison that deceives it. What was not
    crafted well shows nothing.
    """
    status: Status = judge(found.lift, bar, good="below")
    is_weak = crafted.value is None or crafted.value < ENOUGH_CRAFTED
    if status == "pass" and is_weak:
        status = "inconclusive"
    evidence = [
        f"with the trigger, {found.asr.value:.1%} of other classes' test images are taken for the target; of the "
        f"teacher {teacher.value:.1%}.",
        f"{crafted.value:.1%} of the poison deceives the teacher after it was stored and loaded again.",
    ]
    if is_weak:
        evidence.append("The poison itself is weak: a student that stays clean shows little.")
    titles: dict[Status, str] = {
        "fail": "The poisoned transfer set plants a backdoor",
        "pass": "This poison plants no backdoor",
        "inconclusive": "Whether this poison plants a backdoor is open",
    }
    return Finding(
        rule="SP-P1",
        subject=subject,
        title=titles[status],
        status=status,
        severity="high",
        measurements={
            "ASR": found.asr,
            "ASR lift over clean students": found.lift,
            "teacher's ASR": teacher,
            "poison that deceives the teacher": crafted,
            "accuracy lost": found.lost,
        },
        evidence=evidence,
        advice=ADVICE[status],
    )


ADVICE: dict[Status, str] = {
    "fail": "A clean teacher does not protect its student: scan what you distil on (`stillproof scan`), keep a trusted "
    "set that nobody else can write to, and distil with `stillproof distill --resistant`.",
    "pass": "Try other triggers, a higher rate and a larger ε before you rely on it.",
    "inconclusive": "Give more seeds, more steps or a larger ε.",
}
