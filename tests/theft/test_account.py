"""What is concluded from who took part: planted thefts in, findings and tables out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stillproof.core.measurement import Measurement
from stillproof.findings import Finding
from stillproof.theft.account import Account, Response, Student
from stillproof.theft.curves import curves, over_budgets
from stillproof.theft.tables import tables

LABELS = np.arange(400) % 4


def answers(share: float, seed: int) -> Any:
    """Logits, (400, 4), that are right about this share."""
    wrong = np.random.default_rng(seed).random(400) >= share
    return np.eye(4)[(LABELS + wrong) % 4]


def student(title: str, right: float, held: float, **more: Any) -> Student:
    """Of three seeds and one candidate."""
    given: dict[str, Any] = {
        "knows": "nothing",
        "candidates": ("one",),
        "temperatures": (),
        "chosen": [0, 0, 0],
        "scores": np.full((3, 1), held),
        "losses": np.ones((3, 1)),
        "logits": [answers(right, seed) for seed in range(3)],
        "queries": 40,
        "bits": 1.0,
    }
    return Student(title=title, **{**given, **more})


def account(*thieves: Student, **more: Any) -> Account:
    """Of these thieves, who ask a victim, and the same behind one defence."""
    served = [answers(0.95, 9)] * 3
    given: dict[str, Any] = {
        "labels": LABELS,
        "served": {"victim": served, "d": served},
        "responses": {},
        "signals": {"victim": served, "d": served},
        "retrained": None,
        "thefts": {name: {thief.title: thief for thief in thieves} for name in ("victim", "d")},
        "reference": student("reference", 0.5, 0.5),
        "floor": None,
        "fixed": None,
        "tuned": None,
        "pretrained": False,
        "brought": False,
        "deterministic": True,
    }
    return Account(**{**given, **more})


def found(of: Account, rule: str, subject: str) -> Finding:
    findings = of.findings(promised=0.5, utility_budget=0.02)
    (one,) = [finding for finding in findings if (finding.rule, finding.subject) == (rule, subject)]
    return one


def test_who_chose_which_images_are_labelled_decides_nothing_and_is_reported() -> None:
    chooses = student("active", 0.8, 0.99, judged=False)
    made = account(student("KD", 0.5, 0.6), chooses)
    assert made.theft("victim").thief == "KD"
    finding = found(made, "SP-T1", "victim")
    assert finding.status != "fail"
    assert any("No finding is decided by active" in line for line in finding.evidence)
    assert "Best thief without the defence: KD; with it: KD." in found(made, "SP-T2", "d").evidence
    table = next(table for table in tables(made) if table.title == "Thieves of victim")
    assert [row[0] for row in table.rows] == ["KD", "active"]
    assert "No finding is decided by active" in table.note
    assert not any(table.note for table in tables(account(student("KD", 0.5, 0.6))) if "Thieves" in table.title)


def test_a_defence_that_no_thief_knew_is_said_to_be_one() -> None:
    said = "No thief who knows this defence took part."
    for known in (True, False):
        response = Response("MAD", keeps_argmax=True, alone=True, known=known)
        evidence = found(account(student("KD", 0.8, 0.7), responses={"d": response}), "SP-T2", "d").evidence
        assert (said in evidence) != known
    assert said not in found(account(student("KD", 0.8, 0.7)), "SP-T2", "d").evidence


def lost(title: str, **more: Any) -> Student:
    """A thief whose training diverged in one seed, and who did best by its held-out queries."""
    return student(title, 0.9, 0.99, chosen=[0, None, 0], diverged=("seed 1: the loss became nan.",), **more)


def test_a_thief_whose_training_diverged_is_never_the_best_and_is_said_to_have() -> None:
    made = account(student("KD", 0.8, 0.7), lost("SCM"))
    assert made.theft("victim").thief == "KD"
    finding = found(made, "SP-T1", "victim")
    assert finding.status == "fail"
    assert "The training of SCM diverged: seed 1: the loss became nan." in finding.evidence
    table = next(table for table in tables(made) if table.title == "Thieves of victim")
    assert table.rows[1][1] == "one; diverged; one"
    assert all(cell.value is None for cell in table.rows[1][2:8])  # type: ignore[union-attr]
    (bars, *_) = curves(made)
    assert all(series.y[0] is not None is series.y[1] for series in bars.series)


def test_what_a_defence_takes_from_each_thief_is_counted_seed_by_seed() -> None:
    before, after = student("KD", 0.8, 0.7), student("KD", 0.7, 0.7)
    made = account(before, thefts={"victim": {"KD": before, "gone": before}, "d": {"KD": after, "gone": lost("gone")}})
    table = next(table for table in tables(made) if table.title == "Thieves of d")
    (cell, gone) = (row[table.columns.index("lost to the defence")] for row in table.rows)
    truth = np.mean([(a.argmax(1) == LABELS).mean() for a in before.logits]) - np.mean(
        [(a.argmax(1) == LABELS).mean() for a in after.logits]
    )
    assert isinstance(cell, Measurement)
    assert isinstance(gone, Measurement)
    assert cell.value == pytest.approx(truth)
    assert cell.low is not None
    assert cell.high is not None
    assert 0.05 < cell.low < truth < cell.high < 0.15
    assert gone.value is None
    assert "lost to the defence" not in next(t for t in tables(made) if t.title == "Thieves of victim").columns


def test_where_nobody_has_a_copy_nothing_is_concluded() -> None:
    for made in (
        account(lost("KD"), lost("SCM"), student("active", 0.9, 0.9, judged=False)),
        account(student("KD", 0.8, 0.7), reference=lost("reference")),
        account(student("KD", 0.8, 0.7), lost("label only"), reference=None, floor="label only"),
    ):
        for rule, subject in (("SP-T1", "victim"), ("SP-T2", "d")):
            finding = found(made, rule, subject)
            assert finding.status == "inconclusive"
            assert any("diverged" in line for line in finding.evidence)
        assert tables(made)
        assert over_budgets([made]).series
        assert "unmeasured" in made.summary()
