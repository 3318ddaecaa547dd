"""The schema every verb answers in: findings with their evidence, and the Result that holds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from stillproof.core.measurement import Cost, Measurement, Whole

SCHEMA_VERSION: Literal[1] = 1

Status = Literal["pass", "fail", "inconclusive", "error"]
Severity = Literal["low", "medium", "high"]

WORST_FIRST: tuple[Status, ...] = ("error", "fail", "inconclusive", "pass")
SEVERITIES: tuple[Severity, ...] = ("low", "medium", "high")

Rule = Annotated[str, Field(pattern=r"^SP-[TEP]\d+$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(_Part):
    """One rule's verdict on one subject, with the numbers that say so."""

    rule: Rule
    subject: str
    title: str
    status: Status
    severity: Severity
    measurements: dict[str, Measurement] = {}
    evidence: list[str] = []
    advice: str = ""


class Table(_Part):
    """Rows of cells: text, numbers, or Measurements."""

    title: str
    columns: list[str]
    rows: list[list[str | Whole | float | Measurement | None]]
    note: str = ""


class Series(_Part):
    """One line or set of bars: y with optional bounds at each x (numbers or names)."""

    name: str
    x: list[float] | list[str]
    y: list[float | None]
    low: list[float | None] = []
    high: list[float | None] = []


class Curve(_Part):
    """What one plot shows. `levels` are horizontal reference lines, by name."""

    title: str
    kind: Literal["line", "bars"]
    x_label: str
    y_label: str
    series: list[Series]
    levels: dict[str, float] = {}
    note: str = ""


class Picture(_Part):
    """An image shown in the report: base64 of a PNG."""

    title: str
    png: str


class Result(_Part):
    """What a verb found. Written as result.json; the report is a pure function of it."""

    schema_version: Literal[1] = SCHEMA_VERSION
    verb: str
    status: Status
    summary: str = ""
    notes: list[str] = []
    findings: list[Finding] = []
    tables: list[Table] = []
    curves: list[Curve] = []
    images: list[Picture] = []
    cost: Cost = Cost()
    settings: dict[str, JsonValue] = {}
    environment: dict[str, JsonValue] = {}


def worst(statuses: Iterable[Status]) -> Status:
    """The status of several together; nothing found is a pass."""
    found = set(statuses)
    return next((status for status in WORST_FIRST if status in found), "pass")


def at_or_over(findings: Sequence[Finding], severity: Severity) -> list[Finding]:
    """The failed findings of at least this severity."""
    floor = SEVERITIES.index(severity)
    return [f for f in findings if f.status == "fail" and SEVERITIES.index(f.severity) >= floor]


def judge(measured: Measurement, limit: float, *, good: Literal["below", "above"]) -> Status:
    """Pass or fail only where the whole interval lies on one side of the limit; else inconclusive."""
    if measured.value is None:
        return "inconclusive"
    low = measured.low if measured.low is not None else measured.value
    high = measured.high if measured.high is not None else measured.value
    if good == "below":
        return "pass" if high <= limit else "fail" if low > limit else "inconclusive"
    return "pass" if low >= limit else "fail" if high < limit else "inconclusive"


def json_schema() -> dict[str, Any]:
    """The JSON Schema of Result, as committed in docs/result.schema.json."""
    return Result.model_json_schema()


if __name__ == "__main__":
    import json

    print(json.dumps(json_schema(), indent=1, sort_keys=True))
