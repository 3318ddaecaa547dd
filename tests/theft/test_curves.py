"""What the best thief gets, by its queries."""

from __future__ import annotations

from pathlib import Path

from tests.thefts import run, settings


def test_further_budgets_are_a_curve_and_change_nothing_else(tmp_path: Path) -> None:
    given = settings(defence=("power",), thief=("kd", "label-only"), seeds=1, thief_epochs=3)
    alone = run(given, tmp_path)
    more = run(settings(**given.model_dump() | {"budgets": ("2/class,4/class",)}), tmp_path)
    assert (more.findings, more.tables) == (alone.findings, alone.tables)
    assert more.curves[: len(alone.curves)] == alone.curves
    (curve,) = more.curves[len(alone.curves) :]
    assert {series.name for series in curve.series} == {"victim", "power", "reference", "labels alone"}
    assert all(series.x == [20, 30, 40] for series in curve.series)
    bars = next(curve for curve in alone.curves if curve.kind == "bars")
    assert set(bars.levels) == {"victim", "reference", "labels alone"}
