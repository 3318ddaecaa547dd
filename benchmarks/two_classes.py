"""CIFAR-10's automobiles and horses: a data set of two classes, for `two_classes:automobiles_and_horses`."""

from __future__ import annotations

import torch

from shared.record import needed_cifar10
from stillproof.core.images import ImageSet
from stillproof.core.sources import open_source
from stillproof.core.sources.source import DataSource, Split

ORIGINAL = (1, 7)


def automobiles_and_horses() -> DataSource:
    """10 000 training and 2 000 test images. Exits where there is no CIFAR-10."""
    place = needed_cifar10("two classes")
    opened = open_source(place).open()
    return DataSource(_of(opened.train, "train"), _of(opened.test, "test"))


def _of(split: Split, name: str) -> ImageSet:
    rows = torch.isin(split.labels, torch.tensor(ORIGINAL)).nonzero()[:, 0]
    images = torch.cat(list(split.read(rows)))
    return ImageSet(images, (split.labels[rows] == ORIGINAL[1]).long(), ("automobile", "horse"), name)
