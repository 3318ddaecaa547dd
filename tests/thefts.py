"""Small thefts of digits, in process, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stillproof.core.plan import Execution
from stillproof.core.runtime import Runtime
from stillproof.core.store import Store
from stillproof.findings import Result
from stillproof.theft.cast import FIXED_KD
from stillproof.verbs.steal import StealSettings, conclude, plan


class Silent:
    def started(self, *_: object) -> None: ...
    def advanced(self, *_: object) -> None: ...
    def finished(self, *_: object) -> None: ...


SMALL: dict[str, Any] = {
    "data": "digits",
    "limit": 400,
    "victim": "zoo:cnn?width=6",
    "thief_model": "zoo:cnn?width=6",
    "thief": ("kd", "kd-unlabelled", "label-only", FIXED_KD),
    "queries": "3/class",
    "seeds": 2,
    "epochs": 4,
    "thief_epochs": 5,
}


def settings(**changes: Any) -> StealSettings:
    return StealSettings(**{**SMALL, **changes}).resolved()


def run(given: StealSettings, store: Path) -> Result:
    planned = plan(given, Runtime.choose())
    return conclude(given, Execution(planned, Store(str(store)), Silent()).run())


def two_classes(folder: Path) -> dict[str, Any]:
    """Settings of a theft with sixty images of two classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(60) % 2
    np.savez(folder / "two.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    return {"data": str(folder / "two.npz"), "queries_from": "inside", "limit": None}
