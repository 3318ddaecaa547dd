"""Classifiers and data that tests name with module:factory."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn


class RandomLabels(nn.Module):
    """Answers every image with a class that depends on its pixels and on nothing that can be learnt."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.flatten(1) * 255).round().long()
        places = torch.arange(1, pixels.shape[1] + 1, device=pixels.device)
        chosen = ((pixels * places * 2654435761).sum(1) >> 7) % self.classes
        return 6 * nn.functional.one_hot(chosen, self.classes).float() + 0 * images.flatten(1).sum(1, keepdim=True)


def random_labels(classes: int) -> nn.Module:
    return RandomLabels(classes)


class Bad(nn.Module):
    """Logits of a given number of classes, times something."""

    def __init__(self, classes: int, factor: float) -> None:
        super().__init__()
        self.classes, self.factor = classes, factor

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * images.flatten(1)[:, : self.classes]


def nan_outputs(classes: int) -> nn.Module:
    return Bad(classes, float("nan"))


def seven_classes() -> nn.Module:
    return Bad(7, 1.0)


class Certain(nn.Module):
    """A small trained-alike classifier that returns probabilities."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * size * size, 32), nn.ReLU(), nn.Linear(32, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.layers(images).softmax(dim=1)
        return probabilities


def probabilities(channels: int, size: int, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return Certain(channels, size, classes)


A_MODEL = nn.Linear(2, 2)


def leaves() -> nn.Module:
    sys.exit(0)


class Leaving(nn.Module):
    def forward(self, _images: Tensor) -> Tensor:
        sys.exit(0)


def leaves_later() -> nn.Module:
    return Leaving()


def fails() -> nn.Module:
    raise RuntimeError("boom")


def chatty(channels: int, size: int, classes: int) -> nn.Module:
    print("hello")
    return probabilities(channels, size, classes)


class Wavering(Certain):
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits + torch.rand_like(logits)


def wavering(channels: int, size: int, classes: int) -> nn.Module:
    return Wavering(channels, size, classes)


def linear(channels: int, size: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes))
