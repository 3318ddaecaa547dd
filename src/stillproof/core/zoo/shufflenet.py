"""ShuffleNet V2 for small images (Ma et al. 2018, arXiv 1807.11164)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import channel_shuffle

from stillproof.core.zoo.common import centred, check_shape, convolution
from stillproof.errors import InputError

DEPTHS = (4, 8, 4)


def _branch(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        convolution(inputs, outputs, kernel=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        convolution(outputs, outputs, stride=stride, groups=outputs),
        nn.BatchNorm2d(outputs),
        convolution(outputs, outputs, kernel=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class _Unit(nn.Module):
    """Half of the channels pass unchanged; then the halves are mixed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, 1)

    def forward(self, features: Tensor) -> Tensor:
        kept, worked = features.chunk(2, dim=1)
        mixed: Tensor = channel_shuffle(torch.cat([kept, self.branch(worked)], dim=1), 2)
        return mixed


class _DownUnit(nn.Module):
    """Both halves are made from all channels, at half the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.branch = _branch(inputs, half, 2)
        self.shortcut = nn.Sequential(
            convolution(inputs, inputs, stride=2, groups=inputs),
            nn.BatchNorm2d(inputs),
            convolution(inputs, half, kernel=1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
        )

    def forward(self, features: Tensor) -> Tensor:
        mixed: Tensor = channel_shuffle(torch.cat([self.shortcut(features), self.branch(features)], dim=1), 2)
        return mixed


def shufflenetv2(*, channels: int, size: int, classes: int, width: int = 116) -> nn.Module:
    """ShuffleNet V2 1× with the stem of small images (stride 1, no pooling): 1.26 million parameters at width 116.

    width: the channels of the first stage, an even number; 48, 116 and 176 are the 0.5×, 1× and 1.5× of the paper (its
    2× has 244, and a last convolution twice as wide).
    """
    check_shape(channels, size, width)
    if width % 2:
        raise InputError(f"width={width} cannot be halved.", "ShuffleNet splits its channels: give an even width.")
    layers: list[nn.Module] = [convolution(channels, 24), nn.BatchNorm2d(24), nn.ReLU()]
    inputs = 24
    for stage, depth in enumerate(DEPTHS):
        outputs = width * 2**stage
        layers += [_DownUnit(inputs, outputs), *(_Unit(outputs) for _ in range(depth - 1))]
        inputs = outputs
    last = 1024
    layers += [convolution(inputs, last, kernel=1), nn.BatchNorm2d(last), nn.ReLU()]
    return nn.Sequential(centred(channels), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes))
