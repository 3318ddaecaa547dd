"""`stillproof audit`, as the command line runs it, on digits."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

import stillproof
from stillproof import cli
from stillproof.errors import InputError
from stillproof.findings import Result
from stillproof.runs.options import RunOptions
from stillproof.verbs.audit import AuditSettings, parse_budget, plan
from tests.serving.test_http import Server

SETTINGS = {"data": "digits", "profile": "smoke", "epochs": 6, "images": 60, "threat": "linf:0.1"}


def audited(tmp_path: Path, **settings: object) -> Result:
    options = RunOptions(runs=tmp_path / "runs", store=str(tmp_path / "store"))
    return stillproof.run("audit", options, **{"model": "zoo:cnn?width=8", **SETTINGS, **settings})


def test_the_self_test_tells_the_planted_twins_apart(tmp_path: Path) -> None:
    result = audited(tmp_path, self_test=True)
    assert not result.notes
    table = result.tables[0]
    said = {row[0]: row[2] for row in table.rows}
    assert said == {"model": "no", "masked twin": "yes", "clean twin": "no"}
    statuses = {finding.rule: finding.status for finding in result.findings}
    assert statuses["SP-E2"] == "pass"
    assert statuses["SP-E1"] == "fail"  # an undefended classifier
    assert {curve.title for curve in result.curves} >= {"The ladder", "Accuracy against epsilon"}
    assert result.images
    curve = next(curve for curve in result.curves if curve.title == "Accuracy against epsilon")
    assert curve.series[0].y[-1] == 0
    page = next((tmp_path / "runs").glob("*/report.html")).read_text()
    assert "The red team" in page


class Box:
    """Answers with labels; it is no module."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(self, images: Tensor) -> Tensor:
        return (images.mean((1, 2, 3)) * 50).long() % self.classes


def box(classes: int = 10) -> Box:
    return Box(classes)


def test_a_self_test_that_cannot_tell_is_no_success(tmp_path: Path) -> None:
    result = audited(tmp_path, self_test=True, images=8)
    assert result.status == "error"
    assert "does not tell planted twins apart on these data (masked twin: masked inconclusive" in result.notes[0]
    assert cli.exit_code(result.model_copy(update={"findings": []}), RunOptions()) == cli.INCOMPLETE


def twice(classifier: nn.Module) -> nn.Module:
    return classifier


def test_a_black_box_has_a_budget_of_queries(tmp_path: Path) -> None:
    settings = {"model": f"{__name__}:box", "black_box": True, "twin": "none", "queries": 2000}
    result = audited(tmp_path, **settings)
    assert 0 < result.cost.queries <= 2000
    assert next(finding for finding in result.findings if finding.rule == "SP-E2").status == "inconclusive"


def ten_scores(images: np.ndarray) -> np.ndarray:
    """Of a linear classifier that knows nothing."""
    weight = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    found: np.ndarray = (images.reshape(len(images), -1) - 0.5) @ weight
    return found


@pytest.mark.parametrize(("form", "restarts"), [("json", False), ("npz", True)])
def test_an_endpoint_is_audited_and_every_query_is_counted(tmp_path: Path, form: str, restarts: bool) -> None:
    server = Server()
    server.scores = ten_scores
    server.faults = ["", "500", "", "503", "hang"]
    if restarts:
        threading.Timer(1.5, server.restart).start()
    result = audited(
        tmp_path,
        model=f"{server.url}?format={form}&timeout=0.5&patience=30&rate=200&batch=32",
        twin="none",
        images=40,
        queries=3000,
    )
    # a server that goes away may not have read what was sent to it
    lost = result.cost.queries - server.images
    assert lost >= 0 if restarts else lost == 0
    assert result.cost.queries <= 3000
    asked = np.array(server.requests)
    few = min(50, len(asked) - 1)
    assert min(asked[few:] - asked[:-few]) > few / 200 - 0.1  # a busy machine notes one late, never fifty early
    robust = result.findings[0].measurements["worst-case robust accuracy"].value
    assert robust is not None
    assert robust < 0.05  # of a classifier that nobody trained, and that queries can fool
    server.stop()


def test_an_adaptive_attack_is_a_rung(tmp_path: Path) -> None:
    result = audited(tmp_path, adaptive=f"{__name__}:twice", images=20)
    ladder = next(table for table in result.tables if table.title == "The ladder")
    (row,) = [row for row in ladder.rows if row[0] == "adaptive, through your module"]
    assert row[ladder.columns.index("images")] > 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"threat": "l7:1"}, "no threat"),
        ({"budget": "soon"}, "no budget"),
        ({"adaptive": "not-a-factory"}, "no adaptive attack"),
        ({"model": "http://host/x", "adaptive": "a:b"}, "black box"),
        ({"model": "http://host/x", "self_test": True}, "black box"),
        ({"model": "zoo:cnn", "black_box": True}, "no endpoint"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(settings: dict[str, object], match: str) -> None:
    given = AuditSettings(**{"model": "zoo:cnn?width=8", **SETTINGS, **settings})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=match):
        plan(given.resolved(), stillproof.Runtime.choose())


def test_budgets_are_read() -> None:
    assert parse_budget("10min").seconds == 600
    assert parse_budget("90s").seconds == 90
    assert parse_budget("2000").passes == 2000
    assert parse_budget(None) == parse_budget(None)
