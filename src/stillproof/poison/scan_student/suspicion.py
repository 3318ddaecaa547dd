"""From the changes that were sought in a student, and in clean ones, to the classes that have a backdoor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stillproof.poison.scan_student.bank import FAMILYWISE
from stillproof.poison.scan_student.inversion import outliers

LEAST_GAP = 0.5
"""Of the student's rate over its teacher's, for a change to be a backdoor's."""

ODD = 2.0
"""Anomaly index of a mask's size beyond which it is an outlier (Wang et al. 2019)."""

SMALLER = 0.5
"""Share of the smallest mask that does the same to a clean student."""

FAR_BEYOND = 0.25
"""By how much a mask must do more than any does to a clean student, where none does so much to a clean one at all."""

BEYOND = 0.1
"""By how much a bounded change must do more than any does to a clean student."""

FEWEST_CLASSES = 5
"""Of which a mask moves the student: with fewer, the median absolute deviation of their sizes says nothing."""


@dataclass(frozen=True, slots=True)
class Sought:
    """What was found for a class in a model (`student`, or a clean one): the rates of both, the change's size, and
    McNemar's p of the held-out images that it was judged on."""

    model: str
    family: str
    target: int
    student: float
    teacher: float
    size: float
    p: float

    @property
    def gap(self) -> float:
        """The student's rate less the teacher's."""
        return self.student - self.teacher


def backdoored(sought: Sequence[Sought]) -> list[Sought]:
    """The changes of the student that a clean one has nothing like.

    A mask must be an outlier among the classes', and at most half of any that does this to a clean student for the same
    class; with few classes the second alone. Where no mask does this to a clean student, however large, it must do far
    more than they do. A bounded change has no size: it must do more than any does to a clean student. What was judged
    on so few images that it may be luck is none, after Bonferroni over the classes and families.
    """
    found: list[Sought] = []
    clean = [one for one in sought if one.model != "student"]
    masks = [one for one in sought if one.model == "student" and one.family == "mask" and one.gap >= LEAST_GAP]
    for one, index in zip(masks, outliers([mask.size for mask in masks]), strict=True):
        usual = [other for other in clean if other.family == "mask" and other.target == one.target]
        like = [other.size for other in usual if other.gap >= LEAST_GAP]
        is_odd = index > ODD or len(masks) < FEWEST_CLASSES
        is_small = bool(like) and is_odd and one.size <= SMALLER * min(like)
        is_alone = bool(usual) and not like and one.gap >= FAR_BEYOND + max(other.gap for other in usual)
        if is_small or is_alone:
            found.append(one)
    most = max((other.gap for other in clean if other.family == "bounded"), default=0.0)
    found += [
        one
        for one in sought
        if one.model == "student" and one.family == "bounded" and one.gap >= max(LEAST_GAP, most + BEYOND)
    ]
    tried = sum(one.model == "student" for one in sought)
    return [one for one in found if one.p * tried < FAMILYWISE]
