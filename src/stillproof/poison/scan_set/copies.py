"""Images that are nearly the same: rounded otherwise, or through another codec.

They are no witnesses of each other. A filter that was made of an image's twin finds the image, whatever is in it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stillproof.core.images import batches
from stillproof.core.noise import derive

BLOCKS = 4
"""An image's signature: the means of so many by so many blocks, per channel."""

NEAR, NEAR_OF_SPREAD = 4.0, 0.07
"""Of 255, by which no block of a copy differs, and of the blocks' deviation over the set, whichever is less: of JPEG at
quality 75 to 95 nearly none does (CIFAR-10), and of 20 000 images that are not copies no two are so near."""

TABLES, BITS = 4, 24
"""Hash tables, and hyperplanes of each: copies fall on the same side of nearly all."""

WINDOW = 32
"""Of many images with one hash, so many neighbours are compared with each."""


def near_copies(images: Tensor, seed: int) -> Tensor:
    """For each image, uint8, (N, C, H, W), the row of the first that it is nearly like, itself if there is none."""
    signatures = torch.cat([_signature(images[rows]) for rows in batches(len(images), 4096)])
    centred = (signatures - signatures.mean(0)).double()
    near = min(NEAR, NEAR_OF_SPREAD * float(centred.square().mean().sqrt()))
    leader = np.arange(len(images))
    for table in range(TABLES):
        drawn = torch.Generator().manual_seed(derive(seed, "hyperplanes", table))
        planes = torch.randn(centred.shape[1], BITS, generator=drawn, dtype=torch.float64)
        codes = ((centred @ planes > 0).long() << torch.arange(BITS)).sum(1).numpy()
        for bucket in _buckets(codes):
            _join(bucket, signatures.numpy(), leader, near)
    return torch.tensor([_leader_of(row, leader) for row in range(len(images))], dtype=torch.int64)


def _signature(images: Tensor) -> Tensor:
    height, width = (min(BLOCKS, side) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images.float(), (height, width)).flatten(1)


def _buckets(codes: np.ndarray) -> Iterator[np.ndarray]:
    """Rows with the same code, where there are several."""
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order])) + 1
    return (rows for rows in np.split(order, starts) if len(rows) > 1)


def _join(rows: np.ndarray, signatures: np.ndarray, leader: np.ndarray, near: float) -> None:
    """Near images join the first of their groups, if it is near as well: likeness is not passed along a chain."""
    rows = rows[np.lexsort(signatures[rows].T)]
    for step in range(1, min(len(rows), WINDOW + 1)):
        alike = np.abs(signatures[rows[step:]] - signatures[rows[:-step]]).max(axis=1) <= near
        for first, second in zip(rows[:-step][alike], rows[step:][alike], strict=True):
            one, other = _leader_of(int(first), leader), _leader_of(int(second), leader)
            if np.abs(signatures[one] - signatures[other]).max() <= near:
                leader[max(one, other)] = min(one, other)


def _leader_of(row: int, leader: np.ndarray) -> int:
    while leader[row] != row:
        row = int(leader[row])
    return row
