"""The run directory: what is in it, how it is opened, found and resumed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from stillproof.core.files import write_atomically
from stillproof.errors import InputError, StoreError
from stillproof.findings import Result

SETTINGS, ENVIRONMENT, EVENTS, RESULT, REPORT, MODELS, SETS = (
    "settings.yaml",
    "environment.json",
    "events.jsonl",
    "result.json",
    "report.html",
    "models",
    "sets",
)
REFUSED = "refused.txt"
"""Left where a run ended for its input: resuming it would end the same way."""

_NAME = re.compile(r"\d{8}T\d{6}Z-[a-z]+-[0-9a-f]{8}(-\d+)?")


class How(BaseModel):
    """What besides its settings a resumed run needs, to end as if it had not been stopped."""

    model_config = ConfigDict(extra="forbid")

    store: str
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """`runs/<utc>-<verb>-<key8>/` with settings, environment, events, and, once finished, result, report, models."""

    path: Path

    @classmethod
    def create(cls, root: Path, verb: str, key: str, settings: Mapping[str, Any], how: How) -> RunDirectory:
        """A new directory; never one that is there already. Raises StoreError.

        settings: the resolved settings of the verb.
        """
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        name = f"{stamp}-{verb}-{key[:8]}"
        path = next(p for p in _names(root / name) if not p.exists())
        run = cls(path)
        content = {"verb": verb, "settings": dict(settings), "how": how.model_dump()}
        write_atomically(path / SETTINGS, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """A directory that is there. Raises InputError if it is no run."""
        if not (path / SETTINGS).is_file():
            raise InputError(f"{path} is no run directory: it has no {SETTINGS}.", "See: stillproof list.")
        return cls(path)

    @property
    def finished(self) -> bool:
        """Whether it has its result and its report."""
        return (self.path / RESULT).is_file() and (self.path / REPORT).is_file()

    def settings(self) -> tuple[str, dict[str, Any], How]:
        """(verb, settings, how), as they were saved. Raises InputError if they cannot be read."""
        try:
            content = yaml.safe_load((self.path / SETTINGS).read_bytes())
            return str(content["verb"]), dict(content["settings"]), How.model_validate(content["how"])
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{self.path / SETTINGS} cannot be read: {error}", "Start the run anew.") from None

    def note(self, event: str, **more: object) -> None:
        """Append a line to events.jsonl."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **more}
        text = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        try:  # a run directory that was received may hold a link to anything: it is not followed
            place = os.open(self.path / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            with os.fdopen(place, "wb") as stream:
                stream.write(text)
        except OSError as error:
            what = f"{self.path / EVENTS} cannot be written: {error.strerror or error}."
            raise StoreError(what, "Free some space, then resume.") from None

    def write(self, name: str, content: str) -> None:
        """Write one of its files, whole or not at all. Raises StoreError."""
        write_atomically(self.path / name, content.encode())


def _names(path: Path) -> Any:
    yield path
    for number in range(2, 1000):
        yield path.with_name(f"{path.name}-{number}")


def read_result(path: Path) -> Result:
    """The result of a run directory, or of a result.json. Raises InputError."""
    file = path / RESULT if path.is_dir() else path
    if not file.is_file():
        unfinished = path.is_dir() and (path / SETTINGS).is_file()
        hint = f"The run is not finished: stillproof resume {path}." if unfinished else "See: stillproof list."
        raise InputError(f"there is no {file}.", hint)
    try:
        return Result.model_validate_json(file.read_bytes())
    except (ValidationError, OSError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise InputError(f"{file} is no result of Stillproof: {reason}.", "Run the verb again.") from None


def runs_in(root: Path) -> list[RunDirectory]:
    """All runs below a folder, oldest first."""
    if not root.is_dir():
        return []
    return [
        RunDirectory(path)
        for path in sorted(root.iterdir())
        if _NAME.fullmatch(path.name) and (path / SETTINGS).is_file()
    ]


def latest_unfinished(root: Path) -> RunDirectory:
    """The youngest run that was stopped, and not refused for its input. Raises InputError if there is none."""
    for run in reversed(runs_in(root)):
        if not run.finished and not (run.path / REFUSED).exists():
            return run
    raise InputError(f"there is no unfinished run in {root}.", "See: stillproof list.")
