"""Scanners of a transfer set against planted truths: what is poisoned is found, and look-alikes are not."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillproof.attacks.threats import Linf
from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import TEACHER, CrossEntropy, Distillation
from stillproof.core.images import ImageSet
from stillproof.core.runtime import Runtime
from stillproof.core.sources import DataSource
from stillproof.core.training import Recipe, fit
from stillproof.poison.codec import Codec
from stillproof.poison.craft import Crafting, craft
from stillproof.poison.scan_set.agreement import agreement, disagreement
from stillproof.poison.scan_set.combined import combined
from stillproof.poison.scan_set.shared_pattern import SharedPattern
from stillproof.poison.scan_set.sight import Scores, Sight, folds, p_values
from stillproof.poison.scan_set.verdict import excess
from stillproof.poison.scan_set.wandering_pattern import WanderingPattern
from stillproof.poison.triggers import Patch

TARGET, REFERENCES = 1, 3


@pytest.fixture(scope="module")
def teacher(digits: DataSource, runtime: Runtime) -> nn.Module:
    model = Model("zoo:cnn?width=16").fresh(digits.train.shape, 10, 0)
    fit(model, CrossEntropy(), digits.train, recipe=Recipe.standard(30), runtime=runtime, seed=0)
    return model


@pytest.fixture(scope="module")
def look(teacher: nn.Module, digits: DataSource, runtime: Runtime) -> Callable[[Tensor], tuple[Sight, Sight]]:
    """Suspects -> what scanners see of them and of the trusted images, which are the test images."""
    trusted = digits.test
    fold = folds(len(trusted), REFERENCES, 0)
    answers = predict(teacher, trusted, runtime)
    references = []
    for number in range(REFERENCES):
        rows = (fold != number).nonzero()[:, 0]
        reference = Model("zoo:cnn?width=12").fresh(trusted.shape, 10, number)
        taught = {TEACHER: answers[rows]}
        goal = Distillation(alpha=1.0)
        fit(
            reference,
            goal,
            trusted.subset(rows),
            recipe=Recipe.standard(30),
            runtime=runtime,
            seed=number,
            columns=taught,
        )
        references.append(reference)

    def sight(images: Tensor, fold: Tensor) -> Sight:
        some = ImageSet(images, None, trusted.classes, "some")
        said = torch.stack([predict(reference, some, runtime) for reference in references])
        return Sight(images, predict(teacher, some, runtime), said[fold, torch.arange(len(images))], fold)

    usual = sight(trusted.images, fold)
    return lambda images: (sight(images, folds(len(images), REFERENCES, 1)), usual)


@pytest.fixture(scope="module")
def poison(teacher: nn.Module, digits: DataSource, runtime: Runtime) -> Tensor:
    sources = digits.train.subset((digits.train.known_labels() != TARGET).nonzero()[:100, 0])
    crafting = Crafting(trigger=Patch(size=3, pattern="white"), target=TARGET, threat=Linf(0.2), codec=Codec())
    return craft([teacher], sources, crafting, seed=0, runtime=runtime)


def flagged(sights: tuple[Sight, Sight]) -> np.ndarray:
    scores = {
        "agreement": agreement(*sights),
        "shared pattern": SharedPattern()(*sights),
        "wandering pattern": WanderingPattern()(*sights),
    }
    return p_values(combined(scores)) <= 0.01


def test_poison_is_found_and_clean_images_are_not(
    look: Callable[[Tensor], tuple[Sight, Sight]], digits: DataSource, poison: Tensor
) -> None:
    found = flagged(look(torch.cat([digits.train.images, poison])))
    assert found[-100:].mean() > 0.9
    assert found[:-100].mean() < 0.03


def with_black_corners(digits: DataSource) -> Tensor:
    images = digits.train.images.clone()
    images[:, :, -2:, -2:] = 0
    return images


def with_another_codec(digits: DataSource) -> Tensor:
    images = digits.train.images.clone()
    images[::33] = Codec(60)(images[::33])
    return images


@pytest.mark.parametrize("made", [lambda digits: digits.train.images, with_black_corners, with_another_codec])
def test_a_clean_set_is_not_flagged(
    look: Callable[[Tensor], tuple[Sight, Sight]], digits: DataSource, made: Callable[[DataSource], Tensor]
) -> None:
    found = flagged(look(made(digits)))
    assert found.mean() < 0.03
    assert excess(int(found.sum()), len(found), 5, len(digits.test)) > 1e-3


def test_p_values_are_uniform_for_what_is_like_the_trusted() -> None:
    generator = np.random.default_rng(0)
    found = p_values(Scores(generator.normal(size=20_000), generator.normal(size=2_000)))
    assert found.min() == pytest.approx(1 / 2001)
    for level in (0.01, 0.05, 0.5):
        assert np.mean(found <= level) == pytest.approx(level, abs=0.01)


def test_disagreement_knows_neither_scale_nor_shift() -> None:
    first = np.array([[5.0, 0.0, 1.0], [5.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    second = np.array([[50.0, 0.0, 10.0], [-4.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
    assert disagreement(first, second + 7) == pytest.approx([0, 2, 1], abs=1e-6)


@pytest.mark.parametrize(("flags", "sure"), [({"n": 1000, "flagged": 10}, False), ({"n": 1000, "flagged": 60}, True)])
def test_an_excess_allows_for_the_threshold_being_random(flags: Mapping[str, int], sure: bool) -> None:
    chance = excess(flags["flagged"], flags["n"], 5, 500)
    assert (chance < 1e-3) is sure
    assert excess(0, 1000, 5, 500) == pytest.approx(1)
    drawn = np.random.default_rng(0)
    simulated = [
        np.sum(p_values(Scores(drawn.normal(size=1000), drawn.normal(size=500))) <= 0.01) >= 25 for _ in range(400)
    ]
    assert excess(25, 1000, 5, 500) == pytest.approx(np.mean(simulated), abs=0.03)
