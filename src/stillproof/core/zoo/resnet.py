"""Residual networks with the 3×3 stem of small images (He et al. 2016, arXiv 1512.03385)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillproof.core.zoo.common import BranchNorm, centred, check_shape, convolution


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(inputs, inner, stride=stride)
        self.first_norm = nn.BatchNorm2d(inner)
        self.second = convolution(inner, inner)
        self.second_norm = BranchNorm(inner)
        self.shortcut = _shortcut(inputs, inner, stride)

    def forward(self, features: Tensor) -> Tensor:
        inner = torch.relu(self.first_norm(self.first(features)))
        return torch.relu(self.second_norm(self.second(inner)) + self.shortcut(features))


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = inner * self.expansion
        self.narrow = nn.Sequential(convolution(inputs, inner, kernel=1), nn.BatchNorm2d(inner), nn.ReLU())
        self.look = nn.Sequential(convolution(inner, inner, stride=stride), nn.BatchNorm2d(inner), nn.ReLU())
        self.widen = nn.Sequential(convolution(inner, outputs, kernel=1), BranchNorm(outputs))
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.widen(self.look(self.narrow(features))) + self.shortcut(features))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(convolution(inputs, outputs, kernel=1, stride=stride), nn.BatchNorm2d(outputs))


def resnet18(*, channels: int, size: int, classes: int, width: int = 64) -> nn.Module:
    """ResNet-18 without stem pooling: 11.2 million parameters at width 64."""
    return _resnet(_BasicBlock, (2, 2, 2, 2), channels, size, classes, width)


def resnet50(*, channels: int, size: int, classes: int, width: int = 64) -> nn.Module:
    """ResNet-50, the stride in the 3×3 convolutions, without stem pooling: 23.5 million parameters at width 64."""
    return _resnet(_Bottleneck, (3, 4, 6, 3), channels, size, classes, width)


def _resnet(
    block: type[_BasicBlock | _Bottleneck],
    depths: tuple[int, ...],
    channels: int,
    size: int,
    classes: int,
    width: int,
) -> nn.Module:
    check_shape(channels, size, width)
    layers: list[nn.Module] = [convolution(channels, width), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage, depth in enumerate(depths):
        inner = width * 2**stage
        for number in range(depth):
            layers.append(block(inputs, inner, 2 if stage and not number else 1))
            inputs = inner * block.expansion
    return nn.Sequential(centred(channels), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
