"""Images as a report shows them: some side by side, in one PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from stillproof.findings import Picture

LEAST_SIDE = 96
"""Pixels that the shorter side of a picture gets at least."""


def side_by_side(title: str, panels: Sequence[np.ndarray]) -> Picture:
    """Images of one shape, (C, H, W), in [0, 1]; small ones are enlarged without smoothing."""
    pixels = np.concatenate(list(panels), axis=2)
    array = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    image = Image.fromarray(array[0]) if len(array) == 1 else Image.fromarray(array[:3].transpose(1, 2, 0))
    factor = max(1, -(-LEAST_SIDE // image.height))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    content = io.BytesIO()
    image.save(content, format="PNG")
    return Picture(title=title, png=base64.b64encode(content.getvalue()).decode())


def magnified(difference: np.ndarray) -> tuple[np.ndarray, float]:
    """A difference of images around grey, as large as it can be shown, and by how much it was magnified."""
    factor = 1 / (2 * max(float(np.abs(difference).max()), 1e-12))
    return 0.5 + difference * factor, factor
