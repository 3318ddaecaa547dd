"""Images that the user's own code provides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stillproof.core.images import ImageSet
from stillproof.core.plugins import call_with_options, code_identity, user_code
from stillproof.core.sources.source import DataSource, Facts, Opened, Source, from_sets
from stillproof.core.spec import Spec
from stillproof.errors import InputError


@dataclass(frozen=True)
class UserCode(Source):
    """`package.module:factory`, called with the SPEC's options; returns a DataSource or (train, test).

    Its ImageSets may be memory-mapped: they are read a few thousand images at a time.
    """

    spec: Spec

    def identity(self) -> Mapping[str, object]:
        made = self._made()  # its images may come from a file that changes while the code does not
        images = [part.fingerprint() for part in (made.train, made.test)]
        return {"source": str(self.spec), "code": code_identity(self.spec), "images": images}

    def facts(self) -> Facts:
        train, test = self._made()
        return Facts(len(train), len(test), len(train.classes))

    def open(self) -> Opened:
        return from_sets(*self._made())

    def _made(self) -> DataSource:
        made = call_with_options(user_code(self.spec), self.spec)
        if not (isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, ImageSet) for part in made)):
            raise InputError(
                f"{self.spec.name} returned {type(made).__name__}.",
                "It must return stillproof.DataSource(train, test), two ImageSets.",
            )
        return DataSource(*made)
