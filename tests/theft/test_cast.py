"""Who takes part in a theft: defences, thieves, and what each of them knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillproof.core.runtime import Runtime
from stillproof.errors import InputError
from stillproof.theft.cast import FIXED_KD
from stillproof.verbs.steal import cast, plan
from tests.thefts import settings, two_classes


def test_who_takes_no_labels_can_choose_queries_without() -> None:
    for name in ("repeat-averaging", "jacobian", "active", "recovery"):
        assert f"{name}?alpha=1" in cast(settings(labels=False, thief=(f"{name}?alpha=1",))).thieves
        with pytest.raises(InputError, match="no-labels"):
            cast(settings(labels=False, thief=(name,)))


def test_knockoff_needs_other_people_s_images() -> None:
    assert "knockoff" not in cast(settings(thief=("all",))).thieves
    assert "knockoff" in cast(settings(thief=("all",), query_data="digits")).thieves
    with pytest.raises(InputError, match="--query-data names none"):
        cast(settings(thief=("knockoff",)))


def test_thieves_who_cannot_work_are_left_out_of_all_and_refused_by_name() -> None:
    everyone = ("all",)
    assert set(cast(settings(reveal="label", thief=everyone)).thieves) == {"label-only"}
    assert set(cast(settings(labels=False, thief=everyone)).thieves) == {"kd-unlabelled", "label-only"}
    assert {"kd", "dkd", "markov-kd", FIXED_KD} <= set(cast(settings(thief=everyone)).thieves)
    with pytest.raises(InputError, match="reveals labels alone"):
        cast(settings(reveal="label", thief=("kd",)))
    with pytest.raises(InputError, match="no-labels"):
        cast(settings(labels=False, thief=("kd,label-only",)))


def test_who_cannot_work_with_two_classes_or_a_flat_student_is_known_before_anything_runs(tmp_path: Path) -> None:
    two = two_classes(tmp_path)
    flat = {"thief_model": "tests.victims:linear"}

    def thieves(**changes: Any) -> set[str]:
        planned = plan(settings(**{"thief": ("all",), "seeds": 1} | changes), Runtime.choose())
        return {name.removeprefix("0/victim/") for name in planned.outputs}

    assert thieves() - thieves(**two) == {"logit-std"}
    assert thieves() - thieves(**flat) == {"skeptical"}
    for changes, who, why in ((two, "logit-std", "two classes"), (flat, "skeptical", "has none")):
        with pytest.raises(InputError, match=why):
            plan(settings(thief=("kd", who), **changes), Runtime.choose())


def test_all_thieves_know_the_response_that_they_are_up_against() -> None:
    given = settings(defence=("power?exponent=0.2", "ast", "ast+round?decimals=1", "mad"), thief=("all",))
    guesses = [name for name in cast(given).thieves if name.startswith("recovery")]
    assert guesses == ["recovery", "recovery?guess=power%3Fexponent%3D0.2", "recovery?guess=round%3Fdecimals%3D1"]
    assert "recovery" in cast(settings(defence=("reverse-sigmoid",), thief=("all",))).thieves


def test_it_is_told_of_a_defence_whether_a_thief_knows_it() -> None:
    unknown = ("mad", "adaptive-misinformation", "modelguard-s", "round+modelguard-s")
    who = cast(settings(defence=("power", "reverse-sigmoid", "ast+round", "ast", *unknown), thief=("all",)))
    assert [name for name in who.defences if not who.knows(name)] == list(unknown)
    assert not cast(settings(defence=("power",), thief=("kd", "recovery"))).knows("power")
    as_written = settings(defence=("reverse-sigmoid",), thief=("kd", "recovery"), response_l1=0.2)
    assert not cast(as_written).knows("reverse-sigmoid")  # nobody knows the strength that it was tuned to


def test_all_thieves_are_both_who_learn_actively() -> None:
    assert {"active", "active?choose=k-centre"} <= set(cast(settings(thief=("all",))).thieves)


def test_who_knows_a_response_knows_the_strength_that_it_was_tuned_to() -> None:
    """One who is named by hand knows what is written."""
    by_hand = "recovery?guess=power"
    given = settings(
        defence=("power", "ast+power", "reverse-sigmoid"), thief=("all", by_hand), response_l1=0.2, seeds=1
    )
    informed = "recovery?guess=power&calibrated=true"
    thieves = cast(given).thieves
    assert {by_hand, informed, "recovery?guess=reverse-sigmoid&calibrated=true"} <= set(thieves)
    assert thieves[informed].knows == "which defence, or guesses it: p^0.333, and its strength"
    assert "calibrated" in thieves[informed].title
    planned = plan(given, Runtime.choose())

    def strength(served: str, thief: str) -> object:
        return planned.outputs[f"0/{served}/{thief}"].inputs["transfer"].inputs.get("calibration")  # type: ignore[union-attr]

    for served in ("power", "ast+power"):
        assert strength(served, informed) is planned.outputs[f"0/{served}/calibration"]
        assert strength(served, by_hand) is None
    assert strength("victim", informed) is strength("reverse-sigmoid", informed) is None
    assert informed not in cast(settings(defence=("power",), thief=("all",))).thieves


def test_active_learning_of_labels_is_no_theft_by_itself() -> None:
    who = cast(settings(thief=("kd", "active", "active?alpha=1", "jacobian", "repeat-averaging")))
    assert who.judged(labelled=True) == set(who.thieves) - {"active"}
    assert who.judged(labelled=False) == set(who.thieves)
    assert "labels" in who.thieves["active"].knows
    with pytest.raises(InputError, match="by active alone no theft can be judged"):
        cast(settings(thief=("active",)))
