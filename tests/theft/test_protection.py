"""From numbers to findings: planted truths are found, their absence is not claimed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stillproof.findings import Finding
from stillproof.theft import protection
from stillproof.theft.protection import Theft

IMAGES, SEEDS = 4000, 4


def right(share: float, seed: int, like: Any = None) -> Any:
    """Right answers of this share, (seeds, images), most of them on the same images each time."""
    generator = np.random.default_rng(seed)
    difficulty = np.random.default_rng(0).random(IMAGES) if like is None else like
    jitter = generator.normal(0, 0.003, (SEEDS, 1)) + generator.normal(0, 0.05, (SEEDS, IMAGES))
    return difficulty + jitter < share


def theft(share: float, seed: int) -> Theft:
    return Theft("KD", right(share, seed), right(0.50, 1), "independent reference")


def test_a_planted_gain_is_found_and_none_is_not() -> None:
    found = protection.gain_finding("victim", theft(0.58, 2), ["floor"])
    assert (found.rule, found.status) == ("SP-T1", "fail")
    assert found.measurements["net gain"].value == pytest.approx(0.08, abs=0.01)
    assert protection.gain_finding("victim", theft(0.50, 3), []).status == "pass"
    assert protection.gain_finding("victim", theft(0.46, 3), []).status == "pass"
    assert protection.gain_finding("victim", theft(0.46, 3), [], [theft(0.58, 2)]).status == "inconclusive"
    assert theft(0.46, 3).gain.value == pytest.approx(-0.04, abs=0.01)  # never clipped


def t2(defended: float, promised: float, took: Any = "pass") -> Finding:
    return protection.protection_finding("d", theft(0.60, 2), theft(defended, 3), promised, took)


def test_protection_is_judged_by_its_whole_interval() -> None:
    found = t2(0.52, 0.5)
    assert found.status == "pass"
    assert found.measurements["protection"].value == pytest.approx(0.8, abs=0.08)
    assert t2(0.59, 0.5).status == "fail"
    assert t2(0.55, 0.5).status == "inconclusive"
    assert t2(0.59, 0.0).status in ("pass", "inconclusive")


def test_one_seed_concludes_nothing() -> None:
    def one(found: Theft) -> Theft:
        return Theft(found.thief, found.right[:1], found.baseline_right[:1], found.baseline)

    found = protection.gain_finding("victim", one(theft(0.58, 2)), [])
    assert found.status == "inconclusive"
    assert protection.ONE_SEED in found.evidence
    kept = protection.protection_finding("d", one(theft(0.60, 2)), one(theft(0.52, 3)), 0.5, "pass")
    assert kept.status == "inconclusive"
    lost = protection.protection_finding("d", one(theft(0.60, 2)), one(theft(0.60, 3)), 0.5, "pass")
    assert lost.status == "inconclusive"
    assert protection.ONE_SEED in lost.evidence


def test_a_thief_who_is_the_baseline_has_no_gain_to_speak_of() -> None:
    copied = right(0.9, 2)
    found = protection.gain_finding("victim", Theft("label only", copied, copied, "label-only thief", True), [])
    assert (found.status, found.measurements["net gain"].value) == ("inconclusive", None)
    assert found.measurements["test accuracy of the copy"].value == pytest.approx(0.9, abs=0.02)


def test_a_best_thief_who_is_the_baseline_is_full_protection_only_if_nobody_else_gains() -> None:
    """Its gain is 0 without any doubt, so that the interval says nothing."""
    floor = right(0.5, 1)
    best = Theft("label only", floor, floor, "label-only thief", is_baseline=True)

    def judged(*others: Theft) -> Finding:
        return protection.protection_finding("d", theft(0.6, 2), best, 0.5, "pass", others=[best, *others])

    assert judged(theft(0.46, 3)).status == "pass"
    open_ = judged(theft(0.53, 3))
    assert (open_.status, open_.measurements["protection"].value) == ("inconclusive", 1.0)
    assert any(line.endswith("that no other thief gains 2 points is not shown.") for line in open_.evidence)


def test_no_protection_is_claimed_where_a_thief_who_was_not_the_best_surely_keeps_more() -> None:
    def judged(*others: Theft) -> Finding:
        return protection.protection_finding("d", theft(0.60, 2), theft(0.52, 3), 0.5, "pass", others=others)

    assert judged(theft(0.52, 3), theft(0.54, 4)).status == "pass"
    found = judged(theft(0.52, 3), replace(theft(0.59, 5), thief="fixed"))
    assert found.status == "inconclusive"
    assert any(line.startswith("fixed was not the best by held-out queries") for line in found.evidence)
    assert t2(0.59, 0.5).status == "fail"


def test_no_protection_is_claimed_for_a_defence_that_did_not_take() -> None:
    found = t2(0.52, 0.5, took="fail")
    assert found.status == "inconclusive"
    assert "did not take" in found.evidence[0]


def test_there_is_no_protection_from_a_gain_inside_the_noise() -> None:
    measured = protection.protection(theft(0.501, 2), theft(0.45, 3))
    assert measured.value is None
    assert "inside the noise" in measured.method


def test_an_identical_theft_is_protected_by_exactly_nothing() -> None:
    measured = protection.protection(theft(0.6, 2), theft(0.6, 2))
    assert (measured.value, measured.low, measured.high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_the_best_thief_is_chosen_by_its_held_out_scores() -> None:
    none = np.zeros((2, 1))
    assert protection.best({"a": (np.array([[0.5], [0.9]]), none), "b": (np.array([[0.8], [0.8]]), none)}) == "b"
    # a candidate that was lucky in one seed each is no better for there being many
    lucky = np.array([[0.9, 0.5, 0.5], [0.5, 0.9, 0.5]])
    assert protection.best({"a": (lucky, np.zeros((2, 3))), "b": (np.array([[0.8], [0.8]]), none)}) == "b"
    equal = np.array([[0.8], [0.8]])
    assert protection.best({"a": (equal, none + 2), "b": (equal, none + 1)}) == "b"


def test_utility_passes_fails_or_stays_open() -> None:
    def status(share: float) -> str:
        return protection.utility_finding("d", right(0.90, 1), right(share, 2), budget=0.02).status

    assert (status(0.90), status(0.93), status(0.80)) == ("pass", "pass", "fail")
    assert status(0.88) == "inconclusive"


def logits(seed: int, change: float = 0.0, n: int = 300) -> list[Any]:
    """Four seeds' answers; `change` moves them from a common truth."""
    truth = np.random.default_rng(0).normal(0, 4, (n, 5))
    return [truth + change * np.random.default_rng(seed * 10 + i).normal(0, 1, (n, 5)) for i in range(SEEDS)]


def t4(defended: list[Any], utility: Any = "pass") -> Finding:
    return protection.took_finding("d", victim=logits(1, 1), defended=defended, retrained=logits(2, 1), utility=utility)


def test_identity_did_not_take() -> None:
    found = t4(logits(1, 1))
    assert (found.rule, found.status) == ("SP-T4", "fail")
    assert "did not take" in found.title
    assert found.measurements["KL to the original answers"].value == 0
    assert found.measurements["top-1 agreement"].value == 1


def test_what_a_response_does_to_a_victim_that_answers_at_random_is_not_known() -> None:
    def status(*, deterministic: bool) -> str:
        given: dict[str, Any] = {"victim": logits(1, 1), "defended": logits(2, 1), "retrained": None}
        return protection.took_finding("d", **given, utility="pass", deterministic=deterministic).status

    assert (status(deterministic=True), status(deterministic=False)) == ("pass", "inconclusive")


def test_seeds_are_no_further_images() -> None:
    """Where seeds differ, three of them are three, however many answers each has."""
    victim = logits(1, 1)
    defended = [each if i else each.max() - each for i, each in enumerate(victim)]  # one seed in four agrees nowhere
    agreed = t4(defended).measurements["top-1 agreement"]
    assert agreed.value == pytest.approx(0.75)
    assert agreed.high is not None
    assert agreed.low is not None
    assert agreed.high - agreed.low > 0.5


def test_what_changes_answers_no_more_than_a_retraining_did_not_take() -> None:
    assert t4(logits(3, 1)).status != "pass"
    assert t4(logits(3, 0.2)).status == "fail"
    assert t4(logits(3, 5)).status == "pass"


def test_one_seed_is_compared_with_where_another_retraining_would_fall() -> None:
    truth = np.random.default_rng(0).normal(0, 4, (300, 5))

    def near(seed: int, change: float) -> Any:
        return truth + change * np.random.default_rng(seed).normal(0, 1, (300, 5))

    def status(change: float, how_many: int) -> str:
        again = [near(100 + i, 1 + 0.1 * i) for i in range(how_many)]
        found = protection.took_finding(
            "d", victim=[near(1, 1)], defended=[near(2, change)], retrained=again, utility="pass"
        )
        return found.status

    assert (status(1.1, 3), status(6, 3), status(6, 1)) == ("inconclusive", "pass", "inconclusive")
    assert status(0.1, 4) != "pass"


def test_a_broken_classifier_has_not_been_hardened() -> None:
    found = t4(logits(3, 5), utility="fail")
    assert found.status == "fail"
    assert "broke" in found.title
