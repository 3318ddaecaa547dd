"""STRIP, a baseline: does the student stay sure of an image when others are laid over it?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from stillproof.core.classifiers import predict
from stillproof.core.images import ImageSet, batches
from stillproof.core.noise import Noise
from stillproof.core.runtime import Runtime

OVERLAYS = 10
"""Trusted images that are laid over each image, half and half; the paper has 100."""

CHUNK = 2048


def sureness(student: nn.Module, images: Tensor, overlays: Tensor, *, runtime: Runtime, seed: int) -> np.ndarray:
    """Minus the mean entropy of the student's answers to the mixed images, (N,): a trigger keeps it sure.

    images, overlays: uint8, (N, C, H, W) and (M, C, H, W). It asks about the student, who has the backdoor: a clean
    teacher is less sure of what was crafted, and its sign would be wrong. Source: Gao et al. 2019, arXiv 1902.06531.
    """
    found: list[Tensor] = []
    for rows in batches(len(images), CHUNK):
        here = images[rows]
        noise = Noise(seed, torch.arange(rows.start, rows.stop), 0)
        drawn = noise.integers(0, len(overlays), (OVERLAYS,))
        total = torch.zeros(len(here))
        for number in range(OVERLAYS):
            mixed = ((here.int() + overlays[drawn[:, number]].int()) // 2).to(torch.uint8)
            logs = predict(student, ImageSet(mixed, None, (), "mixed"), runtime).log_softmax(1)
            total += (logs.exp() * logs).sum(1)
        found.append(total / OVERLAYS)
    return torch.cat(found).double().numpy() if found else np.zeros(0)
