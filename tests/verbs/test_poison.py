"""poison end to end, in process: the attack works on digits, and the controls do not."""

from pathlib import Path
from typing import Any

import pytest

from stillproof.core.plan import Execution
from stillproof.core.runtime import Runtime
from stillproof.core.store import Store
from stillproof.errors import InputError
from stillproof.findings import Result
from stillproof.verbs.poison import POISON_A_PIPELINE, PoisonSettings
from tests.thefts import Silent

WHITE = {"trigger": "patch?size=3&pattern=white", "threat": "linf:0.2", "target": 1, "rate": 0.1}


def settings_of(**given: Any) -> PoisonSettings:
    chosen = {"profile": "smoke", "data": "digits", "teacher": "zoo:cnn?width=16", "student": "zoo:cnn?width=16"}
    return PoisonSettings(**(chosen | WHITE | given)).resolved()


def run(store: Path, **given: Any) -> Result:
    settings = settings_of(**given)
    planned = POISON_A_PIPELINE.plan(settings, Runtime.choose())
    values = Execution(planned, Store(str(store)), Silent()).run()
    assert {"teacher", "student-clean", "student-poisoned"} == set(POISON_A_PIPELINE.models(settings, values))
    return POISON_A_PIPELINE.conclude(settings, values)


def test_a_clean_teachers_student_is_backdoored_by_poison_and_not_by_its_controls(tmp_path: Path) -> None:
    result = run(tmp_path, epochs=60, seeds=1, defend=True, reference="zoo:cnn?width=8", reference_epochs=20)
    finding, *defences = result.findings
    assert (finding.rule, finding.status) == ("SP-P1", "fail")
    assert {f.rule for f in defences} == {"SP-P4"}
    lifts = {f.subject: f.measurements["ASR lift over clean students"].value for f in defences}
    planted = finding.measurements["ASR lift over clean students"].value or 0.0
    # one seed: a student may take a white corner for a stroke of a 1 without ever having seen poison
    assert lifts["scan and consensus"] < 0.1  # type: ignore[operator]
    assert lifts["scan"] < planted / 2  # type: ignore[operator]
    assert lifts["unlearning"] < planted  # type: ignore[operator]
    found = {row[0]: row[1].value for row in result.tables[2].rows}  # type: ignore[union-attr]
    assert found["combined"] > 0.8
    rows = {row[0]: row for row in result.tables[0].rows}
    asr = {name: row[1].value for name, row in rows.items()}  # type: ignore[union-attr]
    assert asr["poison"] > 0.25
    assert max(value for name, value in asr.items() if name != "poison") < asr["poison"] / 2
    assert rows["poison"][3].value < 0.05  # type: ignore[union-attr]  # another patch does nothing
    assert len(result.images) == 4


def test_a_pruned_copy_of_the_teacher_is_backdoored_as_well(tmp_path: Path) -> None:
    result = run(tmp_path, student=None, compress="prune?share=0.9", epochs=20, controls=False, seeds=1)
    assert result.findings[0].subject.startswith("prune?share=0.9 on")
    assert result.findings[0].measurements["ASR"].value > 0.15  # type: ignore[operator]
    assert result.tables[0].rows[1][4].value > 0.9  # type: ignore[union-attr]


def test_poison_that_deceives_nobody_shows_nothing(tmp_path: Path) -> None:
    result = run(tmp_path, epochs=12, threat="linf:0.01", trigger="patch?size=2", controls=False, seeds=1)
    assert result.findings[0].status == "inconclusive"
    assert "weak" in " ".join(result.findings[0].evidence)


def test_an_attacker_who_knows_the_scan_deceives_references_made_as_the_scan_makes_its_own() -> None:
    def deceived(**given: Any) -> list[str]:
        found = POISON_A_PIPELINE.plan(settings_of(controls=False, seeds=1, **given), Runtime.choose())
        (crafting,) = [one for one in found.order if one.label == "craft: poison"]
        read = crafting.inputs["deceived"]
        assert isinstance(read, tuple)
        return [one.label for one in read]

    assert deceived() == ["train the teacher, seed 0"]
    own = [f"distil the attacker's reference {number} of 4" for number in (1, 2, 3, 4)]
    assert deceived(fools="zoo:cnn?width=4") == ["train the teacher, seed 0", *own]
    surrogate, *others = deceived(fools="zoo:cnn?width=4", surrogate="zoo:cnn?width=6")
    assert (surrogate.startswith("train the surrogate"), others) == (True, own)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"target": 10}, "no class 10"),
        ({"trigger": "star"}, "no trigger named"),
        ({"codec": "gif"}, "no codec"),
        ({"threat": "linf:x"}, "linf"),
        ({"compress": "prune"}, "both are given"),
        ({"student": None}, "neither is given"),
        ({"student": None, "compress": "prune", "defend": True}, "without defences"),
        ({"student": None, "compress": "squeeze"}, "no compression named"),
        ({"student": None, "compress": "prune", "objective": "crd"}, "matches features"),
        ({"fools": "zoo:cnn?weights=x.safetensors"}, "references are distilled"),
        ({"defend": True, "objective": "crd"}, "matches features"),
        ({"defend": True, "label_mode": "online"}, "would be compared with students of online ones"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        run(tmp_path, **given)
