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
