"""Named points at which a test can have this process killed, to prove that nothing is lost.

`STILLPROOF_KILL_AT=stage:3` sends SIGKILL to the process at the third pass through the point `stage`.
The points: `stage` (a stage is finished), `training` (a checkpoint is written), `artefact` (one is half
written), `report` (it is half written), `rung` (an attack of an audit is done).
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "STILLPROOF_KILL_AT"

_passed: Counter[str] = Counter()


def kill_point(name: str) -> None:
    """Nothing, unless the environment asks for this process to die here."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    point, _, nth = wanted.partition(":")
    _passed[name] += 1
    if point == name and _passed[name] == int(nth or 1):
        os.kill(os.getpid(), signal.SIGKILL)
