"""From the scores of a scan to what is said of a transfer set (SP-P2): is there more than a clean set would show?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stillproof.core import measures
from stillproof.core.measurement import Measurement
from stillproof.findings import Finding, Status

SURE = 1e-3
"""Chance of as many flagged images in a clean set, below which a set is not clean."""

UNUSUAL = 0.02
"""Chance above which nothing stands out."""

MANY = 0.05
"""Share of a set's images that is not to be overlooked."""

SPREAD = 0.4
"""How much of what the most flagged class has beyond the false alarms another has that stands out as well."""

AIMED = 1 / 3
"""Of what is flagged beyond the false alarms, the part of the class that has most, at least, if poison is aimed."""

HARDLY = 0.1
"""Of a class's share of the set: so much less of the trusted images are taken for it that they say nothing of it."""

MIXED = 0.25
"""Total variation of the classes' shares, from which a set is mixed otherwise than the trusted one."""

HEAVY, HEAVY_COPIES, HEAVY_CLASS, FEWEST_WEIGHED = 3.0, 1.5, 0.2, 20
"""Times the rate of false alarms, flagged and flagged as copies, or share of one class (of so many images at least, and
as many times that of its trusted ones), that is not passed over, though it may be a few images over and over."""

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

    p: of each image, (N,); disagreement: p by D1 alone, whether the references say what the teacher says; guessed: the
    teacher's classes, int64, (N,); original: bool, (N,), one of all images that are copies, or nearly, of each other;
    usual_p, usual: p and guessed of trusted images; alike: share of trusted images on which references that had not
    seen them say what the teacher says; shared: images that are trusted ones as well.
    """

    p: np.ndarray
    disagreement: np.ndarray
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
        return self._chance(self.p)

    @property
    def are_agreed_upon(self) -> bool:
        """Whether the references say of the images what the teacher says, as usual: of poison they do not."""
        return self._chance(self.disagreement) >= UNUSUAL

    def _chance(self, p: np.ndarray) -> float:
        trusted, once = len(self.usual), p[self.original & ~np.isin(self.guessed, self.unknown)]
        most = max(1, math.floor(self.false_alarms * (trusted + 1) + 1e-9))
        ranks = [most >> halving for halving in range(most.bit_length())]
        found = [excess(int((once <= rank / (trusted + 1) + 1e-12).sum()), len(once), rank, trusted) for rank in ranks]
        return min(1.0, len(ranks) * min(found))

    @property
    def least_seen(self) -> float:
        """The share of poison, all of it flagged, that would just be told from chance."""
        n = int(self.original.sum())
        low, high = 0, n
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
    def largest_part(self) -> float:
        """Of all that is flagged beyond the false alarms, what one class has."""
        images, flagged = (
            np.bincount(one, minlength=len(self.classes)) for one in (self.guessed, self.guessed[self.flagged])
        )
        beyond = np.maximum(flagged - self.false_alarms * images, 0)
        return float(beyond.max() / beyond.sum()) if beyond.any() else 1.0

    @property
    def unknown(self) -> list[int]:
        """The classes that many images are taken for, and hardly a trusted one: nobody knows what is usual there."""
        counts, usual = self._mix(self.guessed), self._mix(self.usual)
        return [int(index) for index in np.flatnonzero((counts > MANY) & (usual < HARDLY * counts))]

    @property
    def is_of_another_mix(self) -> bool:
        """Whether the classes are mixed otherwise than among the trusted, by more than samples of one mix are: what is
        rare there may be usual here."""
        here, there = self._mix(self.guessed), self._mix(self.usual)
        both = (here * len(self.guessed) + there * len(self.usual)) / (len(self.guessed) + len(self.usual))
        spread = both * (1 - both) * (1 / max(1, len(self.guessed)) + 1 / max(1, len(self.usual)))
        by_chance = np.sqrt(2 / math.pi * spread).sum()
        return float(np.abs(here - there).sum() - by_chance) / 2 > MIXED

    def _mix(self, classes: np.ndarray) -> np.ndarray:
        counts: np.ndarray = np.bincount(classes, minlength=len(self.classes)) / max(1, len(classes))
        return counts

    @property
    def weighs(self) -> bool:
        """Whether much more is flagged than by chance, each copy counted: that is what a student would learn."""
        copies = float((self.flagged & ~self.original).mean()) / self.false_alarms
        times = (self.share.value or 0.0) / self.false_alarms
        return times > HEAVY or copies > HEAVY_COPIES or self._weighs_in_a_class()

    def _weighs_in_a_class(self) -> bool:
        alarms = self.usual_p <= self.false_alarms
        for index, share in enumerate(self.by_class()):
            known = alarms[self.usual == index]
            usual = max(self.false_alarms, float(known.mean()) if len(known) else 0.0)
            if share.n >= FEWEST_WEIGHED and (share.value or 0.0) > max(HEAVY_CLASS, HEAVY * usual):
                return True
        return False

    @property
    def doubt(self) -> str:
        """Why nothing found shows nothing; empty where it shows something."""
        chance = 1 / len(self.classes)
        if self.unknown:
            missing = ", ".join(repr(self.classes[index]) for index in self.unknown[:5])
            return f"many images are taken for {missing}, and hardly a trusted one is: nobody knows what is usual there"
        if self.shared > MANY * len(self.p):
            return (
                f"{self.shared} of the {len(self.p)} images are trusted as well, or nearly, and so taken for clean "
                "(give trusted images of another source)"
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
    rarest = min(1.0, 2 * min(scanned.chance, *gathered))  # two ways to stand out
    mixed = scanned.is_of_another_mix and 2 * min(gathered) >= SURE
    is_open = bool(scanned.doubt) or rarest < UNUSUAL or scanned.weighs
    shares = [share.value or 0.0 for share in scanned.by_class()]
    most = min(range(len(shares)), key=lambda index: (gathered[index], -shares[index]))
    others = max((share for index, share in enumerate(shares) if index != most), default=0.0)
    beyond = [share - scanned.false_alarms for share in shares]
    raised = sum(share > SPREAD * max(beyond[most], 0.0) for share in beyond)
    is_spread = raised > len(shares) / 2 or scanned.largest_part < AIMED
    is_harmless = is_spread and scanned.are_agreed_upon
    proves = rarest < SURE and not mixed and not is_harmless
    status: Status = "fail" if proves else "inconclusive" if is_open else "pass"
    evidence = [
        f"{int(scanned.flagged.sum())} of {len(scanned.p)} images are flagged at a rate of false alarms of "
        f"{scanned.false_alarms:.1%}; as many, or as many that are as rare, in a clean set: p = {scanned.chance:.1g}.",
        f"{shares[most]:.1%} of what the teacher takes for {scanned.classes[most]!r} is flagged (beside its trusted "
        f"images: p = {gathered[most]:.1g}), and at most {others:.1%} of any other class.",
    ]
    if status != "fail" and scanned.doubt:
        seen = "What is flagged is no proof:" if scanned.weighs or rarest < UNUSUAL else "Nothing stands out, but"
        evidence.append(f"{seen} {scanned.doubt}.")
    elif status == "inconclusive" and rarest < SURE and is_harmless:
        evidence.append(
            "What is flagged is spread over the classes, and the references agree with the teacher on it: another "
            "source, codec, border or logo would do that, which the trusted images have not. So would a trigger with "
            "many targets that deceives references as well: look at them, or give trusted images like these."
        )
    elif status == "inconclusive" and rarest < SURE:
        evidence.append(
            "That would be rare if its classes were mixed as the trusted ones are. They are not, and what is rare "
            "there may be usual here: give trusted images in this mix."
        )
    elif status == "inconclusive" and rarest >= UNUSUAL:
        copied = "Counted once each they are not many, and their copies are: a student learns each copy. Look at them."
        many = "Much more is flagged than by chance, of few images or beside as few trusted ones: look at them."
        evidence.append(many if scanned.original.all() else copied)
    elif status == "inconclusive":
        evidence.append("That is unusual, and no proof.")
    elif status == "pass":
        evidence.append(f"Less than {scanned.least_seen:.1%} of poison, all of it flagged, would not have shown.")
    elif is_spread:
        evidence.append(
            "What is flagged is spread over the classes, and the references disagree with the teacher on more than "
            "usual: a trigger with many targets does that, and images of another kind than the trusted ones."
        )
    elif raised > 1:
        evidence.append(f"{raised} classes stand out: as many targets, or images of another source among them.")
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
        "can a trigger that is no pattern (a warp, a shade), or a small one at another place in each of few images. "
        "Scan the student.",
    )
