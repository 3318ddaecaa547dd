"""Thieves, one a file: what each reads of an answer, and what it tries before it settles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch

from stillproof.core.classifiers import Model
from stillproof.core.features import feature_maps
from stillproof.core.sources import Source
from stillproof.theft.lesson import Candidate

NOTHING = "nothing of a defence"
DEFENDED = "that there may be a defence"
PEOPLES = "nothing; has other people's images"
"""What a thief knows beyond what all know: its queries, the form of the answers, the victim's classes."""


class Thief(Protocol):
    """A way to distil an oracle's answers. A frozen dataclass; options that are None are tuned.

    The answers reach its objectives as the column `teacher`: log-probabilities, (N, K), -inf where 0.
    """

    reads: ClassVar[Literal["scores", "label"]]
    """What an answer must hold for it: scores of classes, or the class alone."""

    @property
    def knows(self) -> str:
        """Of a defence, and what it has beside its queries; in words."""

    @property
    def needs_labels(self) -> bool:
        """Whether it uses the true labels of its queries."""

    @property
    def title(self) -> str:
        """How a report calls it."""

    def candidates(self) -> tuple[Candidate, ...]:
        """What it tries on four fifths of its queries; the rest decides (theft.stages).

        Together they train at most theft.lesson.BUDGET students.
        """


@dataclass(frozen=True)
class Prospect:
    """What can be known of a theft before anything runs."""

    classes: int
    source: Source
    student: Model

    @cached_property
    def feature_maps(self) -> bool:
        """Whether inner layers of the student give maps, (n, C, H, W). Opens the source, and builds the student."""
        shape = self.source.open().train.shape
        return bool(feature_maps(self.student.fresh(shape, self.classes, 0), torch.zeros(2, *shape)))


@runtime_checkable
class Demanding(Protocol):
    """A thief that cannot work with every student, or with any number of classes."""

    def why_not(self, prospect: Prospect) -> str:
        """Why it cannot work here; empty if it can."""


TEMPERATURES = (0.5, 1.0, 4.0, 8.0, 20.0)
"""From below the unsoftened answer, for what a response has flattened, to the temperature of the field's CIFAR-100
thieves."""


def titled(name: str, options: Mapping[str, float | None]) -> str:
    """A thief's title: its name, and which of its options are fixed rather than tuned."""
    fixed = [f"{sign} = {value:g}" for sign, value in options.items() if value is not None]
    return f"{name}, fixed {', '.join(fixed)}" if fixed else name


def tried(value: float | None, *otherwise: float) -> tuple[float, ...]:
    """What is tried of an option: what it is fixed at, or else these."""
    return otherwise if value is None else (value,)


class Tuned(ABC):
    """A thief that reads scores, uses labels, and differs from others by what it tries."""

    called: ClassVar[str]
    signs: ClassVar[Mapping[str, str]]
    """Its options, and how a title writes them."""

    needs_labels: ClassVar[bool] = True
    reads: ClassVar[Literal["scores", "label"]] = "scores"
    knows: ClassVar[str] = NOTHING

    def __post_init__(self) -> None:
        self.candidates()  # raises for what no candidate can be built from

    @property
    def title(self) -> str:
        return titled(self.called, {sign: getattr(self, option) for option, sign in self.signs.items()})

    @abstractmethod
    def candidates(self) -> tuple[Candidate, ...]:
        """What it tries: see `Thief`."""
