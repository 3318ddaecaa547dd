"""The SPEC grammar, one for data, models, thieves and defences: `name?option=value&option=value`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from urllib.parse import parse_qsl, urlencode

from stillproof.errors import InputError

SCHEMES = ("zoo", "hf", "timm", "torchvision", "http", "https")


@dataclass(frozen=True, slots=True)
class Spec:
    """A parsed SPEC: `zoo:resnet18?width=16` has the name `zoo:resnet18` and the option width=16."""

    name: str
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Parse a SPEC. Raises InputError on an empty name, an option without a value, or one given twice."""
        name, _, query = text.partition("?")
        if not name.strip():
            raise InputError(f"the SPEC {text!r} has no name.", "Write NAME or NAME?option=value&option=value.")
        try:
            pairs = parse_qsl(query, strict_parsing=True, keep_blank_values=True) if query else []
        except ValueError:
            raise InputError(
                f"the options of the SPEC {text!r} cannot be read.",
                "Write NAME?option=value&option=value (quote it: the shell reads ? and & itself).",
            ) from None
        blank = next((option for option, value in pairs if not value.strip()), None)
        if blank is not None:
            raise InputError(f"the option {blank} of the SPEC {text!r} has no value.", "Give it one, or leave it out.")
        options = dict(pairs)
        if len(options) < len(pairs):
            raise InputError(f"an option stands twice in the SPEC {text!r}.", "Keep one of them.")
        return cls(name.strip(), MappingProxyType(options))

    def __str__(self) -> str:
        query = urlencode(self.options, safe="/:,.~ ")
        return f"{self.name}?{query}" if query else self.name

    def without(self, option: str) -> Spec:
        """The same SPEC with one option left out."""
        return Spec(self.name, MappingProxyType({k: v for k, v in self.options.items() if k != option}))

    def with_option(self, option: str, value: str) -> Spec:
        """The same SPEC with one option set."""
        return Spec(self.name, MappingProxyType({**self.options, option: value}))

    @classmethod
    def parse_joined(cls, text: str) -> tuple[Spec, ...]:
        """SPECs joined by `+`: `ast?keep=2+round?decimals=1`. Raises InputError. Write 1e5, not 1e+5."""
        return tuple(cls.parse(part) for part in text.split("+"))

    @property
    def scheme(self) -> str:
        """What stands before the colon, if it is one of the known schemes; else ''."""
        head, colon, _ = self.name.partition(":")
        return head if colon and head in SCHEMES else ""

    @property
    def runs_code(self) -> bool:
        """Whether this SPEC names Python code of the user's (`package.module:factory`)."""
        return ":" in self.name and not self.scheme and not local_path(self.name).exists()


def local_path(text: str) -> Path:
    """A path as the user wrote it. Raises InputError for what the system cannot even look for."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{text[:60]!r} cannot be a path: {error}", "Check it.") from None
    return path


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex. Raises InputError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", "Check that it is there, and yours to read."
        ) from None
