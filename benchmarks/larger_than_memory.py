"""A set of 500 000 images of 64×64×3 on disk is distilled for one epoch: how much memory that takes.

Memory: RssAnon + RssShmem of the process (/proc/self/status), looked at ten times a second; that is what it holds
beyond the page cache, in which the mapped files are.

Writes 6 GB to STILLPROOF_SCRATCH (default: the temporary folder), and the store as much again. About 15 minutes on
two cores.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import stillproof
from shared.memory import Peak, held_bytes
from shared.record import record

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import larger_than_memory

N, SIZE = int(os.environ.get("STILLPROOF_IMAGES", "500000")), 64


def main() -> None:
    """Write the set, distil on it, record the peak."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("STILLPROOF_SCRATCH")) as folder:
        larger_than_memory.write(Path(folder), N, SIZE)
        before = held_bytes()
        peak = Peak()
        peak.start()
        began = time.monotonic()
        result = stillproof.run(
            "distill",
            stillproof.RunOptions(runs=Path(folder) / "runs"),
            data=f"larger_than_memory:images?folder={folder}",
            teacher="zoo:cnn?width=4",
            student="zoo:cnn?width=4",
            epochs=1,
        )
        peak.done.set()
        peak.join()
    record(
        "larger_than_memory",
        images=N,
        size=SIZE,
        bytes_of_pixels=N * 3 * SIZE * SIZE,
        held_before=before,
        peak_held=peak.most,
        peak_gib=round(peak.most / 2**30, 3),
        peak_resident_with_page_cache=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        minutes=round((time.monotonic() - began) / 60, 1),
        summary=result.summary,
    )


if __name__ == "__main__":
    main()
