"""The bank of triggers against a backdoored student and clean ones; the rule that inversions are judged by."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import TEACHER, CrossEntropy, Distillation
from stillproof.core.images import ImageSet, as_float
from stillproof.core.runtime import Runtime
from stillproof.core.sources import DataSource
from stillproof.core.training import Recipe, fit
from stillproof.poison.account import student_classes_table
from stillproof.poison.scan_student.bank import Reaction, bank, react, unseen
from stillproof.poison.scan_student.suspicion import Sought, backdoored
from stillproof.poison.scan_student.verdict import Inspected, of_the_student
from stillproof.poison.triggers import Patch, Trigger

TARGET = 1


def trained(images: ImageSet, runtime: Runtime, seed: int, taught: Tensor | None = None) -> nn.Module:
    model = Model("zoo:cnn?width=8").fresh(images.shape, 10, seed)
    goal = CrossEntropy() if taught is None else Distillation(alpha=1.0)
    columns = {} if taught is None else {TEACHER: taught}
    fit(model, goal, images, recipe=Recipe.standard(20), runtime=runtime, seed=seed, columns=columns)
    return model


def with_backdoor(images: ImageSet, trigger: Trigger) -> ImageSet:
    rows = (images.known_labels() != TARGET).nonzero()[:120, 0]
    worn = trigger(as_float(images.images[rows]), rows)
    stamped = replace(images, images=(worn * 255).round().to(torch.uint8), labels=torch.full((120,), TARGET))
    return images.with_more(stamped)


def test_a_student_with_a_backdoor_reacts_and_a_clean_one_does_not(digits: DataSource, runtime: Runtime) -> None:
    teacher = trained(digits.train, runtime, 0)
    known, unknown = (digits.test.subset(torch.arange(first, len(digits.test), 2)) for first in (0, 1))
    clean = [trained(known, runtime, seed, predict(teacher, known, runtime)) for seed in (1, 2)]
    triggers = bank(digits.train.shape, {})
    white = with_backdoor(digits.train, Patch(size=2, pattern="white", place="top-left"))
    students = {"backdoored": trained(white, runtime, 3), "honest": trained(digits.train, runtime, 4)}
    found = {
        name: react(student, teacher, clean, unknown, triggers, runtime=runtime) for name, student in students.items()
    }
    present = [one for one in found["backdoored"] if one.is_present]
    assert present
    assert present[0].target == TARGET
    assert "top-left" in present[0].trigger
    assert not any(one.is_present for one in found["honest"])


def test_a_recovered_pattern_joins_the_bank() -> None:
    pattern = torch.zeros(1, 8, 8)
    pattern[0, 0, 0] = 2.0
    found = bank((1, 8, 8), {"seven": pattern})
    added = [stamp for name, stamp in found.items() if "'seven' share" in name]
    assert [float(stamp.add.abs().max()) for stamp in added] == pytest.approx([0.1, 0.3, 0.6])


def test_a_recovered_patch_is_painted_where_it_is_strongest() -> None:
    pattern = torch.full((1, 8, 8), 0.1)
    pattern[0, 0, 0], pattern[0, 0, 1] = 2.0, -1.5
    painted = [stamp for name, stamp in bank((1, 8, 8), {"seven": pattern}).items() if "differ most" in name]
    expected = torch.full((1, 8, 8), 0.5)
    expected[0, 0, 0], expected[0, 0, 1] = 1.0, 0.0
    assert len(painted) == 2
    assert all(torch.equal(stamp(torch.full((1, 8, 8), 0.5)), expected) for stamp in painted)


@pytest.mark.parametrize("side", [28, 32, 224])
def test_the_bank_has_patches_of_the_sides_that_attackers_give(side: int) -> None:
    names = bank((3, side, side), {})
    assert all(f"patch of {size}, white, bottom-right" in names for size in (2, 3, 4))


def sought(size: float, gap: float = 0.95, model: str = "student", family: str = "mask", target: int = 0) -> Sought:
    return Sought(model, family, target, gap, 0.0, size, p=1e-9)


def test_a_mask_must_be_an_outlier_and_smaller_than_any_in_a_clean_student() -> None:
    masks = [sought(size, target=target) for target, size in enumerate((3.0, 20.0, 21.0, 22.0, 23.0, 24.0))]
    clean = [sought(18.0, model="clean 0")]
    assert [one.target for one in backdoored(masks + clean)] == [0]
    assert not backdoored([*masks, sought(4.0, model="clean 0")])
    assert not backdoored([*masks[1:], sought(19.0), *clean])
    assert not backdoored([sought(3.0, gap=0.3)])
    two = [sought(3.0), sought(9.0, target=1)]  # of two classes none is an outlier
    assert backdoored([*two, sought(8.0, model="clean 0")]) == two[:1]
    assert not backdoored([*two, sought(5.0, model="clean 0")])
    assert not backdoored(two)  # without a clean student nothing is known to be unusual


def test_a_mask_that_nothing_in_a_clean_student_is_like_is_a_backdoors() -> None:
    alone = sought(9.0, gap=1.0, target=3)
    weak = [sought(9.0, gap=0.3, target=target) for target in range(10) if target != 3]
    clean = [sought(9.0, gap=0.3, model="clean 0", target=target) for target in range(10)]
    assert backdoored([alone, *weak, *clean]) == [alone]
    assert not backdoored([sought(9.0, gap=0.5, target=3), *weak, *clean])


def test_a_bounded_change_must_do_more_than_any_does_to_a_clean_student() -> None:
    change = sought(0.03, 0.8, family="bounded")
    assert backdoored([change, sought(0.03, 0.5, "clean 0", "bounded")]) == [change]
    assert not backdoored([change, sought(0.03, 0.75, "clean 0", "bounded")])


def test_a_change_that_few_images_judged_is_no_backdoor() -> None:
    change = sought(0.03, 1.0, family="bounded")
    assert backdoored([change]) == [change]
    assert not backdoored([replace(change, p=0.02)])


def test_a_class_of_which_few_images_are_left_cannot_be_said_to_be_clean() -> None:
    # 8 of 8 against none: p = 2^-7, times 36 triggers and 2 classes
    assert unseen([8, 200], 36) == [0]
    assert unseen([40, 200], 36) == []


def inspected(**more: object) -> Inspected:
    """Of a student that is as good as the clean ones, in whom masks were found, and nothing else."""
    masks = [sought(20.0, model=model, target=target) for model in ("student", "clean 0") for target in range(3)]
    reactions = [Reaction("a patch", 0, 1, 1, 200, 0.0, 1.0)] * 30
    plain = Inspected(reactions, masks, ("a", "b", "c"), 0.9, [0.9, 0.9], [200, 200, 200])
    return replace(plain, **more)  # type: ignore[arg-type]


BACKDOOR = [Reaction("a patch", 0, 150, 1, 200, 0.0, 1e-9)]


@pytest.mark.parametrize(
    ("seen", "against", "status"),
    [
        (inspected(), (), "pass"),
        (inspected(), ("The teacher reacts.",), "inconclusive"),
        (inspected(unclaimed=[200, 200, 9]), (), "inconclusive"),
        (inspected(sought=[one for one in inspected().sought if one.target]), (), "inconclusive"),
        (inspected(reactions=BACKDOOR), (), "fail"),
        (inspected(reactions=BACKDOOR, unclaimed=[200, 200, 9]), (), "fail"),
        (inspected(reactions=BACKDOOR, student_alike=0.6), (), "inconclusive"),  # a poor one reacts to anything
        (inspected(sought=[sought(1.0), *inspected().sought[1:]], student_alike=0.6), (), "inconclusive"),
        (inspected(sought=[sought(1.0), *inspected().sought[1:]]), (), "fail"),
    ],
)
def test_a_student_passes_only_where_a_trigger_would_have_shown(
    seen: Inspected, against: tuple[str, ...], status: str
) -> None:
    said = of_the_student("it", seen, against)
    assert said.status == status
    assert not against or said.evidence[-1] == against[0]


@pytest.mark.parametrize(
    ("alike", "said"), [(0.9, "backdoor: a patch"), (0.6, "reacts, as a poor student may: a patch")]
)
def test_the_table_says_no_more_than_the_verdict(alike: float, said: str) -> None:
    table = student_classes_table(inspected(reactions=BACKDOOR, student_alike=alike))
    assert [row[1] for row in table.rows] == [said, "none found", "none found"]
