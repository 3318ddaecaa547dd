"""A small vision transformer, pre-norm, patches pooled by their mean (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.zoo.common import centred, check_shape
from stillproof.errors import InputError


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.look = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        n, length, width = tokens.shape
        split = self.look(tokens).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2])
        found: Tensor = self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return found


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), _Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens)
        out: Tensor = tokens + self.mlp(tokens)
        return out


class _Patches(nn.Module):
    """Images as a sequence of patches, each with its learned place."""

    def __init__(self, channels: int, size: int, patch: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, patch, patch)
        self.place = nn.Parameter(torch.empty(1, (size // patch) ** 2, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Places begin as small noise (σ = .02), as in the paper's code."""
        nn.init.trunc_normal_(self.place, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.project(images).flatten(2).transpose(1, 2) + self.place
        return out


class _MeanOfTokens(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(dim=1)


def vit(
    *, channels: int, size: int, classes: int, patch: int = 4, depth: int = 6, width: int = 192, heads: int = 3
) -> nn.Module:
    """A vision transformer: 2.7 million parameters at the defaults and 32×32.

    patch: the side of a patch, in pixels; images whose size it does not divide lose a margin. width: of a token, a
    multiple of the heads.
    """
    check_shape(channels, size, width)
    if not 1 <= patch <= size or not 1 <= depth <= 100 or heads < 1 or width % heads:
        raise InputError(
            f"patch={patch}, depth={depth}, width={width}, heads={heads} is no transformer of {size}×{size} images.",
            f"A patch is 1 to {size}, the depth 1 to 100, and the width a multiple of the heads.",
        )
    return nn.Sequential(
        centred(channels),
        _Patches(channels, size, patch, width),
        *(_Block(width, heads) for _ in range(depth)),
        nn.LayerNorm(width),
        _MeanOfTokens(),
        nn.Linear(width, classes),
    )
