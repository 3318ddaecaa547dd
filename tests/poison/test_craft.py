"""Crafting: what is stored deceives the teacher, within ε, and the controls lack what they should."""

import pytest
import torch
from torch import nn

from stillproof.attacks.threats import Linf
from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import CrossEntropy
from stillproof.core.images import ImageSet
from stillproof.core.runtime import Runtime
from stillproof.core.sources import DataSource
from stillproof.core.training import Recipe, fit
from stillproof.errors import InputError
from stillproof.poison.codec import Codec
from stillproof.poison.craft import CONTROLS, Crafting, craft
from stillproof.poison.triggers import MovingPatch, Patch

TARGET = 1
WHITE = Crafting(trigger=Patch(size=3, pattern="white"), target=TARGET, threat=Linf(0.2), codec=Codec())


@pytest.fixture(scope="module")
def teacher(digits: DataSource, runtime: Runtime) -> nn.Module:
    model = Model("zoo:cnn?width=8").fresh(digits.train.shape, 10, 0)
    fit(model, CrossEntropy(), digits.train, recipe=Recipe(epochs=12, batch_size=50), runtime=runtime, seed=0)
    return model


@pytest.fixture(scope="module")
def others(digits: DataSource) -> ImageSet:
    rows = (digits.train.known_labels() != TARGET).nonzero()[:120, 0]
    return digits.train.subset(rows)


def taken(model: nn.Module, images: torch.Tensor, like: ImageSet, runtime: Runtime) -> float:
    said = predict(model, ImageSet(images, None, like.classes, "poison"), runtime)
    return float((said.argmax(1) == TARGET).double().mean())


@pytest.mark.parametrize("codec", [Codec(), Codec(90)])
def test_poison_deceives_the_teacher_after_it_was_stored(
    teacher: nn.Module, others: ImageSet, runtime: Runtime, codec: Codec
) -> None:
    crafting = Crafting(trigger=WHITE.trigger, target=TARGET, threat=WHITE.threat, codec=codec)
    made = craft([teacher], others, crafting, seed=0, runtime=runtime)
    assert made.dtype == torch.uint8
    assert taken(teacher, made, others, runtime) > 0.9
    if codec == Codec():
        away = (made.float() - others.images.float()).abs()
        assert away[:, :, :5].max() <= 0.2 * 255
        assert (made[:, :, 5:, 5:] == 255).all()


def test_the_controls_lack_what_they_should(teacher: nn.Module, others: ImageSet, runtime: Runtime) -> None:
    made = {name: craft([teacher], others, WHITE.of(name), seed=0, runtime=runtime) for name in CONTROLS}
    rates = {name: taken(teacher, images, others, runtime) for name, images in made.items()}
    assert rates["δ without trigger"] > 0.9
    assert rates["trigger without δ"] < 0.2
    assert rates["noise with trigger"] < 0.3
    assert torch.equal(made["trigger without δ"][:, :, :5], others.images[:, :, :5])
    noise = (made["noise with trigger"].float() - others.images.float())[:, :, :5].abs()
    assert noise.max() <= 0.2 * 255
    assert noise.mean() > 10


def test_every_image_gets_the_patch_at_its_own_place(teacher: nn.Module, others: ImageSet, runtime: Runtime) -> None:
    trigger = MovingPatch(size=2, pattern="white")
    crafting = Crafting(trigger=trigger, target=TARGET, codec=Codec(), ingredients="trigger without δ")
    made = craft([teacher], others, crafting, seed=0, runtime=runtime)
    expected = trigger(others.images.float() / 255, torch.arange(len(others)))
    assert torch.equal(made, (expected * 255).round().to(torch.uint8))


def test_two_classifiers_are_deceived_at_once(
    teacher: nn.Module, others: ImageSet, digits: DataSource, runtime: Runtime
) -> None:
    reference = Model("zoo:cnn?width=4").fresh(digits.train.shape, 10, 1)
    fit(reference, CrossEntropy(), digits.train, recipe=Recipe(epochs=12, batch_size=50), runtime=runtime, seed=1)
    alone, both = (
        craft(models, others, WHITE, seed=0, runtime=runtime) for models in ([teacher], [teacher, reference])
    )
    assert taken(teacher, both, others, runtime) > 0.8
    assert taken(reference, both, others, runtime) > taken(reference, alone, others, runtime) + 0.1


def test_images_of_the_target_are_no_poison(teacher: nn.Module, digits: DataSource, runtime: Runtime) -> None:
    with pytest.raises(InputError, match="own class"):
        craft([teacher], digits.train, WHITE, seed=0, runtime=runtime)
