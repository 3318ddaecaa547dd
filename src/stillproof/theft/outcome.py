"""What is left where the training of a thief's copy, or of a hardened classifier, diverged: a word in its artefact."""

from __future__ import annotations

from stillproof.core.store import Artefact

DIVERGED = "diverged"
"""The value of an artefact that says how the training of its classifier diverged."""


def divergence_of(artefact: Artefact) -> str | None:
    """How the training of a classifier diverged, or None: it did not."""
    found = artefact.values.get(DIVERGED)
    return None if found is None else str(found)
