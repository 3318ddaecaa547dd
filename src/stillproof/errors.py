"""Everything Stillproof raises on purpose.

StillproofError
├── InputError          what the user gave cannot be used: a file, a SPEC, a setting, images, a model
├── StoreError          an artefact or a run cannot be written or read back
├── TrainingDiverged    a loss became non-finite
└── BudgetExceeded      an oracle was asked for more than it answers

A message says what is wrong, where, and what to do next. The command line prints it and exits 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StillproofError(Exception):
    """Base of all errors. `what` holds what is wrong and where; `hint` says what to do next."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what, hint)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return "\n  ".join([*self.what.splitlines(), *self.hint.splitlines()])


class InputError(StillproofError):
    """What the user gave cannot be used."""


class StoreError(StillproofError):
    """An artefact or a run directory cannot be written or read back."""


class TrainingDiverged(StillproofError):  # noqa: N818 - it names what happened, as the field says it
    """A training loss became NaN or infinite."""


class BudgetExceeded(StillproofError):  # noqa: N818
    """An oracle was asked for more answers than its budget allows; none of the batch was answered."""


def reason(error: BaseException) -> str:
    """The first line of what another library's error says; its type's name if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known name, and all of them."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    suggestion = f"Did you mean {close[0]!r}? " if close else ""
    return f"{suggestion}Known: {', '.join(options) or 'none'}."
