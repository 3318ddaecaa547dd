"""What poison looks like, and what a scan found of it."""

from __future__ import annotations

import numpy as np
import torch

from stillproof.core.images import ImageSet
from stillproof.core.store import Artefact
from stillproof.findings import Picture
from stillproof.pictures import magnified, side_by_side
from stillproof.poison.scan_student.verdict import Inspected
from stillproof.poison.scanning import PATTERNS, pattern_of
from stillproof.poison.triggers import Stamp

SHOWN = 8
"""Flagged images in a picture."""

HELD = {"shared pattern": "share", "wandering pattern": "hold, wherever it is"}
"""What images do with the pattern that a scanner of PATTERNS seeks."""


def beside(crafted: Artefact) -> list[Picture]:
    """A picture for each of the first images that were crafted."""
    found: list[Picture] = []
    for number, source in enumerate(crafted.tensors["sources"]):
        before, after = (
            image.numpy().astype(np.float32) / 255 for image in (source, crafted.tensors["images"][number])
        )
        difference, factor = magnified(after - before)
        title = f"poison {number}: its source, what is added, difference × {factor:.2g}"
        found.append(side_by_side(title, [before, after, difference]))
    return found


def recovered(scanned: Artefact, seen: Inspected) -> list[Picture]:
    """On grey: the trigger of the bank that the student reacts to most, and the changes that were sought in it, of the
    classes that have a backdoor; else of that where most was found. scanned: of `scan_student`."""

    def shown(name: str) -> np.ndarray:
        keep, add = scanned.tensors[f"{name}.keep"], scanned.tensors[f"{name}.add"]
        painted: np.ndarray = Stamp(keep, add)(torch.full_like(keep, 0.5)[None])[0].numpy()
        return painted

    most = seen.reactions[0]
    gap = f"{most.gap:+.0%} over the teacher"
    found = [side_by_side(f"{most.trigger}, taken for {seen.classes[most.target]!r} ({gap})", [shown("strongest")])]
    own = [one for one in seen.sought if one.model == "student"]
    for one in seen.backdoored or sorted(own, key=lambda one: one.gap)[-1:]:
        title = f"the {one.family} that makes the student say {seen.classes[one.target]!r} ({one.gap:+.0%})"
        found.append(side_by_side(title, [shown(f"{one.family}.{one.target}")]))
    return found


def found_by(scanned: Artefact, shown: ImageSet) -> list[Picture]:
    """The pattern that the flagged images of the worst class share, and some of these images. shown: all suspects."""
    flagged, guessed = scanned.tensors["flagged"], scanned.tensors["guessed"]
    if not flagged.any():
        return []
    worst = int(guessed[flagged].bincount().argmax())
    name = scanned.values["classes"][worst]
    found: list[Picture] = []
    for scanner in PATTERNS:
        pattern = pattern_of(scanned, scanner, worst)
        if pattern is not None:
            picture, factor = magnified(pattern.numpy())
            found.append(side_by_side(f"what suspicious images of {name!r} {HELD[scanner]}, × {factor:.2g}", [picture]))
    p = scanned.tensors["p"].masked_fill(~(flagged & (guessed == worst)), 2.0)
    rows = p.argsort(stable=True)[: min(SHOWN, int((p < 2).sum()))]
    images = [image.numpy().astype(np.float32) / 255 for image in shown.images[rows]]
    return [*found, side_by_side(f"flagged, and taken for {name!r} by the teacher", images)] if images else found
