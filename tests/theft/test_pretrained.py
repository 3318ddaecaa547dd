"""Thieves who have pretrained weights: they begin with them, and so does the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillproof.core.classifiers import Model
from stillproof.core.plan import Execution
from stillproof.core.runtime import Runtime
from stillproof.core.store import Artefact, Store
from stillproof.core.weights import save_classifier
from stillproof.errors import InputError
from stillproof.verbs.steal import StealSettings, conclude, plan

SHAPE = (1, 8, 8)


class Silent:
    def started(self, *_: object) -> None: ...
    def advanced(self, *_: object) -> None: ...
    def finished(self, *_: object) -> None: ...


def saved(path: Path, classes: int, spec: str = "zoo:cnn?width=6") -> Path:
    state = Model(spec).fresh(SHAPE, classes, seed=5).state_dict()
    save_classifier(path, state, spec=spec, shape=SHAPE, classes=[str(n) for n in range(classes)])
    return path


def test_a_training_begins_with_the_weights_and_a_new_last_layer_where_the_classes_are_others(tmp_path: Path) -> None:
    same, other = saved(tmp_path / "ten.safetensors", 10), saved(tmp_path / "four.safetensors", 4)
    theirs = Model(str(same)).build(SHAPE, 10).state_dict()
    ours = Model(str(same)).begun(SHAPE, 10, seed=1).state_dict()
    assert all(ours[name].equal(theirs[name]) for name in theirs)

    body = Model(str(other)).build(SHAPE, 4).state_dict()
    begun = [Model(str(other)).begun(SHAPE, 10, seed).state_dict() for seed in (1, 1, 2)]
    heads = [name for name in body if begun[0][name].shape != body[name].shape]
    assert heads
    assert all(begun[0][name].equal(body[name]) for name in body if name not in heads)
    for name in heads:
        assert len(begun[0][name]) == 10
        assert begun[0][name].equal(begun[1][name])
    assert not all(begun[0][name].equal(begun[2][name]) for name in heads)

    fresh = Model("zoo:cnn?width=6")
    drawn = [made(SHAPE, 10, 3).state_dict() for made in (fresh.begun, fresh.fresh)]
    assert all(drawn[0][name].equal(drawn[1][name]) for name in drawn[0])


def test_a_layer_within_is_never_drawn_anew(tmp_path: Path) -> None:
    larger = tmp_path / "larger.safetensors"
    state = Model("zoo:cnn?width=6").fresh((1, 32, 32), 10, seed=5).state_dict()
    names = [str(n) for n in range(10)]
    save_classifier(larger, state, spec="zoo:cnn?width=6", shape=(1, 32, 32), classes=names)
    with pytest.raises(InputError, match="do not fit the model"):
        Model(str(larger)).begun((1, 16, 16), 10, seed=1)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    wide = saved(tmp_path / "wide.safetensors", 10, "zoo:cnn?width=8")
    with pytest.raises(InputError, match="do not fit the model"):
        Model(f"zoo:cnn?width=6&weights={wide}").begun(SHAPE, 10, seed=1)


def test_thieves_and_reference_have_them_and_the_account_says_so(tmp_path: Path) -> None:
    def theft(**changes: Any) -> StealSettings:
        small = "zoo:cnn?width=6"
        common: dict[str, Any] = {
            "data": "digits",
            "victim": small,
            "thief_model": small,
            "seeds": 1,
            "epochs": 8,
            "thief": ("kd",),
        }
        return StealSettings(**common | {"queries": "3/class"} | changes).resolved()

    def executed(given: StealSettings) -> dict[str, Artefact]:
        return Execution(plan(given, Runtime.choose()), Store(str(tmp_path / "store")), Silent()).run()

    first = executed(theft(thief_epochs=1))
    state = {
        name.removeprefix("state."): value
        for name, value in first["0/victim/model"].tensors.items()
        if name.startswith("state.")
    }
    weights = tmp_path / "pretrained.safetensors"
    save_classifier(weights, state, spec="zoo:cnn?width=6", shape=SHAPE, classes=[str(n) for n in range(10)])
    given = theft(thief_epochs=1, thief_model=str(weights))
    second = executed(given)

    def accuracy(values: dict[str, Artefact], name: str) -> float:
        tensors = values[f"0/{name}"].tensors
        return float((tensors["logits"].argmax(1) == tensors["labels"]).float().mean())

    for name in ("reference", "victim/kd"):
        assert accuracy(first, name) < 0.5 < 0.8 < accuracy(second, name)
    result = conclude(given, second)
    (table,) = [table for table in result.tables if table.title == "Thieves of victim"]
    assert table.rows[0][table.columns.index("knows")] == "nothing of a defence; has pretrained weights"
    said = next(found for found in result.findings if found.rule == "SP-T1")
    assert any("begin with the pretrained weights" in line for line in said.evidence)
