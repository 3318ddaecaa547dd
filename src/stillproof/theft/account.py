"""The account of a theft: all that was measured, and the findings made of it. NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from stillproof.core.measurement import Measurement
from stillproof.findings import Finding
from stillproof.theft import protection
from stillproof.theft.protection import Theft

Array = npt.NDArray[Any]

VICTIM = "victim"
"""The name under which the undefended victim is served."""


@dataclass(frozen=True, slots=True)
class Student:
    """A thief's student, or the reference, seed by seed."""

    title: str
    knows: str
    """Of a defence, and what it has beside its queries."""
    candidates: tuple[str, ...]
    """What was tried, in words."""
    temperatures: tuple[float, ...]
    """At which T, for those that distil; else empty."""
    chosen: Sequence[int | None]
    """Which candidate each seed settled on; None where all diverged."""
    scores: Array
    """Held-out score of every candidate, (seeds, candidates)."""
    losses: Array
    """Held-out loss of every candidate, (seeds, candidates)."""
    logits: Sequence[Array]
    """On the test images, one (N, K) a seed."""
    queries: int
    bits: float
    judged: bool = True
    """Whether a finding may be decided by it."""
    diverged: Sequence[str] = ()
    """How its training did, in each seed in which it did: its logits there are those of an untrained network."""

    @property
    def guesses(self) -> list[Array]:
        """Predicted classes, one (N,) a seed."""
        return [logits.argmax(axis=1) for logits in self.logits]

    @property
    def score(self) -> list[float]:
        """The held-out score of what was chosen, seed by seed, in those in which something was."""
        return [float(row[index]) for row, index in zip(self.scores, self.chosen, strict=True) if index is not None]

    @property
    def settings(self) -> str:
        """What was chosen, in words."""
        return "; ".join("diverged" if index is None else self.candidates[index] for index in self.chosen)


@dataclass(frozen=True, slots=True)
class Response:
    """What is known of the response of a defence before anything is measured."""

    title: str
    keeps_argmax: bool
    """Whether it promises to."""
    alone: bool
    """Whether the classifier behind it is the victim itself: nothing was trained anew."""
    tuned: tuple[str, ...] = ()
    """The strength that it was calibrated to, seed by seed."""
    known: bool = True
    """Whether a thief took part who knows it."""


@dataclass(frozen=True, slots=True)
class Reused:
    """Adversarial examples of a copy, shown to what is served: bool, one (n,) a seed.

    right: it was right to begin with; fell: it was fooled; lucky: it was fooled by one random change of the same size.
    """

    title: str
    """Whose copy."""
    right: Sequence[Array]
    fell: Sequence[Array]
    lucky: Sequence[Array]


@dataclass(frozen=True, slots=True)
class Account:
    """Logits are (N, K), one array a seed; test logits are all of the same images, with these labels."""

    labels: Array
    served: Mapping[str, Sequence[Array]]
    """Test logits of the victim and of each defence."""
    responses: Mapping[str, Response]
    """Of the defences that have one."""
    signals: Mapping[str, Sequence[Array]]
    """The same on each seed's queries."""
    retrained: Sequence[Array] | None
    """Logits on the queries of another, undefended victim; None where no defence retrains."""
    thefts: Mapping[str, Mapping[str, Student]]
    """Thieves by what was served and by their SPEC."""
    reference: Student | None
    """None where the thief has no labels."""
    floor: str | None
    """The label-only thief's SPEC, if it took part; without labels it is the baseline."""
    fixed: str | None
    """The SPEC of the thief who does not tune, if it took part."""
    tuned: str | None
    """The SPEC of the thief whose scores over temperatures are drawn, if it took part."""
    pretrained: bool
    """Whether thieves and reference began with weights that the thief's model brought."""
    brought: bool
    """Whether the victim came with its weights: what it was trained on is then not known."""
    deterministic: bool
    """Whether the victim gave the same answer twice when it was looked at."""
    diverged: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """How the training of a defence diverged, in each seed in which it did."""
    reused: Mapping[str, Mapping[str, Reused]] = field(default_factory=dict)
    """What adversarial examples of each copy did to what is served, by that and the thief's SPEC; if it was asked."""

    @property
    def asked(self) -> int:
        """How many queries a thief asks."""
        return max(student.queries for student in self.thefts[VICTIM].values())

    @property
    def defences(self) -> list[str]:
        """What is served besides the victim as it is."""
        return [name for name in self.served if name != VICTIM]

    def theft(self, served: str, thief: str | None = None) -> Theft:
        """The theft by one thief, or by the best of those by whom a finding may be decided."""
        students = self.thefts[served]
        name = thief or self._best(served)
        chosen = students[name]
        baseline = students[self.floor or ""] if self.reference is None else self.reference
        return Theft(
            chosen.title,
            self.right(chosen.logits),
            self.right(baseline.logits),
            "label-only thief" if self.reference is None else "independent reference",
            is_baseline=chosen is baseline,
            thief_diverged=bool(chosen.diverged),
            baseline_diverged=bool(baseline.diverged),
        )

    def _best(self, served: str) -> str:
        """The best thief; where the training of all diverged, the first."""
        able = self._deciding(served)
        if not able:
            return next(key for key, student in self.thefts[served].items() if student.judged)
        return protection.best({key: (student.scores, student.losses) for key, student in able.items()})

    def _deciding(self, served: str) -> dict[str, Student]:
        """The thieves by whom a finding may be decided, and who have a copy."""
        return {key: found for key, found in self.thefts[served].items() if found.judged and not found.diverged}

    def _thefts(self, served: str) -> list[Theft]:
        """Those by which a finding may be decided, the best among them."""
        return [self.theft(served, thief) for thief in self._deciding(served)]

    def accuracy(self, student: Student) -> Measurement:
        """On the test images. Without a value where its training diverged."""
        return protection.copy_accuracy(self.right(student.logits), diverged=bool(student.diverged))

    def summary(self) -> str:
        """The result in one sentence."""
        parts = []
        for name in self.served:
            theft = self.theft(name)
            parts.append(
                f"{name}: the best thief ({theft.thief}) gains {_points(theft.gain)} over the {theft.baseline}"
            )
        return "; ".join(parts) + "."

    # findings

    def findings(self, *, promised: float, utility_budget: float) -> list[Finding]:
        """SP-T1 for everything served, SP-T2 to SP-T4 for every defence."""
        found = []
        for name in self.served:
            circumstances = self._circumstances(name)
            found.append(protection.gain_finding(name, self.theft(name), circumstances, self._thefts(name)))
        for name in self.defences:
            found += self._about(name, promised, utility_budget)
        return found

    def _about(self, name: str, promised: float, utility_budget: float) -> list[Finding]:
        victim, defended = self.right(self.served[VICTIM]), self.right(self.served[name])
        utility = protection.utility_finding(name, victim, defended, utility_budget, self._about_response(name))
        alone = name in self.responses and self.responses[name].alone
        took = protection.took_finding(
            name,
            victim=self.signals[VICTIM],
            defended=self.signals[name],
            retrained=None if alone else self.retrained if self.retrained is not None else self.signals[VICTIM],
            utility=utility.status,
            diverged=self.diverged.get(name, ()),
            deterministic=self.deterministic,
        )
        known = name not in self.responses or self.responses[name].known
        others = self._thefts(name)
        kept = protection.protection_finding(
            name, self.theft(VICTIM), self.theft(name), promised, took.status, known=known, others=others
        )
        return [kept, utility, took]

    def _about_response(self, name: str) -> list[str]:
        """What its users should know of a response, in words."""
        if name not in self.responses:
            return []
        response = self.responses[name]
        best = [np.sort(logits, axis=1)[:, -2:] for logits in self.served[name]]
        tied = float(np.mean([two[:, 0] == two[:, 1] for two in best]))
        promise = "It promises to keep top-1" if response.keeps_argmax else "It does not promise to keep top-1"
        said = [f"The response: {response.title}. {promise}; {tied:.1%} of its test answers name no single class."]
        return said + ([f"Calibrated, seed by seed: {', '.join(response.tuned)}."] if response.tuned else [])

    def _circumstances(self, served: str) -> list[str]:
        unknown = "The victim was brought along: that these queries were not among its training images is not known."
        untrained = "The training of this defence diverged: what the thieves asked is an untrained network (SP-T4)."
        begun = "Thieves and reference begin with the pretrained weights of --thief-model."
        random = (
            "The victim answers the same image differently each time: only repeat-averaging asks about an image again."
        )
        apart = self.apart(served)
        students = [*self.thefts[served].values(), *([self.reference] if self.reference is not None else [])]
        lost = [f"The training of {student.title} diverged: {how}" for student in students for how in student.diverged]
        return [
            self._floor(served),
            *([apart] if apart else []),
            *lost,
            *([unknown] if self.brought else []),
            *([begun] if self.pretrained else []),
            *([] if self.deterministic else [random]),
            *([untrained] if self.diverged.get(served) else []),
        ]

    def _floor(self, served: str) -> str:
        if self.reference is None:
            return "Without labels there is no independent reference: the gain is over the label-only thief."
        if self.floor is None:
            return "The label-only thief did not take part, so the floor of label-keeping defences is not shown."
        floor = self.accuracy(self.thefts[served][self.floor]).value
        if floor is None:
            return "The training of the label-only thief diverged, so the floor of label-keeping defences is not shown."
        return f"The label-only thief, the floor of every defence that keeps top-1, reaches {floor:.1%}."

    def apart(self, served: str) -> str:
        """Who is reported and decides nothing, and why; empty where there is nobody."""
        titles = [student.title for student in self.thefts[served].values() if not student.judged]
        if not titles:
            return ""
        return (
            f"No finding is decided by {', '.join(titles)}: who chooses which images it learns the labels of gains by "
            "that as well, and the reference did not choose."
        )

    def right(self, logits: Sequence[Array]) -> Array:
        """Whether each test image is classified rightly: (seeds, N)."""
        return np.stack([each.argmax(axis=1) == self.labels for each in logits])


def _points(measured: Measurement) -> str:
    if measured.value is None or measured.low is None or measured.high is None:
        return "an unmeasured amount"
    return f"{100 * measured.value:+.1f} points [{100 * measured.low:+.1f}, {100 * measured.high:+.1f}]"
