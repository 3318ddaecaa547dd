"""harden and distill end to end, in process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillproof.core.measurement import Measurement
from stillproof.core.plan import Execution
from stillproof.core.runtime import Runtime
from stillproof.core.store import Store
from stillproof.errors import InputError
from stillproof.findings import Result
from stillproof.verbs import VERBS, Verb, verb_named
from tests.thefts import Silent


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


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"defensive": True, "robust": "rslad"}, "contradict"),
        ({"objective": "dkd", "robust": "rslad"}, "contradict"),
        ({"temperature": 20.0}, "--defensive"),
        ({"defensive": True, "label_mode": "online"}, "plain images"),
        ({"robust": "kd"}, "no robust distillation"),
        ({"objective": "fitnets", "label_mode": "cached"}, "no answers of it can be cached"),
    ],
)
def test_ways_that_contradict_each_other_are_refused(settings: dict[str, Any], match: str) -> None:
    verb: Verb = verb_named("distill")
    given = verb.settings(data="digits", teacher="zoo:cnn?width=8", student="zoo:cnn?width=8", **settings)
    with pytest.raises(InputError, match=match):
        verb.plan(given.resolved(), Runtime.choose())


def test_features_are_matched_online_whether_it_is_said_or_not() -> None:
    verb: Verb = verb_named("distill")
    plain = {"data": "digits", "teacher": "zoo:cnn?width=8", "student": "zoo:cnn?width=8", "objective": "fitnets"}
    unsaid, said = (
        verb.plan(verb.settings(**plain, **more).resolved(), Runtime.choose())
        for more in ({}, {"label_mode": "online"})
    )
    assert [unsaid.key(one) for one in unsaid.order] == [said.key(one) for one in said.order]


@pytest.mark.parametrize("way", [{"defensive": True, "temperature": 20.0}, {"robust": "rslad?threat=linf:0.1&steps=2"}])
def test_defensive_and_robust_distillation_run(way: dict[str, Any], tmp_path: Path) -> None:
    result = run("distill", tmp_path, epochs=8, teacher="zoo:cnn?width=8", student="zoo:cnn?width=8", **way)
    assert "audit" in result.notes[0]
    accuracy = result.tables[0].rows[1][1]
    assert isinstance(accuracy, Measurement)
    assert (accuracy.value or 0) > 0.25  # of ten classes, after eight epochs of 400 images
