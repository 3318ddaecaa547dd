"""How long `stillproof --help` and `stillproof steal --help` take: the fastest of ten, and over a bare interpreter.

Figures go to benchmarks/results/start_up.json.
"""

from __future__ import annotations

import subprocess
import sys
import time

from shared.record import record

COMMANDS = {
    "bare interpreter": ["-c", "pass"],
    "stillproof --help": ["-m", "stillproof", "--help"],
    "stillproof steal --help": ["-m", "stillproof", "steal", "--help"],
}


def fastest(arguments: list[str]) -> float:
    """Seconds of wall time, the least of ten runs."""
    times = []
    for _ in range(10):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    """Measure, print, write."""
    seconds = {name: round(fastest(arguments), 3) for name, arguments in COMMANDS.items()}
    bare = seconds["bare interpreter"]
    ratios = {name: round(value / bare, 1) for name, value in seconds.items()}
    record("start_up", seconds=seconds, ratio_to_bare=ratios)


if __name__ == "__main__":
    main()
