"""What a process holds beyond the page cache: RssAnon + RssShmem of /proc/self/status."""

from __future__ import annotations

import threading
from pathlib import Path

CHECKS_A_SECOND = 10


def held_bytes() -> int:
    """Memory of this process that is not page cache."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


class Peak(threading.Thread):
    """Watches the memory until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(1 / CHECKS_A_SECOND):
            self.most = max(self.most, held_bytes())
