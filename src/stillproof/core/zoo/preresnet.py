"""Pre-activation residual networks of the CIFAR form (He et al. 2016, arXiv 1603.05027)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillproof.core.zoo.common import centred, check_shape, convolution


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(inputs)
        self.first = convolution(inputs, outputs, stride=stride)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.second = convolution(outputs, outputs)
        self.projection = None if inputs == outputs else convolution(inputs, outputs, kernel=1, stride=stride)

    def forward(self, features: Tensor) -> Tensor:
        active = torch.relu(self.first_norm(features))
        shortcut = features if self.projection is None else self.projection(active)
        inner: Tensor = self.second(torch.relu(self.second_norm(self.first(active))))
        return inner + shortcut


def preresnet20(*, channels: int, size: int, classes: int, width: int = 16) -> nn.Module:
    """Pre-activation ResNet-20, shortcuts by projection: 272 000 parameters at width 16."""
    return _preresnet(3, channels, size, classes, width)


def preresnet32(*, channels: int, size: int, classes: int, width: int = 16) -> nn.Module:
    """Pre-activation ResNet-32, shortcuts by projection: 466 000 parameters at width 16."""
    return _preresnet(5, channels, size, classes, width)


def _preresnet(depth: int, channels: int, size: int, classes: int, width: int) -> nn.Module:
    check_shape(channels, size, width)
    layers: list[nn.Module] = [convolution(channels, width)]
    inputs = width
    for stage in range(3):
        outputs = width * 2**stage
        for number in range(depth):
            layers.append(_Block(inputs, outputs, 2 if stage and not number else 1))
            inputs = outputs
    head = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(centred(channels), *layers, *head)
