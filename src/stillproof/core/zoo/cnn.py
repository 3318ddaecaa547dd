"""The small convolutional student of the theft literature."""

from __future__ import annotations

from torch import nn

from stillproof.core.zoo.common import centred, check_shape, convolution


def cnn(*, channels: int, size: int, classes: int, width: int = 32) -> nn.Module:
    """Three conv-BN-pool-ReLU blocks and one hidden layer: the `cnn` student of the theft literature.

    357 000 parameters at 32×32 and width 32.
    """
    check_shape(channels, size, width)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [convolution(inputs, outputs), nn.BatchNorm2d(outputs), nn.MaxPool2d(2), nn.ReLU()]

    hidden = 4 * width
    return nn.Sequential(
        centred(channels),
        *block(channels, width),
        *block(width, 2 * width),
        *block(2 * width, 4 * width),
        nn.Flatten(),
        nn.Linear(4 * width * (size // 8) ** 2, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )
