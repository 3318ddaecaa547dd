"""Sets of images that a run leaves behind: an .npz that is itself a data SPEC, and a manifest that says what it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stillproof.core.files import private, unwritable, write_atomically

if TYPE_CHECKING:
    from stillproof.core.images import ImageSet


@dataclass(frozen=True, slots=True)
class WrittenSet:
    """training: what was made; test: clean test images beside it, if there are; manifest: what it is, as JSON."""

    training: ImageSet
    manifest: Mapping[str, object]
    test: ImageSet | None = None


def write_set(folder: Path, name: str, written: WrittenSet) -> None:
    """Write NAME.npz and NAME.json, each whole or not at all. Raises StoreError."""
    what = str(written.manifest.get("what", ""))  # for whoever has the file without its manifest
    arrays: dict[str, Any] = {"classes": np.array(written.training.classes), "what": np.array(what)}
    parts = {"": written.training} if written.test is None else {"train_": written.training, "test_": written.test}
    for prefix, part in parts.items():
        arrays[f"{prefix}images"], arrays[f"{prefix}labels"] = part.images.numpy(), part.known_labels().numpy()
    path = folder / f"{name}.npz"
    write_atomically(folder / f"{name}.json", json.dumps(dict(written.manifest), indent=1).encode())
    try:
        with private(path) as partial:
            with partial.open("wb") as stream:
                np.savez_compressed(stream, **arrays)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
    except OSError as error:
        raise unwritable(path, error) from None
