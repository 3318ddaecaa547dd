"""How a benchmark runs stages: from the shared store, a line a stage, so that it goes on where it was."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from stillproof.core.plan import Execution, Plan, Stage
from stillproof.core.runtime import Runtime
from stillproof.core.store import Artefact, Store


class Printing:
    """Watches a plan: a line a stage."""

    def started(self, number: int, of: int, found: Stage, _key: str) -> None:
        print(f"[{number}/{of}] {found.label}", file=sys.stderr, flush=True)

    def advanced(self, *_: object) -> None: ...

    def finished(self, *_: object) -> None: ...


def store_place() -> str:
    """The store that benchmarks share (STILLPROOF_STORE, default runs/store)."""
    return os.environ.get("STILLPROOF_STORE", "runs/store")


def executed(stages: Mapping[str, Stage], runtime: Runtime) -> dict[str, Artefact]:
    """The artefacts of these stages; what is in the store is not run again."""
    return Execution(Plan(dict(stages), runtime), Store(store_place()), Printing()).run()
