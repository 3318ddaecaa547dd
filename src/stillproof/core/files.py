"""Writing files and folders so that they are there whole or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stillproof.core import faults
from stillproof.errors import StoreError

SUFFIX = ".partial"


def write_atomically(path: Path, content: bytes, *, fault: str = "") -> None:
    """Write a file so that it is there whole or not at all. Raises StoreError, leaving nothing behind.

    fault: the kill point that stands in the middle of the writing (core.faults).
    """
    try:
        with private(path) as partial:
            with partial.open("wb") as stream:
                stream.write(content[: len(content) // 2])
                stream.flush()
                if fault:
                    faults.kill_point(fault)
                stream.write(content[len(content) // 2 :])
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise unwritable(path, error) from None


@contextmanager
def private(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside `path` that nobody else writes to, for what is to be moved there when it is whole.

    What was not moved is removed when the context is left. A process that is killed leaves it behind, but not its
    lock, so the next writer of the same path removes it. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    claimed = None
    while claimed is None:  # another may sweep it between its making and its lock
        claimed = _claimed(path, folder)
    partial, handle = claimed
    try:
        yield partial
    finally:
        with suppress(OSError):
            _remove(partial)
        os.close(handle)


def _claimed(path: Path, folder: bool) -> tuple[Path, int] | None:
    """A new file or folder with the handle that locks it; None where another swept it meanwhile. Raises OSError."""
    partial = path.with_name(f"{_head(path)}{secrets.token_hex(6)}{SUFFIX}")
    if folder:
        partial.mkdir()
        try:
            handle = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            return None
    else:
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    with suppress(OSError):  # some file systems cannot lock; then nothing is swept there either
        fcntl.flock(handle, fcntl.LOCK_EX)
    if partial.exists():
        return partial, handle
    os.close(handle)
    return None


def unwritable(path: Path, error: Exception) -> StoreError:
    """What a user is told where a file cannot be written."""
    return StoreError(
        f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.",
        "Free some space or name another place (--store, --runs), then resume.",
    )


def _head(path: Path) -> str:
    return f".{path.name}."


def _sweep(path: Path) -> None:
    """Remove what writers of this path left behind who were killed: what nobody has a lock on."""
    for left in path.parent.iterdir():
        if left.name.startswith(_head(path)) and left.name.endswith(SUFFIX):
            with suppress(OSError):
                handle = os.open(left, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(left)
                finally:
                    os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
