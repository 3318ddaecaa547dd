"""Settings from a file: read without running anything, checked name by name, code refused unless allowed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from stillproof.core.spec import Spec, local_path
from stillproof.errors import InputError, nearest

NO_SPEC = ("runs", "store", "device", "precision", "threat", "transfer", "codec", "budget", "queries")
"""The settings that may hold a colon and are no SPECs. Whatever is not named here could be one that runs code."""


def read_config(path: Path, known: Collection[str], *, allow_code: bool) -> dict[str, Any]:
    """The settings of a YAML file.

    known: the settings there are, with underscores. Raises InputError for a file that is no plain YAML, for a
    setting that is not known (and names the nearest), and for a SPEC that would run code unless `allow_code`.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the config file {path} cannot be read: {error}", "Check --config.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"the config file {path} is no plain YAML: {error}", "Mend it; tags are not read.") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError(f"the config file {path} holds no settings.", "Write lines of NAME: VALUE.")
    for name in content:
        if name.replace("-", "_") not in known:
            raise InputError(f"unknown setting {name!r} in {path}.", nearest(name, known))
    refuse_code(content, str(path), allowed=allow_code)
    return {name: value for name, value in content.items() if value is not None}


def refuse_code(values: Mapping[str, Any], where: str, *, allowed: bool) -> None:
    """Raise InputError if a file's settings name code to run, unless that was allowed."""
    if allowed:
        return
    for name, value in values.items():
        for text in _strings(value, f"{name} in {where}"):
            if name.replace("-", "_") not in NO_SPEC and _names_code(text):
                raise InputError(
                    f"{name} in {where} is {text!r}, which would run code.",
                    "Name it with a flag instead, or add --allow-code if you trust the file.",
                )


def _strings(value: object, where: str) -> Iterator[str]:
    """All text in a value. Raises InputError for bytes and the like, which something may take for text later on."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from (*_strings(key, where), *_strings(one, where))
    elif isinstance(value, list | tuple | set):
        for one in value:
            yield from _strings(one, where)
    elif not isinstance(value, int | float | None):
        raise InputError(
            f"{where} is a {type(value).__name__}.", "Write text, a number, true, false, or a list of such."
        )


def _names_code(text: str) -> bool:
    """Whether a text, or a part of several that are joined, is a SPEC of code. A place is no list."""
    if _runs_code(text) or "://" in text or _exists(text):
        return _runs_code(text)
    return any(_runs_code(part) for part in (*text.split("+"), *text.split(",")))


def _runs_code(text: str) -> bool:
    try:
        return Spec.parse(text).runs_code
    except InputError:  # no SPEC at all
        return False


def _exists(text: str) -> bool:
    try:
        return local_path(text).exists()
    except InputError:
        return False
