"""A classifier with signs in the middle: one of the planted truths, in a file of its own, as its code is in the key."""

from __future__ import annotations

from torch import Tensor, nn


class Sign(nn.Module):
    """The sign, with a derivative while it is trained, and none where it is deployed."""

    def forward(self, features: Tensor) -> Tensor:
        """Any shape."""
        if not self.training:
            return features.sign()
        near = features.clamp(-1, 1)
        return near + (features.sign() - near).detach()


class Signs(nn.Sequential):
    """A small convolutional network with a sign in the middle."""

    def __init__(self, *, channels: int, size: int, classes: int) -> None:
        super().__init__(
            *_block(channels, 32),
            nn.ReLU(),
            *_block(32, 64),
            Sign(),
            nn.Flatten(),
            nn.Linear(64 * (size // 4) ** 2, classes),
        )


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.MaxPool2d(2)]
