"""What an adversarial image looks like: clean, adversarial, and the difference magnified, side by side."""

from __future__ import annotations

import numpy as np

from stillproof.core.store import Artefact
from stillproof.findings import Picture
from stillproof.pictures import magnified, side_by_side


def strip(audited: Artefact) -> list[Picture]:
    """A picture for each of the first images that fell."""
    found: list[Picture] = []
    clean, adversarial = audited.tensors["shown.clean"], audited.tensors["shown.adversarial"]
    labels, classes = audited.tensors["labels"], audited.values["classes"]
    for place, row in enumerate(audited.values["shown"]):
        before = clean[place].numpy().astype(np.float32) / 255
        after = adversarial[place].numpy()
        difference, factor = magnified(after - before)
        name = classes[int(labels[row])]
        title = f"image {row} ({name}): clean, adversarial, difference × {factor:.0f}"
        found.append(side_by_side(title, [before, after, difference]))
    return found
