"""How long it takes until CIFAR-10 can be trained on: decoded the first time, opened every time after.

First: the stage that reads the parquet files and decodes all 60 000 JPEG images into mapped files, in an empty store.
Opened: the same stage found in that store; and what of the images is then in memory (RssAnon), not in mapped files.
Half a minute on two cores.
"""

from __future__ import annotations

import tempfile
import time

from shared.memory import held_bytes
from shared.plans import Printing
from shared.record import needed_cifar10, record
from stillproof.core.carving import carve, data_stage
from stillproof.core.plan import Execution, Plan
from stillproof.core.runtime import Runtime
from stillproof.core.store import Store

OPENINGS = 5


def main() -> None:
    """Decode once, open a few times."""
    place = needed_cifar10("decoding")
    runtime = Runtime.choose()
    runtime.apply()
    plan = Plan({"data": data_stage(place, None).stage}, runtime)
    with tempfile.TemporaryDirectory() as folder:
        times, held = [], []
        for _ in range(1 + OPENINGS):
            before, began = held_bytes(), time.perf_counter()
            parts = carve(Execution(plan, Store(folder), Printing()).run()["data"])
            times.append(time.perf_counter() - began)
            held.append(held_bytes() - before)
    images = sum(len(part) for part in (parts.training, parts.validation, parts.pool, parts.test))
    record(
        "decoding",
        images=images,
        first_seconds=round(times[0], 2),
        opened_seconds=round(sorted(times[1:])[OPENINGS // 2], 3),
        memory_held_by_an_opened_set=max(held[1:]),
        bytes_of_pixels=images * 3 * 32 * 32,
    )


if __name__ == "__main__":
    main()
