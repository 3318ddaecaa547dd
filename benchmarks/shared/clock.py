"""The clock of a benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable

from stillproof.core.runtime import Runtime


def clock_of(runtime: Runtime) -> Callable[[], float]:
    """Seconds of the CPU where there is one thread, which another program does not lengthen; else of the clock."""
    return time.process_time if runtime.threads == 1 else time.perf_counter
