"""The rule by which an audit calls gradients masked, on evidence that is made for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stillproof.evasion.evidence import Evidence
from stillproof.evasion.verdict import decide, findings


def evidence(
    n: int, hidden: int, *, by: str = "white box", fallen: int = 60, dead: float = 0.0, sure: float = 4.0
) -> Evidence:
    """Of n images, all right: cross-entropy takes `fallen`, and a later attack of a kind takes `hidden` more.

    dead: share of the images whose cross-entropy has no gradient; sure: the margin of every image.
    """
    deployed, other = np.zeros(n, np.int8), np.full(n, -1, np.int8)
    deployed[:fallen] = 1
    other[fallen:] = 0
    other[fallen : fallen + hidden] = 1
    steps = [("PGD-20, cross-entropy", "deployed"), ("another", by)]
    trail = [{"name": name, "kind": kind, "left_out": 0, "asked": n, "fell": 0} for name, kind in steps]
    fell = deployed == 1
    close: dict[str, Any] = dict.fromkeys(("sweep.1", "sweep.10", "apgd", "apgd.double", "trace.last"), fell)
    close |= {"unbounded.cross-entropy": np.arange(n) >= dead * n, "wider": np.ones(n, bool), "trace.ever": fell}
    close |= {"trace.range": np.zeros(n), "stability": np.zeros(n), "nearest": np.ones(n), "slope": np.ones(n)}
    return Evidence(
        labels=np.zeros(n, int),
        logits=np.array([[sure, 0.0, 0.0]], np.float32) + np.linspace(0, 0.1, n, dtype=np.float32)[:, None],
        ce=(np.arange(n) >= dead * n).astype(np.float32),
        margin=np.ones(n, np.float32),
        repeats=np.zeros(n, np.float32),
        trail=trail,
        outcomes=np.stack([deployed, other]),
        standing=~(fell | (other == 1)),
        distance=np.ones(n, np.float32),
        watched=np.ones(n, bool),
        close_rows=np.arange(n),
        close=close,
        solved=np.ones(32, bool),
        lucky=np.zeros(32, bool),
        outputs="logits",
        is_black_box=False,
        ended_by_budget=False,
    )


@pytest.mark.parametrize(
    ("given", "masked", "said"),
    [
        ({"hidden": 6}, "no", "within 3.0 points"),
        ({"hidden": 11}, "no", "5.5 points more than cross-entropy does, not surely 5"),
        ({"hidden": 17}, "inconclusive", "8.5 points more than cross-entropy does, and no sign says why"),
        ({"n": 60, "fallen": 20, "hidden": 8}, "inconclusive", "no sign says why"),
        ({"hidden": 9, "by": "gradient-free"}, "inconclusive", "which may be 5 or more: watch more images"),
        ({"n": 160, "fallen": 100, "hidden": 4, "by": "gradient-free"}, "inconclusive", "which may be 5 or more"),
        ({"n": 160, "fallen": 155, "hidden": 2, "by": "gradient-free"}, "no", "within 1.2 points"),  # two by luck
        ({"hidden": 30, "by": "gradient-free"}, "yes", "15.0 points of robust accuracy are not there"),
        ({"hidden": 0, "dead": 0.3}, "inconclusive", "audit at a larger epsilon"),
        ({"hidden": 0, "dead": 0.02}, "no", "within 0.0 points"),
        ({"hidden": 40, "dead": 0.3}, "yes", "cross-entropy has no gradient, the margin has"),
        ({"n": 30, "fallen": 10, "hidden": 3}, "inconclusive", "10.0 points more than cross-entropy does, of only 30"),
        ({"n": 40, "fallen": 10, "hidden": 0}, "inconclusive", "of only 40 right images"),
        ({"hidden": 30, "sure": 1.0}, "no", "only because the logits are nearly flat"),
        ({"hidden": 30, "sure": 1.0, "by": "gradient-free"}, "inconclusive", "no sign says why"),
        ({"hidden": 0, "dead": 0.1, "by": "gradient-free"}, "inconclusive", "larger epsilon"),
    ],
)
def test_the_rule(given: dict[str, Any], masked: str, said: str) -> None:
    verdict = decide(evidence(**({"n": 200} | given)))
    assert (verdict.masked, said in verdict.why) == (masked, True), verdict.why


def test_a_loss_of_the_users_is_no_cause_and_a_module_that_is_climbed_instead_is_one() -> None:
    by_loss, by_detour = (decide(evidence(200, 40, by=kind)) for kind in ("adaptive", "detour"))
    assert (by_loss.masked, by_detour.masked) == ("inconclusive", "yes")


def with_twice_the_steps(given: Evidence, more: int) -> Evidence:
    """In twice the steps cross-entropy takes so many more of those that it left."""
    twice = given.close["apgd"].copy()
    twice[60 : 60 + more] = True
    return replace(given, close={**given.close, "apgd.double": twice})


@pytest.mark.parametrize(("more", "masked"), [(0, "yes"), (10, "yes"), (25, "inconclusive"), (40, "inconclusive")])
def test_cross_entropy_that_did_not_converge_shows_no_masking(more: int, masked: str) -> None:
    verdict = decide(with_twice_the_steps(evidence(200, 30, by="gradient-free"), more))
    assert verdict.masked == masked, verdict.why


def test_without_a_gradient_convergence_is_no_question() -> None:
    assert decide(with_twice_the_steps(evidence(200, 40, dead=0.3), 40)).masked == "yes"


@pytest.mark.parametrize(
    ("solved", "lucky", "masked", "said"),
    [
        (32, 0, "no", "within"),
        (32, 16, "no", "within"),
        (32, 29, "inconclusive", "only 3 of the 32 problems"),
        (32, 32, "inconclusive", "only 0 of the 32 problems"),
        (31, 0, "no", "within"),
        (31, 20, "no", "within"),  # 11 of 12: one slip
        (31, 26, "inconclusive", "5 of 6 problems that are hard"),
        (30, 0, "inconclusive", "30 of 32 problems that are hard"),
        (20, 0, "inconclusive", "20 of 32 problems that are hard"),
        (20, 20, "inconclusive", "0 of 12 problems that are hard"),
    ],
)
def test_an_attack_is_tested_by_what_luck_does_not_solve(solved: int, lucky: int, masked: str, said: str) -> None:
    numbers = np.arange(32)
    given = replace(evidence(200, 6), solved=numbers < solved, lucky=numbers < lucky)
    verdict = decide(given)
    assert (verdict.masked, said in verdict.why) == (masked, True), verdict.why


def test_that_attacks_disagree_about_what_answers_at_random_is_no_masking() -> None:
    given = evidence(200, 40, by="gradient-free")
    verdict = decide(replace(given, repeats=np.full(200, 0.1, np.float32)))
    assert (verdict.masked, "it answers at random" in verdict.why) == ("inconclusive", True)
    assert decide(replace(evidence(200, 40, dead=0.3), repeats=np.full(200, 0.1, np.float32))).masked == "yes"


def test_a_classifier_that_answers_the_same_to_all_is_no_matter_of_gradients() -> None:
    given = evidence(200, 0)
    verdict = decide(replace(given, logits=np.tile(given.logits[:1], (200, 1))))
    assert (verdict.masked, verdict.why) == ("inconclusive", "it answers the same whatever the image is")


def test_an_unbounded_attack_that_fails_on_more_than_a_few_images_leaves_it_open() -> None:
    given = evidence(200, 0)
    missed = given.close | {"unbounded.cross-entropy": np.arange(200) >= 10}  # type: ignore[operator]
    verdict = decide(replace(given, close=missed))
    assert (verdict.masked, "even where all images are allowed" in verdict.why) == ("inconclusive", True)


def test_a_standard_attack_tells_the_truth_only_where_gradients_are_known_to() -> None:
    for n, status in ((200, "pass"), (40, "inconclusive")):
        given = evidence(n, 0)
        assert findings("it", decide(given), given, 0.0)[2].status == status


def test_a_classifier_that_answers_nan_near_its_images_is_not_cleared() -> None:
    given = evidence(200, 0)
    verdict = decide(replace(given, close=given.close | {"stability": np.full(200, np.nan)}))  # type: ignore[operator]
    assert (verdict.masked, "NaN" in verdict.why) == ("inconclusive", True)


def test_a_backward_pass_of_another_function_is_never_not_masked() -> None:
    given = evidence(hidden=2, n=200, fallen=100)
    assert decide(given).masked == "no"
    kept = np.full(200, 0.3)
    found = decide(replace(given, close=given.close | {"slope": kept}))  # type: ignore[operator]
    assert found.masked == "inconclusive"
    (sign,) = [sign for sign in found.signs if sign.name == "the gradient is not the slope"]
    assert sign.is_present
    assert sign.measured.value == 0.3
