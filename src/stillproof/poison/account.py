"""All that a poisoning showed, as tables and curves. NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stillproof.core.measurement import Measurement
from stillproof.findings import Curve, Series, Table
from stillproof.poison.verdict import Planted

Cell = str | int | float | Measurement | None


def students_table(mode: str, rows: Sequence[Planted]) -> Table:
    """What each transfer set did."""
    columns = [
        "added to the transfer set",
        "ASR",
        "lift over clean students",
        "ASR of another trigger",
        "test accuracy",
        "accuracy with the trigger",
        "accuracy lost",
    ]
    cells: list[list[Cell]] = [
        [row.name, row.asr, row.lift, row.other, row.accuracy, row.robust, row.lost] for row in rows
    ]
    return Table(
        title=f"Students, {mode} labels",
        columns=columns,
        rows=cells,
        note="ASR: share of other classes' test images, with the trigger and no δ, that are taken for the target.",
    )


def poison_table(crafted: Mapping[str, tuple[Measurement, Measurement]]) -> Table:
    """What the teacher says of what was added: (taken for the target, mean probability of the target)."""
    rows: list[list[Cell]] = [[name, taken, sure] for name, (taken, sure) in crafted.items()]
    return Table(
        title="What the teacher says of what was added",
        columns=["added", "taken for the target", "p(target)"],
        rows=rows,
        note="After it was stored as 8 bits, passed through the codec, and loaded again.",
    )


def rates(modes: Mapping[str, Sequence[Planted]]) -> Curve:
    """ASR by what was added."""

    def series(mode: str, rows: Sequence[Planted]) -> Series:
        shares = [row.asr for row in rows]
        return Series(
            name=f"{mode} labels",
            x=[row.name for row in rows],
            y=[share.value for share in shares],
            low=[share.low for share in shares],
            high=[share.high for share in shares],
        )

    return Curve(
        title="Attack success",
        kind="bars",
        x_label="added to the transfer set",
        y_label="ASR",
        series=[series(mode, rows) for mode, rows in modes.items()],
    )
