"""Writing files so that they are there whole or not at all."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

from stillproof.core import faults
from stillproof.errors import StoreError


def write_atomically(path: Path, content: bytes, *, fault: str = "") -> None:
    """Write a file so that it is there whole or not at all. Raises StoreError, leaving nothing behind.

    fault: the kill point that stands in the middle of the writing (core.faults).
    """
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        with partial.open("wb") as stream:
            stream.write(content[: len(content) // 2])
            stream.flush()
            if fault:
                faults.kill_point(fault)
            stream.write(content[len(content) // 2 :])
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> StoreError:
    """What a user is told where a file cannot be written."""
    return StoreError(
        f"{path} cannot be written: {error.strerror or error}.",
        "Free some space or name another place (--store, --runs), then resume.",
    )


def partial_of(path: Path) -> Path:
    """Where this process writes a file until it is whole."""
    return path.with_name(f"{_head_of(path)}{os.getpid()}.partial")


def _head_of(path: Path) -> str:
    return f".{path.name}.{platform.node()}-"


def sweep(path: Path) -> None:
    """Remove what writers of this file left behind who were killed on this host."""
    head, tail = _head_of(path), ".partial"
    for left in path.parent.iterdir():
        if not (left.name.startswith(head) and left.name.endswith(tail)):
            continue
        writer = left.name[len(head) : -len(tail)]
        if writer.isdecimal() and not _is_running(int(writer)):
            left.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
