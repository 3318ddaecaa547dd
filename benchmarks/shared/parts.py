"""A benchmark that comes in parts, named on its command line; all of them without a name."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def wanted_parts(parts: Sequence[str]) -> list[str]:
    """Which parts were asked for. Exits where one does not exist."""
    wanted = sys.argv[1:] or list(parts)
    if unknown := set(wanted) - set(parts):
        sys.exit(f"there is no part {', '.join(sorted(unknown))}; the parts: {', '.join(parts)}")
    return wanted
