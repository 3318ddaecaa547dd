"""ImageSet: the one data type. Batches become float here, and augmentation is tensor code."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stillproof.core.noise import Noise, derive, permutation
from stillproof.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """Images with or without labels; immutable.

    images: uint8, (N, C, H, W), in memory or memory-mapped; labels: int64, (N,), or None;
    classes: the K class names; name: for messages and reports.
    Raises InputError where these do not fit together.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise InputError(
                f"the images of {self.name!r} are {images.dtype} of shape {tuple(images.shape)}.",
                "An ImageSet holds uint8 images of shape (N, C, H, W).",
            )
        if images.shape[1] not in (1, 3):
            raise InputError(
                f"the images of {self.name!r} have {images.shape[1]} channels (shape {tuple(images.shape)}).",
                "Give 1 or 3 channels, in the order (N, C, H, W); (N, H, W, C) must be transposed.",
            )
        if images.numel() == 0:
            raise InputError(
                f"{self.name!r} holds no images (shape {tuple(images.shape)}).", "Give at least one, of 1×1 or more."
            )
        if labels is None:
            return
        if labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise InputError(
                f"the labels of {self.name!r} are {labels.dtype} of shape {tuple(labels.shape)} "
                f"for {len(images)} images.",
                "Labels are int64 of shape (N,).",
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise InputError(
                f"labels of {self.name!r} are out of range: {low} to {high}, but there are "
                f"{len(self.classes)} classes.",
                f"Labels run from 0 to {len(self.classes) - 1}; mend the labels or name all classes.",
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def known_labels(self) -> Tensor:
        """The labels. Raises InputError if there are none."""
        if self.labels is None:
            raise InputError(f"{self.name!r} has no labels, and they are needed here.", "Give labelled images.")
        return self.labels

    def subset(self, rows: Tensor, name: str | None = None) -> ImageSet:
        """The images at `rows` (int64), in that order."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, images=self.images[rows], labels=labels, name=name or self.name)

    def with_more(self, others: ImageSet) -> ImageSet:
        """These images, and after them the others, of the same classes. Raises InputError if their shapes differ."""
        if others.shape != self.shape or (others.labels is None) != (self.labels is None):
            raise InputError(
                f"{others.name!r} ({others.shape}) cannot be added to {self.name!r} ({self.shape}).",
                "Give images of one shape, with labels on both sides or on neither.",
            )
        labels = None if self.labels is None or others.labels is None else torch.cat([self.labels, others.labels])
        return replace(self, images=torch.cat([self.images, others.images]), labels=labels)

    def per_class(self, n: int, seed: int) -> Tensor:
        """Rows (int64, ascending) of n random images of each class. Raises InputError if a class has fewer."""
        labels = self.known_labels()
        order = permutation(len(self), derive(seed, "per class"))
        chosen = []
        for index, name in enumerate(self.classes):
            rows = order[labels[order] == index]
            if len(rows) < n:
                raise InputError(
                    f"{self.name!r} has {len(rows)} images of class {name!r}, and {n} are asked for.",
                    f"Ask for at most {len(rows)}/class.",
                )
            chosen.append(rows[:n])
        return torch.cat(chosen).sort().values

    def split(self, fractions: tuple[float, ...], seed: int) -> tuple[Tensor, ...]:
        """Disjoint row sets (int64, ascending) of these shares of every class (of all, without labels).

        A class with at least as many images as there are parts has some in each part, if the shares add up to 1.
        """
        labels = self.labels if self.labels is not None else torch.zeros(len(self), dtype=torch.int64)
        return stratified(labels, fractions, seed)

    def fingerprint(self) -> str:
        """SHA-256 of images, labels and class names, in hex."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        for start in range(0, len(self), 4096):
            digest.update(self.images[start : start + 4096].contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.numpy().data)
        return digest.hexdigest()


def stratified(labels: Tensor, fractions: tuple[float, ...], seed: int) -> tuple[Tensor, ...]:
    """Disjoint row sets (int64, ascending) of these shares of every class. labels: int64, (N,)."""
    order = permutation(len(labels), derive(seed, "split"))
    parts: list[list[Tensor]] = [[] for _ in fractions]
    for index in range(int(labels.max()) + 1):
        rows = order[labels[order] == index]
        start = 0
        for part, size in zip(parts, _sizes(len(rows), fractions), strict=True):
            part.append(rows[start : start + size])
            start += size
    return tuple(torch.cat(part).sort().values for part in parts)


def _sizes(n: int, fractions: tuple[float, ...]) -> list[int]:
    """n things in these shares: largest remainders, then none empty that need not be."""
    exact = [share * n for share in fractions]
    sizes = [math.floor(size + 1e-9) for size in exact]
    by_remainder = sorted(range(len(exact)), key=lambda part: sizes[part] - exact[part])
    for part in by_remainder[: round(sum(exact)) - sum(sizes)]:
        sizes[part] += 1
    for part, share in enumerate(fractions):
        if share > 0 and not sizes[part] and n >= len(fractions):
            sizes[sizes.index(max(sizes))] -= 1
            sizes[part] = 1
    return sizes


def as_float(images: Tensor) -> Tensor:
    """uint8 images as the float32 in [0, 1], channels_last, that classifiers take."""
    return images.to(torch.float32).div_(255).contiguous(memory_format=torch.channels_last)


def as_uint8(images: Tensor) -> Tensor:
    """The nearest 8-bit images. images: float32, (N, C, H, W); what is outside [0, 1] is cut."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def check_range(low: float, high: float, where: str) -> None:
    """Raise InputError unless [low, high] lies in [0, 1]; NaN is outside."""
    if low >= 0.0 and high <= 1.0:
        return
    looks = (
        "These look normalised. Pass raw pixels and put the normalisation into the model:\n"
        "zoo models do this already; for your own, use stillproof.normalised(model, mean, std)."
        if low < 0
        else "Divide by the largest value a pixel can have (255 for 8 bits)."
    )
    raise InputError(f"images are outside [0, 1]: min {low:.4g}, max {high:.4g} ({where}).", looks)


def check_images(images: Tensor, where: str) -> None:
    """Raise InputError unless these are images as attacks take them: float32 in [0, 1], (N, C, H, W)."""
    if images.ndim != 4 or images.dtype != torch.float32:
        raise InputError(
            f"{where} are {images.dtype} of shape {tuple(images.shape)}.", "Give float32 in [0, 1], (N, C, H, W)."
        )
    if len(images):
        check_range(float(images.min()), float(images.max()), where)


def batches(n: int, size: int) -> Iterator[slice]:
    """Slices that cover range(n), `size` at a time."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random shift by up to `shift` pixels, the border reflected, and, with `flip`, mirroring.

    A coin for each image decides whether it is mirrored in the first epoch; from then on it alternates, so that two
    epochs show both sides (Jordan 2024, arXiv 2404.00498).
    """

    shift: int = 2
    flip: bool = True

    def __call__(self, images: Tensor, noise: Noise, epoch: int) -> Tensor:
        """uint8 in, uint8 out, (n, C, H, W); one gather for the whole batch."""
        n, _, height, width = images.shape
        if not self.shift and not self.flip:
            return images
        rows = torch.arange(height, device=images.device).expand(n, -1)
        columns = torch.arange(width, device=images.device).expand(n, -1)
        if self.flip:
            coin = Noise(noise.seed, noise.ids, 0).uniform(stream="flip")[:, None] < 0.5
            mirrored = coin ^ bool(epoch % 2)
            columns = torch.where(mirrored, columns.flip(1), columns)
        if self.shift:
            moved = noise.integers(-self.shift, self.shift + 1, (2,), stream="shift")
            rows, columns = _reflected(rows + moved[:, :1], height), _reflected(columns + moved[:, 1:], width)
        batch = torch.arange(n, device=images.device)[:, None, None]
        return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _reflected(places: Tensor, size: int) -> Tensor:
    """Places outside range(size) mirrored at its ends."""
    last = size - 1
    return last - (last - places.abs()).abs()


def augmentation_for(images: ImageSet) -> Augmentation:
    """Random shift by up to 3 pixels of 32; mirroring for colour images alone (a mirrored 3 is no 3)."""
    channels, *sides = images.shape
    return Augmentation(shift=max(1, min(sides) * 3 // 32) if min(sides) > 1 else 0, flip=channels == 3)
