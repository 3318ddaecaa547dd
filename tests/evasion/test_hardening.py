"""PGD training makes a classifier robust; defensive distillation hides its gradients and no more."""

import pytest
import torch
from torch import Tensor, nn

from stillproof.attacks.gradient import PGD, perturbed
from stillproof.attacks.threats import Linf
from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import TEACHER, CrossEntropy, Objective
from stillproof.core.images import as_float
from stillproof.core.runtime import Runtime
from stillproof.core.sources import DataSource
from stillproof.core.training import Recipe, fit
from stillproof.errors import InputError
from stillproof.evasion.hardening.adversarial_training import AdversarialTraining
from stillproof.evasion.hardening.defensive_distillation import AtTemperature, DefensiveDistillation, SoftLabels

EPSILON = 0.1
RECIPE = Recipe(epochs=6, batch_size=50, learning_rate=0.1)


def trained(digits: DataSource, objective: Objective, runtime: Runtime, **columns: Tensor) -> nn.Module:
    model = Model("zoo:cnn?width=8").fresh(digits.train.shape, 10, 0)
    fit(model, objective, digits.train, recipe=RECIPE, runtime=runtime, seed=0, columns=columns)
    return model


def robust_accuracy(model: nn.Module, digits: DataSource, runtime: Runtime, loss: str) -> float:
    images, labels = as_float(digits.test.images[:200]), digits.test.known_labels()[:200]
    attack = PGD(threat=Linf(EPSILON), steps=20, loss=loss)  # type: ignore[arg-type]
    return 1 - float(attack(model, images, labels, runtime=runtime).success.double().mean())


def test_pgd_training_makes_robust(digits: DataSource, runtime: Runtime) -> None:
    plain = trained(digits, CrossEntropy(), runtime)
    hardened = trained(digits, AdversarialTraining(threat=f"linf:{EPSILON}"), runtime)
    accuracy = (predict(hardened, digits.test, runtime).argmax(1) == digits.test.known_labels()).double().mean()
    assert accuracy > 0.9
    for loss in ("cross-entropy", "margin"):
        assert robust_accuracy(hardened, digits, runtime, loss) > robust_accuracy(plain, digits, runtime, loss) + 0.15


def test_defensive_distillation_only_hides(digits: DataSource, runtime: Runtime) -> None:
    teacher = trained(digits, AtTemperature(temperature=50), runtime)
    answers = predict(teacher, digits.train, runtime)
    student = trained(digits, SoftLabels(temperature=50), runtime, **{TEACHER: answers})
    logits = predict(student, digits.test, runtime)
    assert (logits.argmax(1) == digits.test.known_labels()).double().mean() > 0.9
    assert (logits.softmax(1).amax(1) == 1).double().mean() > 0.3
    hidden = robust_accuracy(student, digits, runtime, "cross-entropy")
    assert hidden - robust_accuracy(student, digits, runtime, "margin") > 0.1


def test_training_examples_stay_in_the_ball_and_raise_the_loss(digits: DataSource, runtime: Runtime) -> None:
    model = trained(digits, CrossEntropy(), runtime)
    images, labels = as_float(digits.test.images[:50]), digits.test.known_labels()[:50]

    def loss(of: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(of), labels, reduction="sum")

    found = perturbed(loss, images, images, threat=Linf(0.05), steps=5, step=0.3)
    assert float(Linf(0.05).distance(found, images).max()) <= 0.05 + 1e-6
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert loss(found).item() > 1.5 * loss(images).item()
    assert not found.requires_grad
    assert all(parameter.grad is None or torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_what_is_no_hardening_is_refused() -> None:
    with pytest.raises(InputError, match="hides nothing"):
        DefensiveDistillation(temperature=0.5)
    with pytest.raises(InputError, match="cannot train"):
        AdversarialTraining(steps=0)
    with pytest.raises(InputError, match="no threat"):
        AdversarialTraining(threat="l7:1")


def test_what_climbing_the_images_takes_is_counted(digits: DataSource, runtime: Runtime) -> None:
    some = digits.train.subset(torch.arange(64))
    model = Model("zoo:cnn?width=4").fresh(some.shape, 10, 0)
    objective = AdversarialTraining(threat="linf:0.1", steps=7)
    took = fit(model, objective, some, recipe=Recipe(epochs=2, batch_size=32), runtime=runtime, seed=0)
    assert took.backwards == 2 * 64 * (7 + 1)
    assert took.forwards == 2 * 64 * (7 + 1)
