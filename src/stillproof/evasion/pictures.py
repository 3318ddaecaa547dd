"""What an adversarial image looks like: clean, adversarial, and the difference magnified, side by side."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from stillproof.core.store import Artefact
from stillproof.findings import Picture

LEAST_SIDE = 96
"""Pixels that the shorter side of a picture gets at least."""


def strip(audited: Artefact) -> list[Picture]:
    """A picture for each of the first images that fell."""
    found: list[Picture] = []
    clean, adversarial = audited.tensors["shown.clean"], audited.tensors["shown.adversarial"]
    labels, classes = audited.tensors["labels"], audited.values["classes"]
    for place, row in enumerate(audited.values["shown"]):
        before = clean[place].numpy().astype(np.float32) / 255
        after = adversarial[place].numpy()
        difference = after - before
        largest = float(np.abs(difference).max())
        shown = 0.5 + difference / (2 * max(largest, 1e-12))
        label = int(labels[row])
        name = classes[label]
        title = f"image {row} ({name}): clean, adversarial, difference × {1 / (2 * max(largest, 1e-12)):.0f}"
        found.append(Picture(title=title, png=_png(np.concatenate([before, after, shown], axis=2))))
    return found


def _png(pixels: np.ndarray) -> str:
    """Base64 of a PNG of (C, H, W) in [0, 1]; small images are enlarged without smoothing."""
    array = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    image = Image.fromarray(array[0]) if len(array) == 1 else Image.fromarray(array[:3].transpose(1, 2, 0))
    factor = max(1, -(-LEAST_SIDE // image.height))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    content = io.BytesIO()
    image.save(content, format="PNG")
    return base64.b64encode(content.getvalue()).decode()
