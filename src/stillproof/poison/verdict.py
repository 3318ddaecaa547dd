"""From measured numbers to findings: can the pipeline be backdoored, was it, and was it kept out?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillproof.core import measures
from stillproof.core.measurement import Measurement
from stillproof.findings import Finding, Status, judge
from stillproof.poison.scan_student.bank import Reaction
from stillproof.poison.scan_student.suspicion import LEAST_GAP, Sought, backdoored

ENOUGH_CRAFTED = 0.8
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


KEPT_OUT = 0.05
"""ASR lift over clean students that a resistant distillation may leave."""

PRICE = 0.05
"""Accuracy that it may cost, whatever it keeps out."""


def of_a_defence(subject: str, found: Planted, undefended: Planted) -> Finding:
    """SP-P4: whether the backdoor was kept out, or driven out, and at what price.

    undefended: students of the same set without the defence: where they have no backdoor, nothing was kept out.
    """
    status = judge(found.lift, KEPT_OUT, good="below")
    evidence = [
        f"ASR {found.asr.value:.1%}, where {undefended.asr.value:.1%} was planted, at {found.lost.value:+.1%} of "
        "accuracy lost to clean students."
    ]
    if status == "pass" and judge(undefended.lift, KEPT_OUT, good="below") != "fail":
        status = "inconclusive"
        evidence.append("The poison plants no backdoor that is beyond noise: there was nothing to keep out.")
    price = judge(found.lost, PRICE, good="below")
    if status == "pass" and price != "pass":
        status = price
        evidence.append(f"It {'costs' if price == 'fail' else 'may cost'} more than {PRICE:.0%} of accuracy.")
    titles: dict[Status, str] = {
        "fail": "The backdoor is there nevertheless, or the student is lost",
        "pass": "The backdoor was kept out",
        "inconclusive": "Whether the backdoor was kept out is open",
    }
    return Finding(
        rule="SP-P4",
        subject=subject,
        title=titles[status],
        status=status,
        severity="high",
        measurements={"ASR lift over clean students": found.lift, "ASR": found.asr, "accuracy lost": found.lost},
        evidence=evidence,
        advice="Combine it with the scan, or give a larger trusted set." if status == "fail" else "",
    )


AS_GOOD = 0.1
"""How far clean students may agree less with the teacher than the suspect does, and still say what is usual."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a scan of a student showed.

    student_alike, clean_alike: shares of held-out trusted images on which the student, and each clean one, say what the
    teacher says.
    """

    reactions: Sequence[Reaction]
    sought: Sequence[Sought]
    classes: tuple[str, ...]
    student_alike: float
    clean_alike: Sequence[float]

    @property
    def backdoored(self) -> list[Sought]:
        """The changes of the student that a clean one has nothing like."""
        return backdoored(self.sought)

    @property
    def reacting(self) -> list[Reaction]:
        """The triggers of the bank that it reacts to as no clean one does."""
        return [one for one in self.reactions if one.is_present]

    @property
    def doubt(self) -> str:
        """Why nothing found shows nothing; empty where it shows something."""
        if min(self.clean_alike) < self.student_alike - AS_GOOD:
            return (
                f"the clean students agree with the teacher on {min(self.clean_alike):.1%} of held-out images, the "
                f"student on {self.student_alike:.1%}: too weak to say what is usual (give more trusted images)"
            )
        if self.student_alike < max(self.clean_alike) - AS_GOOD:
            return (
                f"it agrees with the teacher on {self.student_alike:.1%} of held-out images, clean students on "
                f"{max(self.clean_alike):.1%}: a poor student reacts to anything"
            )
        masks = [one for one in self.sought if one.family == "mask"]
        if not any(one.gap >= LEAST_GAP for one in masks):
            return "no mask was found for any class in any student: the search was too short (--inversion-epochs)"
        return ""


def of_the_student(subject: str, seen: Inspected) -> Finding:
    """SP-P3: whether the student reacts to a trigger that its teacher ignores."""
    suspects, reacting = seen.backdoored, seen.reacting
    is_poor = seen.student_alike < max(seen.clean_alike) - AS_GOOD
    is_backdoored = bool(suspects or (reacting and not is_poor))
    status: Status = "fail" if is_backdoored else "inconclusive" if seen.doubt else "pass"
    evidence = [
        f"{one.trigger}: taken for {seen.classes[one.target]!r} by the student {one.student} times of {one.n}, by its "
        f"teacher {one.teacher} (p = {one.p:.1g}); clean students at most {one.usual:+.1%} over the teacher."
        for one in reacting[:3]
    ]
    evidence += [
        f"a {one.family} change of size {one.size:.3g} makes it say {seen.classes[one.target]!r} for {one.student:.1%} "
        f"of held-out images, its teacher for {one.teacher:.1%}; no clean student has its like."
        for one in suspects[:3]
    ]
    if status != "fail":
        evidence.append(
            f"{'That shows nothing' if reacting else 'Nothing was found, but'}: {seen.doubt}."
            if seen.doubt
            else "Neither the bank nor the inversion found what clean students do not show as well."
        )
    titles: dict[Status, str] = {
        "fail": "The student reacts to a trigger that its teacher ignores",
        "pass": "No trigger was found",
        "inconclusive": "No trigger was found, and none could be relied upon to be",
    }
    most = max((one.gap for one in seen.sought if one.model == "student"), default=0.0)
    bank = max((one.gap for one in seen.reactions), default=0.0)
    return Finding(
        rule="SP-P3",
        subject=subject,
        title=titles[status],
        status=status,
        severity="high",
        measurements={
            "largest gap of the bank": Measurement(value=bank, n=len(seen.reactions), method="over all triggers"),
            "largest gap of the inversion": Measurement(
                value=most, n=len(seen.sought), method="over classes and families"
            ),
        },
        evidence=evidence,
        advice="Do not deploy it: distil again on a scanned set."
        if status == "fail"
        else "A trigger outside the bank that needs a large change may be missed: scan the transfer set as well.",
    )


SURE = 1e-3
"""Chance of as many flagged images in a clean set, below which a set is not clean."""

UNUSUAL = 0.02
"""Chance above which nothing stands out."""

MANY = 0.05
"""Share of a set's images that is not to be overlooked."""

SPREAD = 0.4
"""How much of the most flagged class's share another's has where what is flagged is aimed at no class."""

SEEN = 0.03
"""Share of poison, all of it flagged, that a scan must be able to tell from chance, or it says nothing of a set."""


def excess(found: int, n: int, rank: int, trusted: int) -> float:
    """The chance that as many images of a clean set lie beyond the rank-th rarest trusted one (exact: a beta-binomial).

    The threshold rests on so many trusted images: the share of clean images beyond it is itself random.
    """
    from scipy.stats import betabinom

    return float(betabinom.sf(found - 1, n, rank, trusted + 1 - rank))


@dataclass(frozen=True, slots=True)
class Scanned:
    """What a scan of a transfer set showed.

    p: of each image, (N,); guessed: the teacher's classes, int64, (N,); original: bool, (N,), whether it is no copy of
    one before it; usual_p, usual: p and guessed of trusted images; alike: share of trusted images on which references
    that had not seen them say what the teacher says; shared: images that are trusted ones as well.
    """

    p: np.ndarray
    guessed: np.ndarray
    original: np.ndarray
    usual_p: np.ndarray
    usual: np.ndarray
    classes: tuple[str, ...]
    false_alarms: float
    alike: float
    shared: int = 0

    @property
    def flagged(self) -> np.ndarray:
        """Which images are flagged: bool, (N,)."""
        found: np.ndarray = self.p <= self.false_alarms
        return found

    @property
    def share(self) -> Measurement:
        """Of the set that is flagged."""
        return measures.share(int(self.flagged.sum()), len(self.flagged))

    @property
    def chance(self) -> float:
        """Of so many beyond the rarest trusted images in a clean set: at the rate of false alarms, and at halves of it,
        after Bonferroni. Copies count once."""
        trusted, once = len(self.usual), self.p[self.original & ~np.isin(self.guessed, self.unknown)]
        most = max(1, math.floor(self.false_alarms * (trusted + 1) + 1e-9))
        ranks = [most >> halving for halving in range(most.bit_length())]
        found = [excess(int((once <= rank / (trusted + 1) + 1e-12).sum()), len(once), rank, trusted) for rank in ranks]
        return min(1.0, len(ranks) * min(found))

    @property
    def least_seen(self) -> float:
        """The share of poison, all of it flagged, that would just be told from chance."""
        n, low, high = len(self.p), 0, len(self.p)
        most = max(1, math.floor(self.false_alarms * (len(self.usual) + 1) + 1e-9))
        while low < high:
            middle = (low + high) // 2
            if excess(middle, n, most, len(self.usual)) * most.bit_length() < SURE:
                high = middle
            else:
                low = middle + 1
        return low / n - self.false_alarms

    @property
    def precision(self) -> Measurement:
        """Share of the flagged images that are no false alarms, if these are as many as they should be."""
        n, flagged = len(self.flagged), int(self.flagged.sum())
        if not flagged:
            return measures.unmeasured("nothing is flagged")
        belonging = min(n, (n - flagged) / (1 - self.false_alarms))
        value = min(1.0, max(0.0, 1 - self.false_alarms * belonging / flagged))
        return Measurement(value=value, n=flagged, method="from the nominal rate of false alarms")

    def by_class(self) -> list[Measurement]:
        """Of the images that the teacher takes for each class, the share that is flagged."""
        rows = [self.guessed == index for index in range(len(self.classes))]
        return [measures.share(int(self.flagged[row].sum()), int(row.sum())) for row in rows]

    def gathered(self) -> list[float]:
        """For each class, the chance that so much more of it is flagged than of its trusted images, after Bonferroni
        (Fisher's exact test)."""
        from scipy.stats import fisher_exact

        alarms, found = self.usual_p <= self.false_alarms, []
        for index in range(len(self.classes)):
            here, known = self.flagged[self.original & (self.guessed == index)], alarms[self.usual == index]
            table = [[here.sum(), len(here) - here.sum()], [known.sum(), len(known) - known.sum()]]
            chance = float(fisher_exact(table, alternative="greater")[1])
            found.append(1.0 if index in self.unknown else min(1.0, len(self.classes) * chance))
        return found

    @property
    def unknown(self) -> list[int]:
        """The classes that many images are taken for, and no trusted one: of these nobody knows what is usual."""
        counts = np.bincount(self.guessed, minlength=len(self.classes)) / len(self.guessed)
        usual = np.bincount(self.usual, minlength=len(self.classes))
        return [int(index) for index in np.flatnonzero((counts > MANY) & (usual == 0))]

    @property
    def doubt(self) -> str:
        """Why nothing found shows nothing; empty where it shows something."""
        chance = 1 / len(self.classes)
        if self.unknown:
            missing = ", ".join(repr(self.classes[index]) for index in self.unknown[:5])
            return f"many images are taken for {missing}, and no trusted one is: nobody knows what is usual there"
        if self.shared > MANY * len(self.p):
            return (
                f"{self.shared} of the {len(self.p)} images are trusted as well, and so taken for clean (give trusted "
                "images of another source)"
            )
        if self.alike < (1 + chance) / 2:
            return (
                f"the references agree with the teacher on {self.alike:.1%} of trusted images alone: they learnt too "
                "little (give more trusted images, or --epochs)"
            )
        if self.least_seen > SEEN:
            return (
                f"with {len(self.usual)} trusted images, less than {self.least_seen:.1%} of poison cannot be told from "
                "chance (give more of them)"
            )
        return ""


def of_the_set(subject: str, scanned: Scanned) -> Finding:
    """SP-P2: whether the transfer set holds images that do not belong."""
    gathered = scanned.gathered()
    rarest = min(scanned.chance, *gathered)
    status: Status = "fail" if rarest < SURE else "inconclusive" if scanned.doubt or rarest < UNUSUAL else "pass"
    shares = [share.value or 0.0 for share in scanned.by_class()]
    most = int(np.argmin(gathered))
    others = max((share for index, share in enumerate(shares) if index != most), default=0.0)
    evidence = [
        f"{int(scanned.flagged.sum())} of {len(scanned.p)} images are flagged at a rate of false alarms of "
        f"{scanned.false_alarms:.1%}; as many, or as many that are as rare, in a clean set: p = {scanned.chance:.1g}.",
        f"{shares[most]:.1%} of what the teacher takes for {scanned.classes[most]!r} is flagged (beside its trusted "
        f"images: p = {gathered[most]:.1g}), and at most {others:.1%} of any other class.",
    ]
    if status != "fail" and scanned.doubt:
        evidence.append(f"Nothing stands out, but {scanned.doubt}.")
    elif status == "inconclusive":
        evidence.append("That is unusual, and no proof.")
    elif status == "pass":
        evidence.append(f"Less than {scanned.least_seen:.1%} of poison, all of it flagged, would not have shown.")
    elif others > SPREAD * shares[most]:
        evidence.append(
            "What is flagged is spread over the classes: that looks like another source, codec or border more than "
            "like a backdoor. Are the trusted images like these?"
        )
    titles: dict[Status, str] = {
        "fail": "The transfer set holds images that do not belong",
        "pass": "Nothing stands out",
        "inconclusive": "Whether the transfer set is clean is open",
    }
    return Finding(
        rule="SP-P2",
        subject=subject,
        title=titles[status],
        status=status,
        severity="high",
        measurements={"flagged": scanned.share} | ({"precision": scanned.precision} if status == "fail" else {}),
        evidence=evidence,
        advice="Look at the flagged images: where they come from is the way in. Poison may be left in the cleaned set: "
        "distil on it with `stillproof distill --resistant`, and scan the student."
        if status == "fail"
        else "An attacker who knows this scan can do better (`stillproof poison --fools` shows by how much), and so "
        "can a trigger that is not one pattern at one place, such as a warp.",
    )


ADVICE: dict[Status, str] = {
    "fail": "A clean teacher does not protect its student: scan what you distil on (`stillproof scan`), keep a trusted "
    "set that nobody else can write to, and distil with `stillproof distill --resistant`.",
    "pass": "Try other triggers, a higher rate and a larger ε before you rely on it.",
    "inconclusive": "Give more seeds, more steps or a larger ε.",
}
