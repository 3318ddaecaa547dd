"""Where a benchmark's figures go: benchmarks/results/NAME.json, with the machine and the versions beside them.

`machines` holds those that took part, and `measured on` which of them each entry is of: parts are run one by one.
Entries that are not among these are older; their machine is `machine`, or that of the commit that brought them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillproof.core.runtime import Runtime, cores
from stillproof.runs.environment import cpu_name, versions

RESULTS = Path(__file__).parents[1] / "results"


def record(name: str, **found: Any) -> None:
    """Add figures to those of a benchmark, so that its parts can be run one by one."""
    file, before = RESULTS / f"{name}.json", recorded(name)
    chosen = Runtime.choose()
    machine = {
        "cpu": cpu_name(),
        "cores": cores(),
        "device": chosen.device,
        "precision": chosen.precision,
        "packages": versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    machines = list(before.get("machines", []))
    if machine not in machines:
        machines.append(machine)
    measured = {**before.get("measured on", {}), **dict.fromkeys(found, machines.index(machine))}
    content = {**before, **found, "machines": machines, "measured on": measured}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"{name}: {', '.join(found)} recorded in {file.name}")


def recorded(name: str) -> Mapping[str, Any]:
    """The figures of a benchmark so far."""
    file = RESULTS / f"{name}.json"
    found: Mapping[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def cifar10() -> str | None:
    """The folder of CIFAR-10 as parquet, where the environment names one (STILLPROOF_CIFAR10)."""
    return os.environ.get("STILLPROOF_CIFAR10")


def needed_cifar10(what: str) -> str:
    """The same; where there is none it exits, and says that `what` is left out."""
    place = cifar10()
    if not place:
        sys.exit(f"left out: {what}, without STILLPROOF_CIFAR10, a folder with CIFAR-10 as parquet")
    return place
