"""The attack of AST's reference code: PGD on normalised images, clamped to [0, 1] as if they were pixels.

What it cuts is nearly half of an image: 0 is the channel's mean and 1 a standard deviation above it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.attacks.frozen import frozen
from stillproof.core.images import ImageSet, batches
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError


@dataclass(frozen=True, kw_only=True)
class NormalisedPGD:
    """Signed steps up the cross-entropy, in units of the channels' standard deviations; the last iterate is kept.

        x' = clamp(x + clamp(x' + s·sign ∇ − x, −ε, ε), 0, 1),   x = (pixel − mean) / std

    The clamp to [0, 1] comes last and wins: where the image is below −ε or above 1 + ε the result leaves the ball.
    Source: the reference code of Yilmaz & Keles 2024, arXiv 2403.05181 (ε .3, step .01, 40 steps, no random start).
    """

    epsilon: float = 0.3
    step: float = 0.01
    steps: int = 40

    def __post_init__(self) -> None:
        if self.epsilon <= 0 or self.step <= 0 or self.steps < 1:
            raise InputError(f"{self} cannot run.", "A positive epsilon and step, and 1 or more steps.")

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, *, mean: Tensor, std: Tensor, runtime: Runtime
    ) -> Tensor:
        """Twins as pixels, from a channel's mean to a standard deviation above: float32, (N, C, H, W), on the CPU.

        images: float32 in [0, 1], (N, C, H, W); labels: int64, (N,); mean, std: of the channels, (C,), in pixels.
        """
        mean, std = (values.view(1, -1, 1, 1).to(runtime.device) for values in (mean, std))
        labels = labels.to(runtime.device)
        origin = (images.to(runtime.device) - mean) / std
        low, high = ((origin + side * self.epsilon).clamp(0, 1) for side in (-1, 1))  # both clamps at once
        current = origin
        with frozen(classifier, images, runtime) as model:
            for _ in range(self.steps):
                pixels = (mean + std * current).contiguous(memory_format=runtime.memory_format)
                slope = model.slope(pixels, lambda logits: F.cross_entropy(logits, labels, reduction="none"))
                current = (current + self.step * slope.gradient.sign()).clamp(
                    low, high
                )  # std > 0: the sign is the same
        return (mean + std * current).cpu()


def channel_statistics(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all pixels, in [0, 1]: float32, (C,) each."""
    sums = torch.zeros(2, images.shape[0], dtype=torch.float64)
    for rows in batches(len(images), 4096):
        pixels = images.images[rows].double() / 255
        sums += torch.stack([pixels.sum(dim=(0, 2, 3)), pixels.square().sum(dim=(0, 2, 3))])
    mean, square = sums / (len(images) * images.shape[1] * images.shape[2])
    std = (square - mean.square()).clamp_min(0).sqrt().clamp_min(1 / 255)  # a channel that never varies has no scale
    return mean.float(), std.float()
