"""Arrays in one .npz file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stillproof.core.images import ImageSet, check_range
from stillproof.core.sources.source import (
    Array,
    Facts,
    Opened,
    Source,
    check_labels,
    from_sets,
    split_of,
    with_own_test_set,
)
from stillproof.core.spec import file_digest
from stillproof.errors import InputError, reason

LAYOUTS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
)

KNOWN = frozenset({"images", "labels", "classes", *(name for layout in LAYOUTS for name in layout)})
"""The arrays that are read; others may be of any size."""

NOTED_ERROR = 1e-6
"""A rounding of floats to 8 bits below this is that of float32 itself: the images were 8 bits before."""


class _Pixels(NamedTuple):
    images: Tensor
    error: float
    """The most that a pixel was changed by rounding to 8 bits, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class NpzFile(Source):
    """`train_images, train_labels, test_images, test_labels` (or x_train, y_train, x_test, y_test); or
    `images, labels` alone, of which 30 % of each class become the test set. `classes` may name the classes.

    Images are uint8, or floats in [0, 1], of shape (N, H, W), (N, H, W, C) or (N, C, H, W). Floats are rounded to
    8 bits, and a note says by how much.
    """

    path: Path

    def identity(self) -> Mapping[str, object]:
        return {"source": "npz", "digest": file_digest(self.path)}

    def facts(self) -> Facts:
        source = self.open()
        return Facts(len(source.train.labels), len(source.test.labels), len(source.classes))

    def open(self) -> Opened:
        arrays, held = self._arrays()
        for names in LAYOUTS:
            if all(name in arrays for name in names):
                classes = self._classes(arrays, names[1], names[3])
                (train, more), (test, less) = (
                    self._image_set(arrays, *pair, classes) for pair in (names[:2], names[2:])
                )
                return from_sets(train, test, _notes(max(more, less)))
        if "images" in arrays and "labels" in arrays:
            whole, error = self._image_set(arrays, "images", "labels", self._classes(arrays, "labels"))
            return with_own_test_set(split_of(whole), whole.classes, whole.name, _notes(error))
        raise InputError(
            f"{self.path} holds {', '.join(sorted(held)) or 'no arrays'}.",
            "Expected train_images, train_labels, test_images, test_labels, or images and labels.",
        )

    def _arrays(self) -> tuple[dict[str, Array], list[str]]:
        """Those arrays that are looked for, and the names of all."""
        try:
            with self.path.open("rb") as stream:
                archive = np.load(stream, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise InputError(f"{self.path} is a single array.", "Save it with numpy.savez.")
                wanted = [name for name in archive.files if name in KNOWN]
                arrays = {name: archive[name] for name in wanted}
                if all(isinstance(array, np.ndarray) for array in arrays.values()):
                    return arrays, archive.files
                raise InputError(f"{self.path} holds something else than arrays.", "Save it with numpy.savez.")
        except InputError:
            raise
        except Exception as error:  # zipfile, zlib, numpy and the OS each have their own
            advice = (
                "Object arrays are pickles, which can run code; nothing was executed. Save plain arrays."
                if "allow_pickle" in str(error)
                else "Is it truncated? Write it again with numpy.savez."
            )
            raise InputError(f"{self.path} cannot be read: {reason(error)}", advice) from None

    def _image_set(
        self, arrays: Mapping[str, Array], images: str, labels: str, classes: tuple[str, ...]
    ) -> tuple[ImageSet, float]:
        where = f"{images} of {self.path}"
        pixels = _as_uint8(_channels_first(arrays[images], where), where)
        return ImageSet(pixels.images, self._labels(arrays, labels), classes, self.path.stem), pixels.error

    def _labels(self, arrays: Mapping[str, Array], name: str) -> Tensor:
        labels = arrays[name]
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        return check_labels(labels, f"{name} of {self.path}")

    def _classes(self, arrays: Mapping[str, Array], *labels: str) -> tuple[str, ...]:
        if "classes" not in arrays:
            return tuple(str(index) for index in range(1 + max(int(self._labels(arrays, n).max()) for n in labels)))
        if arrays["classes"].ndim != 1:
            raise InputError(f"classes of {self.path} has shape {arrays['classes'].shape}.", "Name each class: (K,).")
        return tuple(str(name) for name in arrays["classes"].tolist())


def _channels_first(images: Array, where: str) -> Array:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images.transpose(0, 3, 1, 2)
    raise InputError(f"{where} has the shape {images.shape}.", "Expected (N, H, W), (N, H, W, C) or (N, C, H, W).")


def _as_uint8(images: Array, where: str) -> _Pixels:
    error = 0.0
    if images.dtype.kind == "f":
        check_range(float(images.min(initial=0.0)), float(images.max(initial=0.0)), where)
        rounded = np.rint(images * 255)
        error = float(np.abs(images - rounded / 255).max(initial=0.0))
        images = rounded
    elif images.dtype.kind not in "iu":
        raise InputError(f"{where} is {images.dtype}.", "Images are uint8, or floats in [0, 1].")
    elif images.size and (images.min() < 0 or images.max() > 255):
        raise InputError(f"{where} holds values from {images.min()} to {images.max()}.", "uint8 has 0 to 255.")
    return _Pixels(torch.from_numpy(np.ascontiguousarray(images.astype(np.uint8))), error)


def _notes(error: float) -> tuple[str, ...]:
    if error < NOTED_ERROR:
        return ()
    return (f"The images are floats and were rounded to 8 bits: no pixel changed by more than {error:.2g} of [0, 1].",)
