"""Where finished stages keep what they made: safetensors, npy and JSON, written atomically, read without executing.

An artefact is a folder named by its stage's key. Its manifest is written last, in one step: where there is
no manifest there is no artefact, whatever else a killed process left. The store is a directory, or any
fsspec URL (s3://bucket/prefix, memory://…); then a folder of the user's cache holds copies and checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from stillproof.core import faults
from stillproof.core.files import partial_of, sweep, unwritable, write_atomically
from stillproof.core.measurement import Cost
from stillproof.errors import StoreError

MANIFEST, VALUES, TENSORS = "artefact.json", "values.json", "tensors.safetensors"
MAPPED = re.compile(r"[a-z][a-z0-9_.-]*\.npy")
"""The name of a file that holds one memory-mapped tensor."""

VERIFIED_BYTES = 2**30
"""A mapped file of up to so many bytes is compared with its digest whenever it is opened; of a larger one, the size."""


@dataclass(frozen=True, slots=True)
class Artefact:
    """What a stage made: JSON values and tensors, by name, and what they cost."""

    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)


class Draft:
    """An artefact that is being made: room on disk for those of its tensors that may not fit into memory.

    Left without being kept (an error, Ctrl-C), it removes what it wrote.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for name in self._tensors:
            with suppress(OSError):
                partial_of(self._path(name)).unlink(missing_ok=True)

    def allocate(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A uint8 tensor that is a file, to be filled and returned in the artefact under this name.

        Raises StoreError where there is no room for it.
        """
        path = self._path(name)
        partial = partial_of(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path)
            mapped = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
            if hasattr(os, "posix_fallocate"):  # or a full disk would be noticed as a SIGBUS, halfway through
                with partial.open("r+b") as stream:
                    os.posix_fallocate(stream.fileno(), 0, partial.stat().st_size)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise unwritable(path, error) from None
        self._tensors[name] = torch.from_numpy(mapped)
        return self._tensors[name]

    def keep(self, artefact: Artefact) -> dict[str, Tensor]:
        """Put the allocated tensors of the artefact where it belongs; returns its other tensors."""
        others = dict(artefact.tensors)
        for name, tensor in self._tensors.items():
            if others.get(name) is not tensor:
                raise ValueError(f"the tensor {name!r} was allocated, and the artefact has another or none")
            del others[name]
            path = self._path(name)
            try:
                with partial_of(path).open("rb") as stream:
                    faults.kill_point("artefact")
                    os.fsync(stream.fileno())
                partial_of(path).replace(path)
            except OSError as error:
                raise unwritable(path, error) from None
        return others

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the allocated tensors."""
        return tuple(f"{name}.npy" for name in self._tensors)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"


class Store:
    """Artefacts by key. Raises StoreError where one cannot be written, or is damaged."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._remote: Any = None
        if "://" in location and not location.startswith("file://"):
            import fsspec

            try:
                self._remote, self._prefix = fsspec.core.url_to_fs(location)
            except Exception as error:  # each protocol has its own
                raise StoreError(f"the store {location} cannot be opened: {error}", "Check --store.") from None
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            self._root = cache / "stillproof" / hashlib.sha256(location.encode()).hexdigest()[:16]
        else:
            self._root = Path(location.removeprefix("file://")).expanduser()

    def has(self, key: str) -> bool:
        """Whether the artefact of this key is complete."""
        if self._remote is None:
            return (self._folder(key) / MANIFEST).is_file()
        return bool(self._remote.exists(f"{self._prefix}/{key}/{MANIFEST}"))

    def draft(self, key: str) -> Draft:
        """Room for the large tensors of the artefact of this key, until it is saved."""
        return Draft(self._folder(key))

    def save(self, key: str, artefact: Artefact, about: Mapping[str, Any], draft: Draft | None = None) -> None:
        """Write an artefact. about: JSON that says what made it, for whoever looks into the store.

        draft: where its large tensors were allocated.
        """
        folder = self._folder(key)
        tensors = draft.keep(artefact) if draft is not None else artefact.tensors
        contents = {VALUES: json.dumps(artefact.values, sort_keys=True, allow_nan=False).encode()}
        if tensors:
            plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
            contents[TENSORS] = safetensors.torch.save(plain)
        for name, content in contents.items():
            write_atomically(folder / name, content, fault="artefact")
        names = [*contents, *(draft.files if draft is not None else ())]
        manifest = {
            "key": key,
            "about": dict(about),
            "cost": artefact.cost.model_dump(),
            "files": {name: _digest(folder / name) for name in names},
            "bytes": {name: (folder / name).stat().st_size for name in names},
        }
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode(), fault="artefact")
        if self._remote is not None:
            for name in (*names, MANIFEST):  # the manifest last
                place = f"{self._prefix}/{key}/{name}"
                self._guarded(partial(self._remote.put_file, str(folder / name), place))

    def load(self, key: str) -> Artefact:
        """Read an artefact back; its large tensors are mapped, not read. Raises StoreError if it is damaged."""
        folder = self._fetched(key)
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            mapped: dict[str, Tensor] = {}
            for name, digest in manifest["files"].items():
                _check_name(name)
                size = (folder / name).stat().st_size
                trusted = bool(MAPPED.fullmatch(name)) and size == manifest["bytes"][name] > VERIFIED_BYTES
                if not trusted and _digest(folder / name) != digest:
                    raise ValueError(f"{name} has changed since it was written")
                if MAPPED.fullmatch(name):
                    mapped[name.removesuffix(".npy")] = _mapped(folder / name)
            tensors = safetensors.torch.load_file(folder / TENSORS) if TENSORS in manifest["files"] else {}
            return Artefact(json.loads((folder / VALUES).read_bytes()), tensors | mapped, Cost(**manifest["cost"]))
        except Exception as error:  # whatever a damaged file provokes
            raise _damaged(folder, error) from None

    def cost(self, key: str) -> Cost:
        """What the artefact of this key took to make."""
        folder = self._fetched(key)
        try:
            return Cost(**json.loads((folder / MANIFEST).read_bytes())["cost"])
        except Exception as error:  # whatever a damaged file provokes
            raise _damaged(folder, error) from None

    def checkpoint(self, key: str) -> Path:
        """Where the stage of this key leaves its training state; always on this machine."""
        return self._root / "checkpoints" / f"{key}.ckpt"

    def _folder(self, key: str) -> Path:
        return self._root / "artefacts" / key

    def _fetched(self, key: str) -> Path:
        folder = self._folder(key)
        if self._remote is not None and not (folder / MANIFEST).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            self._guarded(partial(self._copy, f"{self._prefix}/{key}", folder))
        return folder

    def _copy(self, place: str, to: Path) -> None:
        manifest: bytes = self._remote.cat_file(f"{place}/{MANIFEST}")
        for name in json.loads(manifest)["files"]:
            _check_name(name)
            partial = partial_of(to / name)
            self._remote.get_file(f"{place}/{name}", str(partial))
            partial.replace(to / name)
        write_atomically(to / MANIFEST, manifest)  # last

    def _guarded(self, transfer: Callable[[], object]) -> None:
        try:
            transfer()
        except Exception as error:  # each protocol has its own
            raise StoreError(f"the store {self.location} fails: {error}", "Check --store, then resume.") from None


def _check_name(name: str) -> None:
    if name not in (VALUES, TENSORS) and not MAPPED.fullmatch(name):
        raise ValueError(f"unexpected file {name!r}")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _mapped(path: Path) -> Tensor:
    """The uint8 tensor of a file, not read but mapped; writing to it would not reach the file."""
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    if array.dtype != np.uint8:
        raise ValueError(f"{path.name} holds {array.dtype}, not uint8")
    return torch.from_numpy(array)


def _damaged(folder: Path, error: Exception) -> StoreError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return StoreError(f"the artefact {folder} cannot be read: {reason}", "Delete that folder, then resume.")
