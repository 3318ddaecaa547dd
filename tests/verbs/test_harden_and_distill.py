"""harden and distill end to end, in process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillproof.core.plan import Execution
from stillproof.core.runtime import Runtime
from stillproof.core.store import Store
from stillproof.findings import Result
from stillproof.verbs import VERBS, Verb, verb_named
from tests.verbs.test_steal import Silent


def run(name: str, store: Path, *, epochs: int = 6, **given: Any) -> Result:
    verb: Verb = verb_named(name)
    settings = verb.settings(data="digits", limit=500, epochs=epochs, **given).resolved()
    planned = verb.plan(settings, Runtime.choose())
    values = Execution(planned, Store(str(store)), Silent()).run()
    assert verb.models(settings, values)
    return verb.conclude(settings, values)


def test_every_verb_is_what_its_name_says() -> None:
    for name in VERBS:
        assert verb_named(name).name == name


def test_harden_judges_whether_it_took_and_what_it_costs(tmp_path: Path) -> None:
    found = {f.rule: f for f in run("harden", tmp_path, model="zoo:cnn?width=8").findings}
    assert set(found) == {"SP-T3", "SP-T4"}
    assert found["SP-T4"].subject == "ast"
    assert found["SP-T4"].measurements["KL beyond that of a retraining"].value is not None
    assert "not covered" in found["SP-T3"].measurements["accuracy lost"].method


def test_identity_did_not_take(tmp_path: Path) -> None:
    found = {f.rule: f.status for f in run("harden", tmp_path, model="zoo:cnn?width=4", method="identity").findings}
    assert found == {"SP-T3": "pass", "SP-T4": "fail"}


def test_a_model_that_returns_probabilities_is_hardened_as_one_that_returns_logits(tmp_path: Path) -> None:
    result = run("harden", tmp_path, epochs=12, model="tests.victims:probabilities")
    rows = {str(row[0]): row for row in result.tables[0].rows}
    assert rows["hardened"][1].value > 0.5  # type: ignore[union-attr]  # trained on softmax of softmax it would crawl
    entropy = rows["hardened"][result.tables[0].columns.index("entropy")].value  # type: ignore[union-attr]
    assert entropy < 2.0  # ten classes that all looked alike would have 2.3


@pytest.mark.parametrize("label_mode", ["cached", "online"])
def test_a_student_without_labels_follows_its_teacher(tmp_path: Path, label_mode: str) -> None:
    given = {
        "teacher": "zoo:cnn?width=8",
        "student": "zoo:cnn?width=4",
        "label_mode": label_mode,
    }
    result = run("distill", tmp_path, epochs=25, objective="kd?alpha=1", **given)
    rows = {str(row[0]): row for row in result.tables[0].rows}
    assert rows["teacher"][2].value == 1.0  # type: ignore[union-attr]
    assert rows["student"][2].value > 0.6  # type: ignore[union-attr]
    assert rows["teacher"][-1].value == pytest.approx(0, abs=1e-9)  # type: ignore[union-attr]
    assert rows["student"][-1].value < 1  # type: ignore[union-attr]
