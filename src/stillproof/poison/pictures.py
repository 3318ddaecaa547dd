"""What poison looks like: the image it was made of, what is added to the transfer set, and the difference magnified."""

from __future__ import annotations

import numpy as np

from stillproof.core.store import Artefact
from stillproof.findings import Picture
from stillproof.pictures import magnified, side_by_side


def beside(crafted: Artefact) -> list[Picture]:
    """A picture for each of the first images that were crafted."""
    found: list[Picture] = []
    for number, source in enumerate(crafted.tensors["sources"]):
        before, after = (
            image.numpy().astype(np.float32) / 255 for image in (source, crafted.tensors["images"][number])
        )
        difference, factor = magnified(after - before)
        title = f"poison {number}: its source, what is added, difference × {factor:.0f}"
        found.append(side_by_side(title, [before, after, difference]))
    return found
