"""Where finished stages keep what they made: safetensors, npy and JSON, written atomically, read without executing.

An artefact is a folder named by its stage's key. Its manifest is written last, in one step: where there is
no manifest there is no artefact, whatever else a killed process left. The store is a directory, or any
fsspec URL (s3://bucket/prefix, memory://…); then a folder of the user's cache holds copies and checkpoints.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from stillproof.core.files import private, unwritable, write_atomically
from stillproof.core.measurement import Cost
from stillproof.errors import StoreError, reason

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
    """An artefact that is being made: a folder of its own, and room in it for tensors that may not fit into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, Tensor] = {}

    def allocate(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A uint8 tensor that is a file, to be filled and returned in the artefact under this name.

        Raises StoreError where there is no room for it.
        """
        path = self.folder / f"{name}.npy"
        try:
            mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
            if hasattr(os, "posix_fallocate"):  # or a full disk would be noticed as a SIGBUS, halfway through
                with path.open("r+b") as stream:
                    os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
        except OSError as error:
            raise unwritable(path, error) from None
        self._tensors[name] = torch.from_numpy(mapped)
        return self._tensors[name]

    def others(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of an artefact's tensors that were not allocated here; the allocated ones are on the disk then."""
        left = dict(tensors)
        for name, tensor in self._tensors.items():
            if left.pop(name, None) is not tensor:
                raise ValueError(f"the tensor {name!r} was allocated, and the artefact has another or none")
            with (self.folder / f"{name}.npy").open("rb") as stream:
                os.fsync(stream.fileno())
        return left

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the allocated tensors."""
        return tuple(f"{name}.npy" for name in self._tensors)


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
            try:
                self._root = Path(location.removeprefix("file://")).expanduser()
                self._root.exists()
            except (OSError, RuntimeError, ValueError) as error:
                raise StoreError(f"the store {location[:60]!r} cannot be opened: {error}", "Check --store.") from None

    def has(self, key: str) -> bool:
        """Whether the artefact of this key is complete."""
        if self._remote is None:
            return self._is_here(key)
        there = bool(self._remote.exists(f"{self._prefix}/{key}/{MANIFEST}"))
        if not there and self._is_here(key):  # it was made, and could not be handed over
            self._upload(key)
            there = True
        return there

    @contextmanager
    def draft(self, key: str) -> Iterator[Draft]:
        """A folder in which the artefact of this key is made; what is not saved is removed. Raises StoreError."""
        with ExitStack() as made:
            try:
                folder = made.enter_context(private(self._folder(key), folder=True))
            except (OSError, ValueError) as error:
                raise unwritable(self._folder(key), error) from None
            yield Draft(folder)

    def save(self, key: str, artefact: Artefact, about: Mapping[str, Any], draft: Draft | None = None) -> None:
        """Write an artefact. about: JSON that says what made it, for whoever looks into the store.

        draft: where its large tensors were allocated. If another process saved the same artefact meanwhile, that one
        stays: it was made by the same function of the same inputs.
        """
        if draft is None:
            with self.draft(key) as draft:
                self.save(key, artefact, about, draft)
            return
        tensors = draft.others(artefact.tensors)
        contents = {VALUES: json.dumps(artefact.values, sort_keys=True, allow_nan=False).encode()}
        if tensors:
            plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
            contents[TENSORS] = safetensors.torch.save(plain)
        for name, content in contents.items():
            write_atomically(draft.folder / name, content, fault="artefact")
        names = [*contents, *draft.files]
        manifest = {
            "key": key,
            "about": dict(about),
            "cost": artefact.cost.model_dump(),
            "files": {name: _digest(draft.folder / name) for name in names},
            "bytes": {name: (draft.folder / name).stat().st_size for name in names},
        }
        content = json.dumps(manifest, indent=1, sort_keys=True).encode()
        write_atomically(draft.folder / MANIFEST, content, fault="artefact")
        self._publish(draft.folder, key)
        if self._remote is not None:
            self._upload(key)

    def _is_here(self, key: str) -> bool:
        return (self._folder(key) / MANIFEST).is_file()

    def _publish(self, folder: Path, key: str) -> None:
        """Move a complete folder to where it belongs, unless there is a complete one."""
        target = self._folder(key)
        try:
            if target.exists() and not self._is_here(key):
                shutil.rmtree(target)
            with suppress(FileExistsError):
                folder.rename(target)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise unwritable(target, error) from None

    def _upload(self, key: str) -> None:
        names = [file.name for file in self._folder(key).iterdir() if file.name != MANIFEST]
        for name in (*names, MANIFEST):  # the manifest last
            place = f"{self._prefix}/{key}/{name}"
            self._guarded(partial(self._remote.put_file, str(self._folder(key) / name), place))

    def load(self, key: str) -> Artefact:
        """Read an artefact back; its large tensors are mapped, not read. Raises StoreError if it is damaged."""
        folder = self._fetched(key)
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            if manifest["key"] != key:
                raise ValueError(f"it is the artefact {manifest['key']}")
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
        if self._remote is not None and not self._is_here(key):
            with self.draft(key) as draft:
                self._guarded(partial(self._copy, f"{self._prefix}/{key}", draft.folder))
                self._publish(draft.folder, key)
        return folder

    def _copy(self, place: str, to: Path) -> None:
        manifest: bytes = self._remote.cat_file(f"{place}/{MANIFEST}")
        for name in json.loads(manifest)["files"]:
            _check_name(name)
            self._remote.get_file(f"{place}/{name}", str(to / name))
        write_atomically(to / MANIFEST, manifest)

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
    return StoreError(f"the artefact {folder} cannot be read: {reason(error)}", "Delete that folder, then resume.")
