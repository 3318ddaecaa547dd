"""A folder of pictures, one folder a class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stillproof.core.decoding import Decoder
from stillproof.core.runtime import cores
from stillproof.core.sources.source import Facts, Opened, Source, Split, chunks, opened, with_own_test_set
from stillproof.core.spec import file_digest
from stillproof.errors import InputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
TEST_FOLDERS = ("test", "val", "valid", "validation")


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Source):
    """`train/CLASS/picture.png` and `test/CLASS/…` (or val/); or CLASS/… alone, of which 30 % of each class become
    the test set. The classes are the folders, in alphabetical order; files that are no pictures are passed over.

    size, channels: as Decoder has them.
    """

    path: Path
    size: int = 0
    channels: int = 0

    def identity(self) -> Mapping[str, object]:
        pictures = [picture for listing in self._listings() for pictures in listing.values() for picture in pictures]
        with ThreadPoolExecutor(max_workers=cores()) as pool:
            digests = pool.map(file_digest, pictures)
            content = "\n".join(
                f"{picture.relative_to(self.path)} {digest}" for picture, digest in zip(pictures, digests, strict=True)
            )
        digest = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()
        return {"source": "folder", "digest": digest, "size": self.size, "channels": self.channels}

    def facts(self) -> Facts:
        source = self.open()
        return Facts(len(source.train.labels), len(source.test.labels), len(source.classes))

    def open(self) -> Opened:
        listings = self._listings()
        classes = tuple(listings[0])
        splits = [self._split(listing) for listing in listings]
        if len(splits) == 1:
            return with_own_test_set(splits[0], classes, self.path.name)
        return opened(splits[0], splits[1], classes, self.path.name)

    def _split(self, listing: Mapping[str, list[Path]]) -> Split:
        pictures = [picture for found in listing.values() for picture in found]
        labels = torch.tensor([index for index, found in enumerate(listing.values()) for _ in found])
        decoder = Decoder.for_pictures_like(pictures[0], str(pictures[0]), self.size, self.channels)

        def read(rows: Tensor) -> Iterator[Tensor]:
            for some in chunks(rows, decoder.shape):
                chosen = [pictures[row] for row in some.tolist()]
                yield decoder.decode(chosen, lambda number, chosen=chosen: str(chosen[number]))  # type: ignore[misc]

        return Split(labels, decoder.shape, read)

    def _listings(self) -> list[dict[str, list[Path]]]:
        """The pictures of each class: of the training and the test folder, or of the one there is."""
        train = self.path / "train"
        test = next((self.path / name for name in TEST_FOLDERS if (self.path / name).is_dir()), None)
        if not train.is_dir():
            return [_classes_in(self.path)]
        if test is None:
            raise InputError(
                f"{self.path} has a folder train/ and none of {', '.join(f'{name}/' for name in TEST_FOLDERS)}.",
                "Add one, or name train/ itself: 30 % of each class become the test set.",
            )
        found = [_classes_in(train), _classes_in(test)]
        if list(found[0]) != list(found[1]):
            only = sorted(set(found[0]) ^ set(found[1]))
            raise InputError(
                f"{train} and {test.name}/ have not the same classes: {', '.join(only[:5])} in one alone.",
                "Both need a folder for each class.",
            )
        return found


def _pictures_in(folder: Path) -> Iterator[Path]:
    """All pictures below a folder. Raises OSError for one that cannot be looked into."""

    def refuse(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(place, name) for name in names if Path(name).suffix.lower() in SUFFIXES)


def _classes_in(folder: Path) -> dict[str, list[Path]]:
    try:
        folders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        found = {entry.name: sorted(_pictures_in(entry)) for entry in folders}
    except OSError as error:
        raise InputError(
            f"{error.filename or folder} cannot be read: {error.strerror}.", "Check its permissions."
        ) from None
    if len(found) < 2:
        raise InputError(
            f"{folder} holds {len(found)} folders of pictures, and no parquet files.",
            "A data directory has train*.parquet and test*.parquet, or one folder of pictures a class.",
        )
    empty = [name for name, pictures in found.items() if not pictures]
    if empty:
        raise InputError(
            f"the class {empty[0]!r} has no pictures ({folder / empty[0]}).",
            f"Add some ({', '.join(sorted(SUFFIXES))}), or remove the folder.",
        )
    return found
