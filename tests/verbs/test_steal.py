"""The theft end to end, in process, on real digits."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillproof.core.plan import Execution, Plan
from stillproof.core.runtime import Runtime
from stillproof.core.store import Artefact, Store
from stillproof.errors import InputError
from stillproof.findings import Finding, Result
from stillproof.verbs.steal import StealSettings, cast, conclude, models, plan
from tests.thefts import Silent, run, settings, two_classes


def key_of(label: str, given: StealSettings) -> str:
    planned = plan(given, Runtime.choose())
    (found,) = {planned.key(found) for found in planned.order if found.label == label}
    return found


@cache
def whole(folder: Path) -> Result:
    return run(settings(defence=("ast", "identity")), folder)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return whole(tmp_path_factory.getbasetemp() / "steal")


def finding(result: Result, rule: str, subject: str) -> Finding:
    (found,) = [f for f in result.findings if (f.rule, f.subject) == (rule, subject)]
    return found


def test_every_served_classifier_has_its_findings(result: Result) -> None:
    said = [(f.rule, f.subject) for f in result.findings]
    assert said[:3] == [("SP-T1", "victim"), ("SP-T1", "ast"), ("SP-T1", "identity")]
    assert {(rule, name) for rule in ("SP-T2", "SP-T3", "SP-T4") for name in ("ast", "identity")} <= set(said)


def test_identity_as_a_defence_did_not_take(result: Result) -> None:
    took = finding(result, "SP-T4", "identity")
    assert took.status == "fail"
    assert took.measurements["KL to the original answers"].value == 0
    assert finding(result, "SP-T2", "identity").status == "inconclusive"
    lost = finding(result, "SP-T3", "identity")
    assert (lost.status, lost.measurements["accuracy lost"].value) == ("pass", 0)


def test_a_thief_of_the_identity_defence_is_the_thief_of_the_victim(result: Result) -> None:
    tables = {table.title: table for table in result.tables}
    place = tables["Thieves of identity"].columns.index("lost to the defence")

    def apart(served: str) -> list[Any]:
        return [row[:place] + row[place + 1 :] for row in tables[f"Thieves of {served}"].rows]

    assert apart("identity") == tables["Thieves of victim"].rows
    assert apart("ast") != tables["Thieves of victim"].rows
    lost = [row[place] for row in tables["Thieves of identity"].rows]
    assert all((found.value, found.low, found.high) == (0, 0, 0) for found in lost)  # type: ignore[union-attr]


def test_the_tables_count_queries_and_bits_exactly(result: Result) -> None:
    (table,) = [table for table in result.tables if table.title == "Thieves of victim"]
    assert [row[0] for row in table.rows] == ["KD", "KD unlabelled", "label only", "KD, fixed T = 4, α = 0.9"]
    for row in table.rows:
        assert row[-2:] == [30, 30 * 10 * 32]


def test_the_result_is_valid_for_its_own_schema_and_survives_json(result: Result) -> None:
    assert Result.model_validate_json(result.model_dump_json()) == result


# responses

RESPONSES = ("round?decimals=1", "top?k=2+round?decimals=1", "power", "power?exponent=1", "identity+label-only")


@cache
def answered(folder: Path) -> Result:
    return run(settings(defence=RESPONSES, thief=("kd?alpha=0.9", "label-only"), transfer="linf:0.3"), folder)


@pytest.fixture(scope="module")
def behind_responses(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return answered(tmp_path_factory.getbasetemp() / "steal-responses")


def test_a_response_takes_where_answers_change_and_not_where_they_do_not(behind_responses: Result) -> None:
    for name in RESPONSES:
        took = finding(behind_responses, "SP-T4", name)
        changed = took.measurements["KL to the original answers"].value
        assert changed is not None
        if name == "power?exponent=1":
            assert took.status == "fail"
            assert "victim's own" in took.title
            assert changed < 1e-6
        else:
            assert changed > 1e-3
            assert "Nothing was trained" in " ".join(took.evidence)
            assert "KL beyond that of a retraining" not in took.measurements
            assert took.status == ("pass" if finding(behind_responses, "SP-T3", name).status != "fail" else "fail")


def test_utility_is_that_of_the_served_answers(behind_responses: Result) -> None:
    (table,) = [table for table in behind_responses.tables if table.title == "What a defence costs its users"]
    rows: dict[str, dict[str, Any]] = {
        str(row[0]): dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows
    }
    assert rows["power"]["top-1 flips"].value == rows["identity+label-only"]["top-1 flips"].value == 0
    assert rows["power"]["L1 to the original"].value > 0.05
    assert rows["power?exponent=1"]["L1 to the original"].value < 1e-6
    assert rows["identity+label-only"]["NLL"].value > 10 * (1 - rows["victim"]["test accuracy"].value)
    said = finding(behind_responses, "SP-T3", "round?decimals=1").evidence[-1]
    assert "does not promise to keep top-1" in said
    assert "promises to keep top-1" in finding(behind_responses, "SP-T3", "power").evidence[-1]


def test_a_power_of_the_answers_protects_against_nobody(behind_responses: Result) -> None:
    found = finding(behind_responses, "SP-T2", "power").measurements["protection"]
    assert found.value is None or (found.low or 0) <= 0 <= (found.high or 0)


def test_adversarial_examples_of_the_copies_are_shown_to_what_is_served(behind_responses: Result) -> None:
    (table,) = [table for table in behind_responses.tables if table.title == "Adversarial examples of the copy"]
    served = ["victim", *RESPONSES]
    assert [row[0] for row in table.rows] == [name for name in served for _ in range(3)]
    assert {row[1] for row in table.rows if row[0] == "victim"} == {"KD, fixed α = 0.9", "label only", "reference"}
    fooled = {(row[0], row[1]): row[2].value for row in table.rows}
    lucky = {(row[0], row[1]): row[3].value for row in table.rows}
    assert all(fooled[key] > lucky[key] for key in fooled)
    # what answers alike is fooled alike by the copy of a thief who reads labels alone
    alike = [fooled[name, "label only"] for name in ("victim", "identity+label-only")]
    assert alike[0] == pytest.approx(alike[1], abs=0.02)  # but for an image on the boundary


def test_a_thief_of_labels_alone_gets_the_same_through_a_response_that_keeps_them(behind_responses: Result) -> None:
    rows = {
        name: next(row for row in table.rows if row[0] == "label only")
        for name in ("victim", "power", "identity+label-only")
        for table in behind_responses.tables
        if table.title == f"Thieves of {name}"
    }
    assert rows["victim"][2:5] == rows["power"][2:5] == rows["identity+label-only"][2:5]


def test_only_classifiers_are_left_and_a_response_is_none(behind_responses: Result) -> None:
    given = settings(defence=("ast", "ast+round", "round"), seeds=1)
    planned = plan(given, Runtime.choose())
    assert planned.key(planned.outputs["0/ast+round/model"]) == planned.key(planned.outputs["0/ast/model"])
    assert planned.key(planned.outputs["0/round/model"]) == planned.key(planned.outputs["0/victim/model"])
    kept = models(given, {name: Artefact({"key": planned.key(made)}) for name, made in planned.outputs.items()})
    assert set(kept) == {"victim-seed0", "ast-seed0"}


def test_responses_with_helpers_memory_and_a_wanted_l1(tmp_path: Path) -> None:
    names = ("mad", "adaptive-misinformation?tau=0.9", "modelguard-s", "reverse-sigmoid", "top?k=3")
    changes = {"seeds": 1, "thief": ("label-only",), "thief_epochs": 1, "response_l1": 0.2}
    result = run(settings(defence=names, **changes), tmp_path)
    assert {f.subject for f in result.findings} == {"victim", *names}
    said = {name: " ".join(finding(result, "SP-T3", name).evidence) for name in names}
    assert "Calibrated, seed by seed: beta" in said["reverse-sigmoid"]
    assert "Calibrated" not in said["top?k=3"]
    assert Result.model_validate_json(result.model_dump_json()) == result


def test_what_a_defence_shares_with_the_victim_is_one_stage() -> None:
    alone, with_identity = (plan(settings(defence=d), Runtime.choose()) for d in ((), ("identity",)))

    def keys(planned: Plan) -> set[str]:
        return {planned.key(found) for found in planned.order}

    assert keys(alone) == keys(with_identity)
    fixed_only = plan(settings(thief=("kd?temperature=4&alpha=0.9",)), Runtime.choose())
    assert not keys(fixed_only) - keys(alone)


def test_more_seeds_keep_the_stages_of_fewer() -> None:
    def victims(seeds: int) -> dict[str, str]:
        planned = plan(settings(seeds=seeds), Runtime.choose())
        return {
            found.label: planned.key(found) for found in planned.order if found.label.startswith("train the victim")
        }

    assert victims(2).items() <= victims(3).items()


@pytest.mark.parametrize("reveal", ["probabilities", "label"])
def test_nothing_leaks_the_true_label_through_an_oracle_of_random_labels(reveal: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"victim": "tests.victims:random_labels", "queries": "10/class", "seeds": 3}
    changes |= {"thief_epochs": 20} | ({"thief": ("label-only",)} if reveal == "label" else {})
    result = run(settings(limit=None, thief_model="zoo:cnn?width=8", reveal=reveal, **changes), tmp_path)
    (table,) = [table for table in result.tables if table.title == "Thieves of victim"]
    for row in table.rows:
        gain = row[table.columns.index("net gain")]
        assert gain.low <= 0, row  # type: ignore[union-attr]
        if row[0] in ("label only", "KD unlabelled"):
            accuracy = row[table.columns.index("test accuracy")]
            assert accuracy.value < 0.25, row  # type: ignore[union-attr]
    assert finding(result, "SP-T1", "victim").status != "fail"


def test_without_labels_there_is_no_reference_and_it_is_said(tmp_path: Path) -> None:
    given = settings(labels=False, thief=("kd-unlabelled",), seeds=1)
    planned = plan(given, Runtime.choose())
    assert not [name for name in planned.outputs if "reference" in name]
    result = run(given, tmp_path)
    found = finding(result, "SP-T1", "victim")
    assert "label-only thief" in found.title
    assert "no independent reference" in found.evidence[0]


def test_a_victim_that_was_brought_along_or_wavers_is_said_to(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"thief": ("label-only",), "labels": False, "seeds": 1, "thief_epochs": 1}
    said = run(settings(victim="tests.victims:wavering", **changes), tmp_path).findings[0].evidence
    assert any("brought along" in line for line in said)
    assert any("differently each time" in line for line in said)


def test_thieves_who_choose_their_queries_spend_what_the_others_do(tmp_path: Path) -> None:
    choosing = ("repeat-averaging", "jacobian?rounds=1", "active?rounds=1", "active?choose=k-centre&rounds=1")
    changes: dict[str, Any] = {"victim": "tests.victims:wavering", "seeds": 1, "thief_epochs": 2}
    fixed = [f"{name}{'&' if '?' in name else '?'}temperature=4&alpha=0.9" for name in choosing]
    thieves = ("label-only", *fixed, "knockoff?temperature=1")
    result = run(settings(thief=thieves, query_data="digits", **changes), tmp_path)
    (table,) = [table for table in result.tables if table.title == "Thieves of victim"]
    titles = [row[0] for row in table.rows]
    assert titles[1].startswith("repeat-averaging, 4 times")  # type: ignore[union-attr]
    assert [row[-2:] for row in table.rows] == 6 * [[30, 30 * 320]]
    said = result.findings[0].evidence
    assert any("only repeat-averaging asks about an image again" in line for line in said)


def test_a_thief_who_recovers_asks_what_the_others_ask(tmp_path: Path) -> None:
    thieves = ("kd?temperature=4&alpha=0.9", "recovery?guess=power&samples=400&temperature=4&alpha=0.9")
    given = settings(defence=("power",), thief=thieves, seeds=1, thief_epochs=2)
    planned = plan(given, Runtime.choose())
    assert len({planned.key(found) for found in planned.order if found.job.name.endswith(":ask")}) == 2
    result = run(given, tmp_path)
    for name in ("victim", "power"):
        (table,) = [table for table in result.tables if table.title == f"Thieves of {name}"]
        assert [row[-2:] for row in table.rows] == 2 * [[30, 30 * 320]]
        assert table.rows[1][0] == "recovery from p^0.333, fixed T = 4, α = 0.9"


def test_a_run_with_all_thieves_can_be_planned_and_shares_what_they_share() -> None:
    planned = plan(settings(thief=("all",), query_data="digits"), Runtime.choose())
    few = plan(settings(), Runtime.choose())
    assert {few.key(found) for found in few.order} <= {planned.key(found) for found in planned.order}


def test_a_small_run_keeps_the_parts_of_a_large_one_apart() -> None:
    from stillproof.core.carving import carve, load_data
    from stillproof.core.plan import Context
    from stillproof.core.sources.digits import Digits

    context = Context(Runtime.choose())
    parts = [carve(load_data.run(context, source=Digits(), limit=limit)) for limit in (None, 1000, 60)]

    def pixels(images: Any) -> set[bytes]:
        return {image.numpy().tobytes() for image in images.images}

    for one in parts:
        for other in parts:
            assert not pixels(one.pool) & pixels(other.training)
            assert not pixels(one.test) & pixels(other.training)
            assert not pixels(one.validation) & pixels(other.training)
    assert [len(part) for part in (parts[2].training, parts[2].validation, parts[2].pool)] == [50, 10, 10]


def test_the_reference_and_the_twins_do_not_depend_on_what_they_do_not_use() -> None:
    one, other = settings(victim="zoo:cnn?width=6"), settings(victim="zoo:cnn?width=7")
    label = "reference, seed 0: try smoothing 0.1"
    assert key_of(label, one) == key_of(label, other)


def test_a_conclusion_is_about_those_who_took_part(tmp_path: Path) -> None:
    """Though `all` would name more."""
    given = settings(thief=("kd?temperature=4", "label-only"), seeds=1, thief_epochs=1, epochs=1)
    values = Execution(plan(given, Runtime.choose()), Store(str(tmp_path)), Silent()).run()
    made = conclude(settings(thief=("all", "kd?temperature=4"), seeds=1, thief_epochs=1, epochs=1), values)
    table = next(table for table in made.tables if table.title == "Thieves of victim")
    assert {row[0] for row in table.rows} == {"KD, fixed T = 4", "label only"}


def test_queries_from_inside_are_the_victims_own_training_images(tmp_path: Path) -> None:
    from stillproof.core.carving import carve

    store = Store(str(tmp_path))
    drawn: dict[str, set[bytes]] = {}
    for origin in ("outside", "inside"):
        given = settings(queries_from=origin, thief=("label-only",), seeds=1, epochs=1, thief_epochs=1)
        planned = plan(given, Runtime.choose())
        Execution(planned, store, Silent()).run()
        (asked,) = [found for found in planned.order if found.label.startswith("ask ")]
        images = store.load(planned.key(asked)).tensors["images"]
        drawn[origin] = {image.numpy().tobytes() for image in images}
        (data,) = [found for found in planned.order if found.label == "load the data"]
        training = {image.numpy().tobytes() for image in carve(store.load(planned.key(data))).training.images}
        assert (drawn[origin] <= training) == (origin == "inside")
        assert (drawn[origin] & training == set()) == (origin == "outside")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"queries": "900/class"}, "9000 queries"),
        ({"queries": "many"}, "no number of queries"),
        ({"queries": "1/class"}, "Ask for 2/class to 4/class"),
        ({"defence": ("asst",)}, "Did you mean 'ast'"),
        ({"defence": ("round+ast",)}, "stands second in the defence"),
        ({"defence": ("ast+round?decimal=1",)}, "Did you mean 'decimals'"),
        ({"defence": ("ast+",)}, "has no name"),
        ({"thief": ("kdd",)}, "no thief named 'kdd'"),
        ({"victim": "zoo:cnn?weights=no.pt"}, "no file no.pt"),
        ({"thief_model": "zoo:cnn?weights=no.pt"}, "there is no file"),
        ({"reveal": "all"}, "cannot reveal"),
        ({"transfer": "8/255"}, "no threat"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_runs(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan(settings(**changes), Runtime.choose())


def test_knockoff_needs_enough_of_other_people_s_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", images=images, labels=np.arange(100) % 10)
    given = settings(limit=None, queries="12/class", query_data=str(tmp_path / "few.npz"), thief=("kd", "knockoff"))
    with pytest.raises(InputError, match="asks about up to 96 of other people's images, and --query-data has"):
        plan(given, Runtime.choose())


def test_profiles_fill_only_what_nobody_set() -> None:
    smoke = StealSettings(data="digits", victim="zoo:cnn", profile="smoke", epochs=7).resolved()
    assert (smoke.epochs, smoke.seeds, smoke.thief_epochs, smoke.limit) == (7, 1, 10, 5000)
    assert StealSettings(data="digits", victim="zoo:cnn").resolved().seeds == 3


def test_two_queries_a_class_are_enough_for_every_thief(tmp_path: Path) -> None:
    result = run(settings(queries="2/class", seeds=1, epochs=1, thief_epochs=1, thief=("recovery",)), tmp_path)
    assert result.findings


@pytest.mark.parametrize("victim", ["zoo:cnn?width=4", "tests.victims:wavering"])
def test_two_queries_of_each_of_two_classes_are_enough_as_well(victim: str, tmp_path: Path) -> None:
    fixed = "temperature=1&alpha=0.5"
    choosing = ("active", "jacobian?views=0.9", "recovery?samples=40", "repeat-averaging")
    thieves = ("knockoff?temperature=1", *(f"{name}{'&' if '?' in name else '?'}{fixed}" for name in choosing))
    given = two_classes(tmp_path)
    changes = {**given, "query_data": given["data"], "victim": victim, "thief": thieves, "queries": "2/class"}
    result = run(settings(**changes, seeds=1, epochs=1, thief_epochs=1), tmp_path)
    table = next(table for table in result.tables if table.title == "Thieves of victim")
    assert [row[-2] for row in table.rows] == [4] * len(thieves)


def test_the_table_says_what_each_thief_knows(result: Result) -> None:
    (table,) = [table for table in result.tables if table.title == "Thieves of victim"]
    assert {row[table.columns.index("knows")] for row in table.rows} == {"nothing of a defence"}
    thieves = cast(settings(defence=("power",), thief=("all",))).thieves
    assert thieves["recovery?guess=power"].knows == "which defence, or guesses it: p^0.333"
    assert all(thief.knows for thief in thieves.values())
