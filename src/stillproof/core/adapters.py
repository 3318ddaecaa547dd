"""Thin layers around a model that make it a classifier: images in [0, 1] in, logits out.

What they add has no weights of its own: a state dict is always that of the model within (`inner`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.zoo.common import Normalise


def normalised(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """A classifier of images in [0, 1] from a model that takes normalised ones.

    mean, std: per channel, in [0, 1] pixels, as the model was trained with.
    """
    return nn.Sequential(Normalise(tuple(mean), tuple(std)), model)


class Adapter(nn.Module):
    """A model with something around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Answered(Adapter):
    """The logits of a model that returns them, or an object that has them as `.logits`."""

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits, (N, K)."""
        answer = self.model(images)
        logits: Tensor = getattr(answer, "logits", answer)
        return logits


class Prepared(Adapter):
    """Images as a model of another library wants them: of its size, normalised its way.

    size: to which images are scaled (bilinear, smoothed), or 0 to leave them; mean, std: as in `normalised`.
    """

    def __init__(self, model: nn.Module, *, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(model)
        self.size = size
        self.normalise = Normalise(tuple(mean), tuple(std))

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> whatever the model returns."""
        if self.size and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        answer: Tensor = self.model(self.normalise(images))
        return answer


def logits_of(probabilities: Tensor) -> Tensor:
    """log p, which softmax turns back into p; finite where p is 0. Of any shape and kind of float."""
    return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()


class FromProbabilities(Adapter):
    """Logits for a model that returns probabilities."""

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> log-probabilities, (N, K)."""
        probabilities: Tensor = self.model(images)
        return logits_of(probabilities.float())  # half precision has no room for what is tiny


def inner(classifier: nn.Module) -> nn.Module:
    """The model within all adapters."""
    while isinstance(classifier, Adapter):
        classifier = classifier.model
    return classifier
