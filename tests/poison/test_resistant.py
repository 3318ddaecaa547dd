"""Distilling anyway: the projection, the consensus, and a planted backdoor that is unlearnt."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import TEACHER, CrossEntropy
from stillproof.core.images import ImageSet, as_float
from stillproof.core.runtime import Runtime
from stillproof.core.sources import DataSource
from stillproof.core.training import Recipe, fit
from stillproof.errors import InputError
from stillproof.poison.resistant import Anchored, Unlearning, consensus, shrunk, worst_change
from stillproof.poison.triggers import Patch

TARGET, TRIGGER = 1, Patch(size=3, pattern="white")


@pytest.mark.parametrize("size", [0.01, 0.2, 5.0])
def test_a_change_is_shrunk_to_the_nearest_of_that_size(size: float) -> None:
    change = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = shrunk(change, size)
    assert float(found.abs().mean()) <= size * (1 + 1e-5)
    if size == 5.0:
        assert torch.equal(found, change)
        return
    assert float(found.abs().mean()) == pytest.approx(size, rel=1e-4)
    away = (change - found).abs()  # soft thresholding: by the same amount wherever something is left
    assert torch.allclose(away[found != 0], away.max().expand(int((found != 0).sum())), atol=1e-6)


@pytest.fixture(scope="module")
def teacher(digits: DataSource, runtime: Runtime) -> nn.Module:
    model = Model("zoo:cnn?width=16").fresh(digits.train.shape, 10, 0)
    fit(model, CrossEntropy(), digits.train, recipe=Recipe.standard(20), runtime=runtime, seed=0)
    return model


def test_a_consensus_of_the_plain_image_alone_is_what_the_teacher_says(
    teacher: nn.Module, digits: DataSource, runtime: Runtime
) -> None:
    said = predict(teacher, digits.test, runtime).log_softmax(1)
    assert torch.allclose(consensus(teacher, digits.test, 0, runtime=runtime, seed=0), said, atol=1e-4)
    several = consensus(teacher, digits.test, 3, runtime=runtime, seed=0)
    assert torch.allclose(several.exp().sum(1), torch.ones(len(several)), atol=1e-5)
    assert float(several.exp().amax(1).mean()) < float(said.exp().amax(1).mean())  # views disagree a little
    with pytest.raises(InputError):
        consensus(teacher, digits.test, -1, runtime=runtime, seed=0)


def attack_success(model: nn.Module, digits: DataSource, runtime: Runtime) -> float:
    worn = TRIGGER(as_float(digits.test.images), torch.arange(len(digits.test)))
    shown = replace(digits.test, images=(worn * 255).round().to(torch.uint8))
    guesses, others = predict(model, shown, runtime).argmax(1), digits.test.known_labels() != TARGET
    return float((guesses[others] == TARGET).double().mean())


def backdoored(digits: DataSource) -> ImageSet:
    rows = (digits.train.known_labels() != TARGET).nonzero()[:120, 0]
    worn: Tensor = TRIGGER(as_float(digits.train.images[rows]), rows)
    more = ImageSet((worn * 255).round().to(torch.uint8), torch.full((120,), TARGET), digits.train.classes, "poison")
    return digits.train.with_more(more)


def test_unlearning_drives_a_backdoor_out_where_fine_tuning_leaves_it(
    teacher: nn.Module, digits: DataSource, runtime: Runtime
) -> None:
    trusted = digits.test.subset(torch.arange(0, len(digits.test), 4))
    columns = {TEACHER: predict(teacher, trusted, runtime)}
    recipe = replace(Recipe.standard(8), learning_rate=0.05, orthogonal_rate=0.01)
    left = {}
    for settings in (Unlearning(), Unlearning(sizes=())):
        student = Model("zoo:cnn?width=16").fresh(digits.train.shape, 10, 1)
        fit(student, CrossEntropy(), backdoored(digits), recipe=Recipe.standard(20), runtime=runtime, seed=1)
        planted = attack_success(student, digits, runtime)
        changes: list[Tensor] = []
        for number, size in enumerate(settings.sizes or (None,) * 5):
            if size is not None:
                images = as_float(trusted.images)
                changes.append(worst_change(teacher, student, images, size, settings, runtime=runtime, seed=number))
                assert float(changes[-1].abs().mean()) <= size * 1.001
            fit(student, Anchored(changes, 1.0), trusted, recipe=recipe, runtime=runtime, seed=number, columns=columns)
        left[bool(settings.sizes)] = attack_success(student, digits, runtime)
        guesses = predict(student, digits.test, runtime).argmax(1)
        assert float((guesses == digits.test.known_labels()).double().mean()) > 0.93
        assert all(parameter.requires_grad for parameter in student.parameters())
    assert planted > 0.9
    assert left[True] < left[False] - 0.15
