"""Runs in several threads of one process take turns, and find what a run alone finds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import stillproof

SMALL: dict[str, Any] = {
    "data": "digits",
    "limit": 300,
    "victim": "zoo:cnn?width=4",
    "thief_model": "zoo:cnn?width=4",
    "thief": ("kd?temperature=2&alpha=0.9",),
    "queries": "3/class",
    "seeds": 1,
    "epochs": 2,
    "thief_epochs": 2,
}


def stolen(folder: Path) -> list[object]:
    options = stillproof.RunOptions(runs=folder / "runs", store=str(folder / "store"))
    return [table.model_dump() for table in stillproof.run("steal", options, **SMALL).tables]


def test_runs_in_threads_find_what_a_run_alone_finds(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(stolen, [tmp_path / str(number) for number in range(3)]))
    alone = stolen(tmp_path / "alone")
    assert all(one == alone for one in found)
