"""What every source of images is: labels at once, pixels when they are asked for, a few at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillproof.core.images import ImageSet, batches, stratified
from stillproof.errors import InputError

Array = npt.NDArray[Any]

MOST_CLASSES = 100_000

CHUNK, CHUNK_BYTES = 4096, 2**26
"""So many images, and so many bytes of pixels, are read at once at most: what a large set costs in memory."""

TEST_SHARE = 0.3
"""Share of each class that becomes the test set where a source has none of its own."""


class DataSource(NamedTuple):
    """Two ImageSets of the same shape and classes."""

    train: ImageSet
    test: ImageSet


class Facts(NamedTuple):
    """What is known of a source before its images are read."""

    train: int
    test: int
    classes: int


class Split(NamedTuple):
    """The training or the test images of a source that was opened."""

    labels: Tensor
    """int64, (N,)."""
    shape: tuple[int, int, int]
    """(C, H, W) of every image."""
    read: Callable[[Tensor], Iterator[Tensor]]
    """Rows (int64, ascending) -> their images in that order, in chunks: uint8, (n, C, H, W). Raises InputError."""

    def subset(self, rows: Tensor) -> Split:
        """Some rows (int64, ascending) of it."""
        return Split(self.labels[rows], self.shape, lambda wanted: self.read(rows[wanted]))


class Opened(NamedTuple):
    """A source whose labels have been read, and whose images can be."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    name: str
    notes: tuple[str, ...] = ()
    """What the user should know of how the images were read."""
    has_own_test: bool = True
    """Whether the source has test images of its own; else some of its images stand in for them."""
    rows: tuple[Tensor, Tensor] | None = None
    """Where the images of both splits stand in a source without test images of its own: int64, (N,) each."""


class Source(ABC):
    """Where images come from. Looking at it is cheap; `open` reads the labels, and its splits the images."""

    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """JSON that changes whenever the images do: part of the key of every stage that uses them."""

    @abstractmethod
    def facts(self) -> Facts:
        """How much there is. Raises InputError."""

    @abstractmethod
    def open(self) -> Opened:
        """Read the labels, and look at the first image. Raises InputError."""

    def load(self) -> DataSource:
        """Read everything into memory. Raises InputError."""
        opened = self.open()

        def whole(split: Split) -> ImageSet:
            images = torch.empty((len(split.labels), *split.shape), dtype=torch.uint8)
            done = 0
            for chunk in split.read(torch.arange(len(split.labels))):
                images[done : done + len(chunk)] = chunk
                done += len(chunk)
            return ImageSet(images, split.labels, opened.classes, opened.name)

        return DataSource(whole(opened.train), whole(opened.test))


def opened(train: Split, test: Split, classes: tuple[str, ...], name: str, notes: tuple[str, ...] = ()) -> Opened:
    """A source with these splits. Raises InputError where they do not fit together."""
    if train.shape != test.shape:
        raise InputError(
            f"training images are {train.shape} and test images {test.shape} in {name!r}.",
            "Both must have one shape (C, H, W); for files of pictures, ?size=PIXELS and ?channels=3 give them one.",
        )
    for labels in (train.labels, test.labels):
        if not len(labels):
            raise InputError(f"{name!r} has too few images for a training and a test set.", "Give more of each class.")
        if int(labels.max()) >= len(classes):
            raise InputError(
                f"labels of {name!r} are out of range: {int(labels.min())} to {int(labels.max())}, but there are "
                f"{len(classes)} classes.",
                f"Labels run from 0 to {len(classes) - 1}; mend the labels or name all classes.",
            )
    return Opened(train, test, classes, name, notes)


def from_sets(train: ImageSet, test: ImageSet, notes: tuple[str, ...] = ()) -> Opened:
    """A source whose images are ImageSets already, in memory or mapped. Raises InputError if the two differ."""
    if train.classes != test.classes:
        raise InputError(
            f"training and test images of {train.name!r} differ: {len(train.classes)} and {len(test.classes)} classes.",
            "Name all classes, in one order, for both.",
        )
    return opened(split_of(train), split_of(test), train.classes, train.name, notes)


def chunk_size(shape: tuple[int, int, int]) -> int:
    """How many images of this shape are read at once."""
    return max(1, min(CHUNK, CHUNK_BYTES // max(1, math.prod(shape))))


def chunks(rows: Tensor, shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """The rows, as many at a time as are read at once."""
    for part in batches(len(rows), chunk_size(shape)):
        yield rows[part]


def split_of(images: ImageSet) -> Split:
    """An ImageSet as a split of a source. Raises InputError if it has no labels."""

    def read(rows: Tensor) -> Iterator[Tensor]:
        for some in chunks(rows, images.shape):
            yield images.images[some]

    return Split(images.known_labels(), images.shape, read)


def with_own_test_set(whole: Split, classes: tuple[str, ...], name: str, notes: tuple[str, ...] = ()) -> Opened:
    """A source that has no test images of its own: TEST_SHARE of every class become them."""
    train, test = stratified(whole.labels, (1 - TEST_SHARE, TEST_SHARE), seed=0)
    return opened(whole.subset(train), whole.subset(test), classes, name, notes)._replace(
        has_own_test=False, rows=(train, test)
    )


def check_labels(labels: Array, where: str) -> Tensor:
    """Labels as int64, (N,). Raises InputError for what can be no classes."""
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not labels.size:
        raise InputError(
            f"{where}: labels are {labels.dtype} of shape {labels.shape}.",
            "Labels are whole numbers from 0, of shape (N,), at least one.",
        )
    if not (int(labels.min()) >= 0 and int(labels.max()) < MOST_CLASSES):
        raise InputError(
            f"labels are out of range: {labels.min()} to {labels.max()} ({where}).",
            f"Labels run from 0 to the number of classes less 1, below {MOST_CLASSES}.",
        )
    return torch.from_numpy(labels.astype(np.int64))
