"""What the zoo's architectures share: the normalisation at their front, and the images they were built for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillproof.errors import InputError


class Normalise(nn.Module):
    """(x − mean) / std per channel, as the first layer of a classifier.

    mean, std: per channel, or one for all channels, in pixels of [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise InputError(f"mean {mean} and std {std} do not fit.", "Give one of each per channel, std above 0.")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W). Raises InputError for grey images that would be broadcast to more channels."""
        if images.shape[1] != self.mean.shape[1] > 1:
            raise InputError(
                f"this classifier takes {self.mean.shape[1]} channels, and the images have {images.shape[1]}.",
                "Give images of the kind that it was made for.",
            )
        return (images - self.mean) / self.std


def centred(channels: int) -> Normalise:
    """[0, 1] -> [-2, 2]; what the data's own statistics would add, the first batch norm supplies."""
    return Normalise((0.5,) * channels, (0.25,) * channels)


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size, or divides it by the stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class BranchNorm(nn.BatchNorm2d):
    """The last batch norm of a residual branch: its scale begins at a fifth, so that a block begins near the identity.

    Source: Goyal et al. 2017, arXiv 1706.02677, who begin at 0.
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, 0.2)


def check_shape(channels: int, size: int, width: int) -> None:
    """Raise InputError for what the zoo was not built for."""
    if channels not in (1, 3) or not 8 <= size <= 64:
        raise InputError(
            f"zoo models take 1 or 3 channels and 8×8 to 64×64 pixels, not {channels} and {size}×{size}.",
            "Resize the images, or bring your own model with module:factory.",
        )
    if not 1 <= width <= MOST_WIDTH:
        raise InputError(f"width={width} is not a width.", f"Use 1 to {MOST_WIDTH}.")


MOST_WIDTH = 1024
