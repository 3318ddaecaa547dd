"""ARD and RSLAD pass a robust teacher's robustness on; their terms are those of the papers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.attacks.gradient import PGD
from stillproof.attacks.threats import Linf
from stillproof.core.classifiers import Model
from stillproof.core.distillation import TEACHER, Batch, CrossEntropy, Distillation, Objective, OnlineTeacher
from stillproof.core.images import as_float
from stillproof.core.noise import Noise
from stillproof.core.runtime import Runtime
from stillproof.core.sources import DataSource
from stillproof.core.training import Recipe, fit
from stillproof.errors import InputError
from stillproof.evasion.hardening.adversarial_training import AdversarialTraining
from stillproof.evasion.hardening.ard import ARD
from stillproof.evasion.hardening.rslad import RSLAD

RECIPE = Recipe(epochs=6, batch_size=50, learning_rate=0.1)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images, logits = torch.rand(6, 1, 4, 4, generator=generator), torch.randn(6, 3, generator=generator)
    index = torch.arange(6)
    return Batch(images, index % 3, index, {TEACHER: logits}, Noise(0, index, 0))


class Plain(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(16, 3))


def test_the_terms_are_the_papers() -> None:
    student, given = Plain(), batch()
    with_ard, with_rslad = ARD(temperature=4, alpha=0.7, steps=3), RSLAD(alpha=0.8, steps=3)
    target = (given.columns[TEACHER] / 4).softmax(1)
    labels = given.known_labels()
    worst = with_ard.worst(student, given, lambda z: F.cross_entropy(z, labels, reduction="sum"))
    divergence = F.kl_div((student(worst) / 4).log_softmax(1), target, reduction="batchmean") * 16
    expected = 0.7 * divergence + 0.3 * F.cross_entropy(student(given.images), labels)
    assert torch.allclose(with_ard(student, given), expected)
    soft = given.columns[TEACHER].softmax(1)
    worst = with_rslad.worst(student, given, lambda z: F.kl_div(z.log_softmax(1), soft, reduction="sum"))

    def divergence_of(images: Tensor) -> Tensor:
        return F.kl_div(student(images).log_softmax(1), soft, reduction="batchmean")

    assert torch.allclose(with_rslad(student, given), 0.8 * divergence_of(worst) + 0.2 * divergence_of(given.images))
    without = replace(given, labels=None)
    assert with_rslad(student, without).isfinite()
    with pytest.raises(InputError, match="labels"):
        with_ard(student, without)


def test_robustness_is_passed_on(digits: DataSource, runtime: Runtime) -> None:
    def trained(objective: Objective, width: int) -> nn.Module:
        model = Model(f"zoo:cnn?width={width}").fresh(digits.train.shape, 10, 0)
        fit(model, objective, digits.train, recipe=RECIPE, runtime=runtime, seed=0)
        return model

    def robust(model: nn.Module) -> float:
        images, labels = as_float(digits.test.images[:200]), digits.test.known_labels()[:200]
        attack = PGD(threat=Linf(0.1), steps=20, loss="margin")
        return 1 - float(attack(model, images, labels, runtime=runtime).success.double().mean())

    teacher = trained(AdversarialTraining(threat="linf:0.1"), 16)
    plain = robust(trained(OnlineTeacher(teacher, Distillation(), runtime), 8))
    for objective in (RSLAD(threat="linf:0.1", steps=5), ARD(threat="linf:0.1", steps=5)):
        assert robust(trained(OnlineTeacher(teacher, objective, runtime), 8)) > plain + 0.1
    assert robust(trained(CrossEntropy(), 8)) < robust(teacher)


def test_what_is_no_robust_distillation_is_refused() -> None:
    for make in (lambda: ARD(alpha=2), lambda: ARD(temperature=0), lambda: RSLAD(alpha=0), lambda: RSLAD(steps=0)):
        with pytest.raises(InputError):
            make()
