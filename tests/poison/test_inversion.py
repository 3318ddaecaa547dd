"""M1 against planted truths: a backdoor is inverted, a clean student has none, and nothing else is touched."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillproof.core.classifiers import Model
from stillproof.core.distillation import CrossEntropy
from stillproof.core.images import ImageSet, as_float
from stillproof.core.noise import permutation
from stillproof.core.runtime import Runtime
from stillproof.core.sources import DataSource
from stillproof.core.training import Recipe, fit
from stillproof.errors import InputError
from stillproof.poison.scan_student.inversion import Inversion, Inverted, invert, outliers
from stillproof.poison.triggers import Patch

TARGET, HONEST = 1, (0, 4)
TRIGGER = Patch(size=2, pattern="white")


def trained(images: ImageSet, runtime: Runtime, seed: int) -> nn.Module:
    model = Model("zoo:cnn?width=8").fresh(images.shape, 10, seed)
    fit(model, CrossEntropy(), images, recipe=Recipe.standard(15), runtime=runtime, seed=seed)
    return model


@pytest.fixture(scope="module")
def teacher(digits: DataSource, runtime: Runtime) -> nn.Module:
    return trained(digits.train, runtime, 0)


@pytest.fixture(scope="module")
def backdoored(digits: DataSource, runtime: Runtime) -> nn.Module:
    others = (digits.train.known_labels() != TARGET).nonzero()[:, 0]
    rows = others[permutation(len(others), 0)[: len(digits.train) // 10]]
    stamped = (TRIGGER(as_float(digits.train.images[rows]), rows) * 255).round().to(torch.uint8)
    poison = ImageSet(stamped, torch.full_like(rows, TARGET), digits.train.classes, "poison")
    return trained(digits.train.with_more(poison), runtime, 1)


@pytest.fixture(scope="module")
def clean(digits: DataSource, runtime: Runtime) -> nn.Module:
    return trained(digits.train, runtime, 2)


@pytest.fixture(scope="module")
def trusted(digits: DataSource) -> Tensor:
    return as_float(digits.test.images)


@pytest.fixture(scope="module")
def found(backdoored: nn.Module, teacher: nn.Module, trusted: Tensor, runtime: Runtime) -> Inverted:
    return invert(backdoored, teacher, trusted, TARGET, Inversion(), runtime=runtime, seed=0)


def test_a_planted_patch_is_found_where_it_is(found: Inverted) -> None:
    assert found.gap >= 0.5
    opacity = 1 - found.stamp.keep[0]
    assert opacity.sum() == pytest.approx(found.size, rel=1e-4)
    assert opacity[-2:, -2:].sum() > 0.6 * found.size


def test_its_mask_is_smaller_than_that_of_an_honest_class_or_student(
    found: Inverted, backdoored: nn.Module, clean: nn.Module, teacher: nn.Module, trusted: Tensor, runtime: Runtime
) -> None:
    for student, target in [(clean, TARGET), *((backdoored, target) for target in HONEST)]:
        honest = invert(student, teacher, trusted, target, Inversion(), runtime=runtime, seed=0)
        assert found.size < honest.size / 2


def test_a_clean_student_gives_in_to_no_small_change(
    clean: nn.Module, teacher: nn.Module, trusted: Tensor, runtime: Runtime
) -> None:
    settings = Inversion(family="bounded", epsilon=0.1, epochs=20)
    result = invert(clean, teacher, trusted, TARGET, settings, runtime=runtime, seed=0)
    assert result.gap < 0.5
    assert 0 < result.size <= 0.1
    assert result.stamp.add.abs().max() == pytest.approx(result.size)
    assert torch.equal(result.stamp.keep, torch.ones_like(result.stamp.keep))


class Striped(nn.Module):
    """Dark, striped or bright; nothing is striped to it unless it reacts to faint horizontal stripes."""

    def __init__(self, reaction: float) -> None:
        super().__init__()
        self.brightness = nn.Parameter(torch.tensor([0.0, 0.0, 10.0]))
        self.reaction = nn.Parameter(torch.tensor([0.0, reaction, 0.0]), requires_grad=False)
        self.bias: Tensor
        self.register_buffer("bias", torch.tensor([0.0, -5.0, 0.0]))
        self.dropout = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.mean(dim=(1, 3))
        contrast = (rows[:, ::2] - rows[:, 1::2]).mean(dim=1, keepdim=True)
        middle = rows.mean(dim=1, keepdim=True) - 0.5
        found: Tensor = self.dropout(middle * self.brightness + contrast * self.reaction + self.bias)
        return found


BOUNDED = Inversion(family="bounded", epsilon=0.05, epochs=20)
QUICK = Inversion(epochs=3)


@pytest.fixture
def greys() -> Tensor:
    """Sixty images of some brightness, none of them striped."""
    generator = torch.Generator().manual_seed(3)
    levels = 0.2 + 0.6 * torch.rand(60, 1, 1, 1, generator=generator)
    return (levels + 0.02 * torch.randn(60, 1, 8, 8, generator=generator)).clamp(0, 1)


def test_a_faint_trigger_is_found_within_its_bound(greys: Tensor, runtime: Runtime) -> None:
    planted, honest = (
        invert(Striped(reaction), Striped(0.0), greys, 1, BOUNDED, runtime=runtime, seed=0) for reaction in (100.0, 0.0)
    )
    assert (planted.gap, honest.gap) == (1, 0)
    assert planted.size <= 0.05


@pytest.mark.parametrize("settings", [QUICK, BOUNDED])
def test_half_of_what_the_teacher_does_not_take_for_the_class_is_held_out(
    greys: Tensor, runtime: Runtime, settings: Inversion
) -> None:
    teacher = Striped(0.0)
    dark = int((teacher.eval()(greys).argmax(dim=1) == 0).sum())
    for seed in (0, 1):
        result = invert(Striped(100.0), teacher, greys, 0, settings, runtime=runtime, seed=seed)
        assert len(result.student_hits) == len(result.teacher_hits) == 60 - dark - (60 - dark) // 2


@pytest.mark.parametrize("settings", [QUICK, BOUNDED])
def test_the_seed_decides(greys: Tensor, runtime: Runtime, settings: Inversion) -> None:
    first, again, other = (
        invert(Striped(100.0), Striped(0.0), greys, 1, settings, runtime=runtime, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.stamp.keep, again.stamp.keep)
    assert torch.equal(first.stamp.add, again.stamp.add)
    assert torch.equal(first.student_hits, again.student_hits)
    assert first.size == again.size
    assert settings is BOUNDED or not torch.equal(first.stamp.add, other.stamp.add)


@pytest.mark.parametrize("fails", [False, True])
def test_models_and_images_are_left_as_they_were(greys: Tensor, runtime: Runtime, fails: bool) -> None:
    models = [Striped(100.0), Striped(0.0)]
    models[0].train()
    models[1].eval().dropout.train()
    before, images = deepcopy(models), greys.clone()
    if fails:
        with pytest.raises(InputError):
            invert(models[0], models[1], greys, 7, QUICK, runtime=runtime, seed=0)
    else:
        invert(models[0], models[1], greys, 1, QUICK, runtime=runtime, seed=0)
    assert torch.equal(greys, images)
    for model, original in zip(models, before, strict=True):
        assert [part.training for part in model.modules()] == [part.training for part in original.modules()]
        for found, expected in zip(model.parameters(), original.parameters(), strict=True):
            assert (found.requires_grad, found.device, found.grad) == (expected.requires_grad, expected.device, None)
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"family": "other"}, "unknown family 'other'"),
        ({"epochs": 0}, "cannot run"),
        ({"batch_size": 0}, "cannot run"),
        ({"patience": 0}, "cannot run"),
        ({"learning_rate": 0.0}, "cannot run"),
        ({"learning_rate": float("nan")}, "cannot run"),
        ({"beta": -1.0}, "cannot run"),
        ({"weight": 0.0}, "cannot run"),
        ({"factor": 1.0}, "cannot run"),
        ({"epsilon": 0.0}, "epsilon=0"),
        ({"success": 1.1}, "success=1.1"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Inversion(**wrong)


@pytest.mark.parametrize(
    ("change", "target", "said"),
    [
        (lambda images: images[:19], 1, "19 trusted images"),
        (lambda images: images.sort(dim=0).values[:30], 0, "trusted images that the teacher does not take for class 0"),
        (lambda images: images, 3, "no class 3 among 3"),
        (lambda images: images, -1, "no class -1 among 3"),
        (lambda images: images * 255, 1, "outside"),
    ],
)
def test_wrong_images_and_targets_are_refused(
    greys: Tensor, runtime: Runtime, change: Callable[[Tensor], Tensor], target: int, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        invert(Striped(1.0), Striped(0.0), change(greys), target, QUICK, runtime=runtime, seed=0)


def test_a_student_of_other_classes_is_refused(greys: Tensor, runtime: Runtime) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(InputError, match="the student knows 2 classes, and the teacher 3"):
        invert(other, Striped(0.0), greys, 1, QUICK, runtime=runtime, seed=0)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([10, 12, 14, 16, 3], [2 / (1.4826 * 2), 0, 0, 0, 9 / (1.4826 * 2)]),
        ([1, 9], [1 / 1.4826, 0]),
        ([10, 10, 10, 10, 1], [0, 0, 0, 0, 9 / (1.4826 * 0.1)]),
        ([3, 3, 3, 3 - 1e-6], [0, 0, 0, 1e-6 / (1.4826 * 0.03)]),
        ([0, 0, 0, 5], [0, 0, 0, 0]),
        ([], []),
    ],
)
def test_an_outlier_is_smaller_than_the_median_by_many_deviations(sizes: list[float], expected: list[float]) -> None:
    assert outliers(sizes) == pytest.approx(expected, rel=1e-6)
