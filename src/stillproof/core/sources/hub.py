"""Data sets of Hugging Face's `datasets`: from the hub, or from a directory that save_to_disk wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from stillproof.core.decoding import Decoder, Encoded
from stillproof.core.sources.source import (
    Facts,
    Opened,
    Source,
    Split,
    check_labels,
    chunks,
    opened,
    with_own_test_set,
)
from stillproof.core.spec import file_digest
from stillproof.errors import InputError, reason

TEST_NAMES = ("test", "validation", "valid")


@dataclass(frozen=True, kw_only=True)
class HubDataset(Source):
    """`hf:org/name` (the one source that uses the network), or a directory that `save_to_disk` wrote.

    config: the data set's configuration; train, test: its splits, by default `train` and `test` or `validation`, and
    without either 30 % of each class are the test set; image, label: its columns, by default those of these types;
    size, channels: as Decoder has them. Needs the extra `hf`.
    """

    name: str
    local: bool
    config: str = ""
    train: str = "train"
    test: str = ""
    image: str = ""
    label: str = ""
    size: int = 0
    channels: int = 0

    def identity(self) -> Mapping[str, object]:
        asked = {name: getattr(self, name) for name in ("train", "test", "image", "label", "size", "channels")}
        parts = [
            {
                "features": str(part.features),
                "files": [file_digest(Path(file["filename"])) for file in part.cache_files],
                "pictures": [file_digest(picture) for picture in self._outside(part)],
            }
            for part in self._parts()
        ]
        return {"source": "hf", "parts": parts, **asked}

    def _outside(self, part: Any) -> list[Path]:
        """The files of those pictures that the data set only names."""
        from datasets import Image

        image, _ = self._columns(part)
        rows = part.select_columns([image]).cast_column(image, Image(decode=False)).data.column(image)
        paths = [
            path
            for chunk in rows.chunks
            if chunk.field("bytes").null_count
            for data, path in zip(chunk.field("bytes"), chunk.field("path").to_pylist(), strict=True)
            if not data.is_valid and path is not None
        ]
        return [Path(path) for path in paths]

    def facts(self) -> Facts:
        source = self.open()
        return Facts(len(source.train.labels), len(source.test.labels), len(source.classes))

    def open(self) -> Opened:
        parts = self._parts()
        splits = [self._split(part) for part in parts]
        named = [getattr(part.features[self._columns(part)[1]], "names", None) for part in parts]
        names = named[0]
        if any(other != names for other in named):
            raise InputError(
                f"training and test images of {self.name} name their classes differently.",
                "Write both with the same names in the same order.",
            )
        classes = tuple(names or (str(index) for index in range(int(splits[0].labels.max()) + 1)))
        title = self.name.rpartition("/")[2]
        if len(splits) == 1:
            return with_own_test_set(splits[0], classes, title)
        return opened(splits[0], splits[1], classes, title)

    def _split(self, part: Any) -> Split:
        from datasets import Image

        image, label = self._columns(part)
        encoded = part.select_columns([image]).cast_column(image, Image(decode=False))

        def pictures(rows: list[int]) -> list[Encoded]:
            return [_encoded(row) for row in encoded[rows][image]]

        def place(row: int) -> str:
            return f"{self.name}, row {row} of {part.split or 'its images'}"

        decoder = Decoder.for_pictures_like(pictures([0])[0], place(0), self.size, self.channels)

        def read(rows: Tensor) -> Iterator[Tensor]:
            for some in chunks(rows, decoder.shape):
                listed = some.tolist()
                yield decoder.decode(pictures(listed), lambda number, listed=listed: place(listed[number]))  # type: ignore[misc]

        return Split(check_labels(np.asarray(part[label]), self.name), decoder.shape, read)

    def _columns(self, part: Any) -> tuple[str, str]:
        chosen = []
        for what, asked, kinds in (("image", self.image, ("Image",)), ("label", self.label, ("ClassLabel",))):
            found = [asked] if asked else [n for n, kind in part.features.items() if type(kind).__name__ in kinds]
            wrong = what == "image" and found and type(part.features.get(found[0])).__name__ != "Image"
            if len(found) != 1 or found[0] not in part.features or wrong:
                raise InputError(
                    f"{self.name} has the columns {', '.join(part.features)}, and {len(found)} that could be the {what}"
                    f"{': ' + ', '.join(found) if found else ''}.",
                    f"Name it: ?{what}=COLUMN.",
                )
            chosen.append(found[0])
        return chosen[0], chosen[1]

    def _parts(self) -> list[Any]:
        """The training split, and the test split if there is one."""
        whole = self._everything
        if not isinstance(whole, Mapping):
            return [self._filled(whole)]
        tests = [name for name in ((self.test,) if self.test else TEST_NAMES) if name in whole]
        if self.train not in whole or (self.test and not tests):
            raise InputError(
                f"{self.name} has the splits {', '.join(whole)}.", "Name two of them: ?train=SPLIT&test=SPLIT."
            )
        return [self._filled(whole[name]) for name in (self.train, *tests[:1])]

    def _filled(self, part: Any) -> Any:
        if not len(part):
            raise InputError(f"{self.name} has a split without rows.", "Give at least one image.")
        return part.with_format(None)

    @cached_property
    def _everything(self) -> Any:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        try:
            import datasets
        except Exception as error:  # a broken installation can fail in any way
            raise InputError(
                f"{self.name} needs the package datasets, which cannot be imported: {error}",
                "pip install 'stillproof[hf]'",
            ) from None
        datasets.disable_progress_bars()
        try:
            if self.local:
                return datasets.load_from_disk(self.name)
            return datasets.load_dataset(self.name, self.config or None)
        except Exception as error:  # the hub, the cache and the file system each have their own
            raise InputError(
                f"the data set {self.name} cannot be read: {reason(error)}",
                "Is the name right (hf:org/name), and is the network there?" if not self.local else "Is it complete?",
            ) from None


def _encoded(row: Mapping[str, Any] | None) -> Encoded:
    if row is None or row["bytes"] is not None:
        return None if row is None else row["bytes"]
    return None if row["path"] is None else Path(row["path"])


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` wrote this directory with save_to_disk."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
