"""A directory of parquet files with encoded images, as the HF hub lays them out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillproof.core.decoding import Decoder
from stillproof.core.sources.source import Facts, Opened, Source, Split, check_labels, chunk_size, opened
from stillproof.core.spec import file_digest
from stillproof.errors import InputError, reason


@dataclass(frozen=True, kw_only=True)
class ParquetDirectory(Source):
    """A directory in the layout of the HF hub: train*.parquet and test*.parquet with encoded images.

    Class names are taken from the schema's `huggingface` metadata, else they are the label numbers.
    image, label: the columns, if they have unusual names; size, channels: as Decoder has them.
    """

    path: Path
    image: str = ""
    label: str = ""
    size: int = 0
    channels: int = 0

    def identity(self) -> Mapping[str, object]:
        files = [file for split in ("train", "test") for file in self._files(split)]
        digests = {str(file.relative_to(self.path)): file_digest(file) for file in files}
        asked = {name: value for name in ("size", "channels") if (value := getattr(self, name))}
        return {"source": "parquet", "files": digests, "image": self.image, "label": self.label, **asked}

    def facts(self) -> Facts:
        files = {
            split: [found for file in self._files(split) if (found := _open(file)).metadata.num_rows]
            for split in ("train", "test")
        }
        train, test = (sum(file.metadata.num_rows for file in files[split]) for split in ("train", "test"))
        if not train or not test:
            raise InputError(f"{self.path} has {train} training and {test} test images.", "Both are needed.")
        _, label = self._columns(files["train"][0].schema_arrow, self.path)
        names = _class_names(files["train"][0].schema_arrow, label)
        return Facts(
            train,
            test,
            len(names) or 1 + max(int(_labels(file, label, self.path).max()) for file in files["train"]),
        )

    def open(self) -> Opened:
        self.facts()
        train, names = self._split("train")
        test, others = self._split("test")
        if names and others and names != others:
            raise InputError(
                f"training and test images of {self.path} name their classes differently: {', '.join(names[:5])} and "
                f"{', '.join(others[:5])}.",
                "Write both with the same names in the same order.",
            )
        classes = names or tuple(str(index) for index in range(int(train.labels.max()) + 1))
        return opened(train, test, classes, self.path.name)

    def _split(self, which: str) -> tuple[Split, tuple[str, ...]]:
        parts: list[_File] = []
        names: tuple[str, ...] = ()
        start = 0
        for path in self._files(which):
            parquet = _open(path)
            if not parquet.metadata.num_rows:
                continue
            image, label = self._columns(parquet.schema_arrow, path)
            found = _class_names(parquet.schema_arrow, label)
            if names and found and names != found:
                raise InputError(f"{path} names its classes otherwise than the files before it.", "Write them again.")
            names = names or found
            parts.append(_File(path, image, start, _labels(parquet, label, path)))
            start += parquet.metadata.num_rows

        def place(row: int) -> str:
            return f"{self.path}/{which}, row {row}"

        first = next(parts[0].encoded(torch.tensor([0]), 1))[1][0]
        decoder = Decoder.for_pictures_like(first, place(0), self.size, self.channels)

        def read(rows: Tensor) -> Iterator[Tensor]:
            for part in parts:
                for found, encoded in part.encoded(rows, chunk_size(decoder.shape)):
                    yield decoder.decode(encoded, _places(found, place))

        return Split(torch.cat([part.labels for part in parts]), decoder.shape, read), names

    def _files(self, split: str) -> list[Path]:
        found = sorted([*self.path.glob(f"{split}*.parquet"), *self.path.glob(f"data/{split}*.parquet")])
        if not found:
            raise InputError(
                f"there is no {split}*.parquet in {self.path}.",
                "Expected the layout of the HF hub: train*.parquet and test*.parquet, there or in data/.",
            )
        return found

    def _columns(self, schema: Any, file: Path) -> tuple[str, str]:
        chosen = []
        for what, asked, usual in (
            ("image", self.image, ("img", "image")),
            ("label", self.label, ("label", "labels", "fine_label")),
        ):
            names = [asked] if asked else list(usual)
            found = [name for name in names if name in schema.names]
            if not found:
                raise InputError(
                    f"{file} has no {what} column {' or '.join(names)}; it has {', '.join(schema.names)}.",
                    f"Name it: DIRECTORY?{what}=COLUMN.",
                )
            chosen.append(found[0])
        return chosen[0], chosen[1]


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    image: str
    start: int
    """The row of the split at which this file begins."""
    labels: Tensor

    def encoded(self, rows: Tensor, size: int) -> Iterator[tuple[Tensor, list[bytes | None]]]:
        """The encoded images of those rows (of the split, ascending) that are in this file; `size` read at once."""
        parquet = _open(self.path)
        begin = self.start
        for group in range(parquet.num_row_groups):
            end = begin + parquet.metadata.row_group(group).num_rows
            if ((rows >= begin) & (rows < end)).any():
                parts = parquet.iter_batches(batch_size=size, row_groups=[group], columns=[self.image])
                start = begin
                while (part := _guarded(self.path, partial(next, parts, None))) is not None:
                    here = rows[(rows >= start) & (rows < start + len(part))]
                    if len(here):
                        yield here, self._bytes(part).take((here - start).numpy()).to_pylist()
                    start += len(part)
            begin = end

    def _bytes(self, part: Any) -> Any:
        import pyarrow as pa  # half a second; only parquet needs it

        column = part.column(0)
        if pa.types.is_struct(column.type) and "bytes" in [field.name for field in column.type]:
            column = column.field("bytes")
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            raise InputError(
                f"the column {self.image!r} of {self.path} holds {column.type}.", "Images are bytes, or {bytes, path}."
            )
        return column


def _places(rows: Tensor, place: Callable[[int], str]) -> Callable[[int], str]:
    return lambda number: place(int(rows[number]))


def _open(file: Path) -> Any:
    import pyarrow.parquet as pq

    return _guarded(file, lambda: pq.ParquetFile(file))


def _guarded(file: Path, read: Callable[[], Any]) -> Any:
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(
            f"{file} is not a readable parquet file: {reason(error)}", "Is it truncated? Fetch or write it again."
        ) from None


def _labels(parquet: Any, name: str, file: Path) -> Tensor:
    column = _guarded(file, lambda: parquet.read([name]).column(name).combine_chunks())
    if column.null_count:
        raise InputError(f"{file} has rows without a label.", "Leave those rows out.")
    return check_labels(np.asarray(column.to_numpy(zero_copy_only=False)), str(file))


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
