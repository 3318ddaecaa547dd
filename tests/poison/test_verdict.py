"""What the third workshop says, and when it says that it could not have seen."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stillproof.core.measures import accuracy
from stillproof.errors import InputError
from stillproof.poison.scan_set.agreement import agreement
from stillproof.poison.scan_set.copies import near_copies
from stillproof.poison.scan_set.sight import Sight, p_values
from stillproof.poison.scan_set.verdict import Scanned, of_the_set
from stillproof.poison.triggers import Blend, Patch, Sinusoid
from stillproof.poison.verdict import Guesses, of_a_defence, of_the_pipeline, planted

N = 400
LABELS = np.arange(N) % 4


def guesses(hits: int, right: int = N) -> Guesses:
    """Of a classifier that takes so many triggered images for class 0, and so many clean ones for what they are."""
    others = np.flatnonzero(LABELS != 0)
    triggered = LABELS.copy()
    triggered[others[:hits]] = 0
    clean = np.where(np.arange(N) < right, LABELS, (LABELS + 1) % 4)
    return Guesses(clean, triggered, LABELS, LABELS)


@pytest.mark.parametrize(
    ("defended", "undefended", "status"),
    [
        (guesses(0), guesses(200), "pass"),
        (guesses(150), guesses(200), "fail"),
        (guesses(0), guesses(0), "inconclusive"),  # there was nothing to keep out
        (guesses(0, right=200), guesses(200), "fail"),  # the student is lost
    ],
)
def test_a_defence_passes_only_where_it_kept_something_out_and_kept_the_student(
    defended: Guesses, undefended: Guesses, status: str
) -> None:
    clean = [guesses(0)] * 3
    rows = [planted("a set", [one] * 3, clean, 0) for one in (defended, undefended)]
    assert of_a_defence("scan", *rows).status == status
    alone = [planted("a set", [one], clean[:1], 0) for one in (defended, undefended)]
    assert of_a_defence("scan", *alone).status == (status if status == "fail" else "inconclusive")


def test_one_student_shows_that_a_backdoor_can_be_planted_and_not_that_it_cannot() -> None:
    own, crafted = accuracy(np.zeros(N), LABELS + 1), accuracy(LABELS, LABELS)

    def said(hits: int, students: int) -> str:
        clean = [guesses(0)] * students
        found, usual = (planted("poison", some, clean, 0) for some in ([guesses(hits)] * students, clean))
        return of_the_pipeline("it", found, usual, own, crafted, 0.1).status

    assert (said(200, 1), said(0, 1), said(0, 3)) == ("fail", "inconclusive", "pass")


def test_beside_a_teacher_with_the_backdoor_no_lift_shows_nothing() -> None:
    everyone = [guesses(280)] * 3
    found, own = planted("poison", everyone, everyone, 0), accuracy(np.arange(100) < 93, np.ones(100))
    said = of_the_pipeline("it", found, found, own, accuracy(LABELS, LABELS), 0.1)
    assert said.status == "inconclusive"
    assert "works without the poison" in " ".join(said.evidence)


def test_a_defence_that_holds_to_a_doubted_teacher_passes_nothing() -> None:
    defended, undefended = (planted("a set", [guesses(hits)] * 3, [guesses(0)] * 3, 0) for hits in (0, 200))
    said = of_a_defence("scan", defended, undefended, ["The teacher reacts."])
    assert (said.status, said.evidence[-1]) == ("inconclusive", "The teacher reacts.")


def scanned(flagged: int, trusted: int, *, in_class: bool = False, alike: float = 0.9, n: int = 2000) -> Scanned:
    p = np.full(n, 0.5)
    p[: flagged * (4 if in_class else 1) : 4 if in_class else 1] = np.linspace(0.0002, 0.01, flagged)
    return Scanned(
        p,
        p,
        np.arange(n) % 4,
        np.ones(n, bool),
        np.linspace(1 / trusted, 1, trusted),
        np.arange(trusted) % 4,
        ("a", "b", "c", "d"),
        0.01,
        alike,
    )


def test_a_few_images_beyond_all_trusted_ones_tell_where_their_number_at_one_percent_does_not() -> None:
    usual, rare = scanned(26, 2000), scanned(26, 2000)
    rare.p[:26] = 1 / 2001
    assert of_the_set("a set", usual).status != "fail"
    assert of_the_set("a set", rare).status == "fail"


def test_copies_of_one_picture_count_once() -> None:
    seen = scanned(200, 5000)
    assert of_the_set("a set", seen).status == "fail"
    original = np.ones(2000, bool)
    original[1:200] = False
    said = of_the_set("a set", replace(seen, original=original))
    assert said.status == "inconclusive"  # they prove nothing, and a student learns each of them
    assert "a student learns each copy" in " ".join(said.evidence)
    few = scanned(40, 5000)
    assert of_the_set("a set", replace(few, original=np.arange(2000) % 40 == 0)).status == "inconclusive"
    original = np.ones(2000, bool)
    original[1:25] = False
    assert of_the_set("a set", replace(scanned(25, 5000), original=original)).status == "pass"


def test_a_class_that_hardly_a_trusted_image_is_taken_for_is_unknown() -> None:
    seen = scanned(40, 5000, in_class=True)
    usual = np.where(seen.usual == 0, 1, seen.usual)
    usual[:20] = 0  # the teacher errs now and then
    said = of_the_set("a set", replace(seen, usual=usual))
    assert said.status == "inconclusive"
    assert "taken for 'a', and hardly a trusted one is" in " ".join(said.evidence)


def test_what_is_rare_in_another_mix_of_classes_is_no_proof() -> None:
    seen = scanned(60, 5000)
    assert of_the_set("a set", seen).status == "fail"
    several = np.array([0, 1, 2, 3])[np.where(np.arange(2000) % 10 < 9, 0, np.arange(2000) % 4)]
    usual_p = np.where(np.arange(5000) % 4 == 0, np.linspace(0.0002, 0.9, 5000) ** 2, seen.usual_p)  # a hard class
    said = of_the_set("a set", replace(seen, guessed=several, usual_p=usual_p))
    assert said.status == "inconclusive"
    assert "give trusted images in this mix" in " ".join(said.evidence)


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ((0.4, 0.0, 0.0, 0.0), ""),
        ((0.4, 0.35, 0.0, 0.0), "2 classes stand out"),
        ((0.4, 0.35, 0.3, 0.38), "spread over the classes"),
    ],
)
def test_several_targets_are_not_taken_for_another_source(shares: tuple[float, ...], said: str) -> None:
    seen = scanned(0, 5000)
    for index, share in enumerate(shares):
        rows = np.flatnonzero(seen.guessed == index)
        seen.p[rows[: round(share * len(rows))]] = 0.0002
    found = " ".join(of_the_set("a set", seen).evidence)
    assert of_the_set("a set", seen).status == "fail"
    assert ("spread" in found or "stand out" in found) == bool(said)
    assert said in found
    agreed_upon = of_the_set("a set", replace(seen, disagreement=np.full(2000, 0.5)))
    assert agreed_upon.status == ("inconclusive" if "spread" in said else "fail")
    if "spread" in said:  # a border or a logo, that no class has alone and no reference sees otherwise
        assert "the references agree with the teacher" in " ".join(agreed_upon.evidence)


def test_near_copies_are_found_and_others_are_not() -> None:
    drawn = torch.Generator().manual_seed(0)
    plain = (60 + 120 * torch.rand(60, 3, 4, 4, generator=drawn)).repeat_interleave(4, 2).repeat_interleave(4, 3).byte()
    noisy = (plain[:20].float() + torch.randint(-1, 2, (20, 3, 16, 16), generator=drawn)).clamp(0, 255).byte()
    like = near_copies(torch.cat([plain, noisy, plain[20:40] ^ 1]), seed=0)
    assert like[:60].tolist() == list(range(60))
    assert like[60:].tolist() == list(range(40))
    assert near_copies(torch.zeros(300, 1, 8, 8, dtype=torch.uint8), seed=0).unique().tolist() == [0]


def test_in_a_pale_set_images_that_are_not_copies_are_told_apart() -> None:
    drawn = torch.Generator().manual_seed(0)
    pale = (100 + 12 * torch.rand(400, 1, 4, 4, generator=drawn)).repeat_interleave(8, 2).repeat_interleave(8, 3).byte()
    assert len(near_copies(pale, seed=0).unique()) > 350
    greys = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 1, 8, 8).contiguous()
    assert len(near_copies(greys, seed=0).unique()) > 25


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2, 0.3])
def test_a_clean_set_weighs_nothing_at_any_rate_of_false_alarms(rate: float) -> None:
    drawn = np.random.default_rng(1)
    seen = replace(scanned(0, 5000), p=drawn.permutation(np.linspace(1e-3, 1, 2000)), false_alarms=rate)
    assert not seen.weighs


def test_many_classes_of_which_few_images_are_trusted_are_no_other_mix() -> None:
    drawn = np.random.default_rng(0)
    few = replace(
        scanned(0, 300),
        guessed=drawn.integers(0, 100, 2000),
        usual=drawn.integers(0, 100, 300),
        classes=tuple(map(str, range(100))),
    )
    assert not few.is_of_another_mix


def test_nothing_is_said_of_classes_that_no_trusted_image_is_taken_for() -> None:
    for flagged in (0, 400):
        seen = replace(scanned(flagged, 5000), usual=np.zeros(5000, int))
        seen.p[::4] = 0.5  # nothing of the one class that is known
        assert of_the_set("a set", seen).status == "inconclusive"
        assert "taken for 'b', 'c', 'd', and hardly a trusted one is" in " ".join(of_the_set("a set", seen).evidence)


def test_poison_of_a_known_class_is_not_excused_by_an_unknown_one() -> None:
    seen = replace(scanned(100, 5000, in_class=True), usual=np.arange(5000) % 3)
    assert seen.unknown == [3]
    assert of_the_set("a set", seen).status == "fail"


def test_what_is_trusted_itself_is_not_shown_to_be_clean() -> None:
    seen = replace(scanned(20, 5000), shared=400)
    assert of_the_set("a set", seen).status == "inconclusive"


def test_what_half_of_ten_classes_have_is_aimed_at_none_of_them() -> None:
    p, guessed = np.full(4000, 0.5), np.arange(4000) % 10
    for index, share in enumerate((0.041, 0.023, 0.021, 0.037, 0.029)):
        rows = np.flatnonzero(guessed == index)
        p[rows[: round(share * len(rows))]] = 0.0002
    usual = np.arange(5000) % 10
    seen = replace(scanned(0, 5000), p=p, guessed=guessed, original=np.ones(4000, bool), usual=usual)
    seen = replace(seen, classes=tuple("abcdefghij"), disagreement=np.full(4000, 0.5))
    assert seen.largest_part < 1 / 3
    assert of_the_set("a set", seen).status == "inconclusive"
    assert of_the_set("a set", replace(seen, disagreement=p)).status == "fail"


def test_what_is_flagged_of_all_classes_alike_is_said_to_look_like_another_source() -> None:
    spread, gathered = (
        of_the_set("a set", replace(scanned(200, 5000, in_class=where), disagreement=np.full(2000, 0.5)))
        for where in (False, True)
    )
    assert spread.status == "inconclusive"
    assert "another source" in " ".join(spread.evidence)
    assert gathered.status == "fail"
    assert "another source" not in " ".join(gathered.evidence)


@pytest.mark.parametrize(
    ("seen", "status"),
    [
        (scanned(20, 5000), "pass"),
        (scanned(200, 5000), "fail"),
        (scanned(20, 100), "inconclusive"),  # 100 trusted images could not have shown it
        (scanned(20, 5000, alike=0.3), "inconclusive"),  # references that learnt nothing
    ],
)
def test_a_set_passes_only_where_poison_would_have_been_seen(seen: Scanned, status: str) -> None:
    assert of_the_set("a set", seen).status == status


def test_few_images_of_one_class_tell_where_as_many_of_all_would_not() -> None:
    spread, gathered = scanned(60, 500), scanned(60, 500, in_class=True)
    assert of_the_set("a set", spread).status != "fail"
    assert of_the_set("a set", gathered).status == "fail"


def test_a_reference_of_two_classes_has_more_to_say_than_yes_and_no() -> None:
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(500, generator=generator).abs() + 0.5
    margins[:40] *= -1  # the reference disagrees on 8 % of trusted images, a little

    def sight(reference: torch.Tensor) -> Sight:
        n = len(reference)
        teacher = torch.tensor([[3.0, -3.0]]).expand(n, 2)
        logits = torch.stack([reference, -reference], 1)
        return Sight(torch.zeros(n, 1, 2, 2, dtype=torch.uint8), teacher, logits, torch.zeros(n, dtype=torch.int64))

    poison = sight(torch.full((50,), -9.0))
    assert p_values(agreement(poison, sight(margins))).max() < 0.01


@pytest.mark.parametrize("trigger", [Sinusoid(frequency=8.0), Sinusoid(frequency=4.0), Blend(opacity=0.001)])
def test_a_trigger_that_changes_nothing_is_refused(trigger: Sinusoid | Blend) -> None:
    with pytest.raises(InputError, match="changes no pixel"):
        trigger.check((1, 8, 8))
    Patch(size=2).check((1, 8, 8))
