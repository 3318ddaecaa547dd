"""Beside another library, where the two must agree to the last decimals: an implementation that is not ours."""

import pytest
import torch
from torch import Tensor, nn

from stillproof.attacks.carlini_wagner import CarliniWagner
from stillproof.attacks.gradient import PGD, perturbed
from stillproof.attacks.losses import cross_entropy
from stillproof.attacks.threats import L2, Linf, Threat
from stillproof.core.runtime import Runtime

from .test_all_attacks import case

foolbox = pytest.importorskip("foolbox")

FP32 = Runtime("cpu", "fp32", 1)


def theirs(attack: object, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float | None) -> Tensor:
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    found: Tensor = attack(wrapped, images, labels, epsilons=epsilon)[1]  # type: ignore[operator]
    return found


@pytest.mark.parametrize("threat", [Linf(0.02), L2(0.3)])
def test_pgd_without_a_random_start_takes_the_same_steps(threat: Threat) -> None:
    model, images, labels = case()
    kind = foolbox.attacks.LinfPGD if isinstance(threat, Linf) else foolbox.attacks.L2PGD
    attack = kind(rel_stepsize=0.2, steps=10, random_start=False)
    expected = theirs(attack, model, images, labels, threat.epsilon)
    steps = {"threat": threat, "steps": 10, "step": 0.2}
    last = perturbed(lambda probe: cross_entropy(model(probe), labels).sum(), images, images, **steps)
    assert torch.allclose(last, expected, atol=1e-5)
    ours = PGD(**steps, random_start=False)(model, images, labels, runtime=FP32)
    fell = model(expected).argmax(1) != labels
    assert 0 < int(fell.sum()) < len(images)
    assert ours.success[fell].all()


def test_carlini_and_wagner_find_as_near_images() -> None:
    model, images, labels = case()
    images, labels = images[2:], labels[2:]  # black and white images: foolbox fails, and hands back zeros
    settings = {"steps": 100, "confidence": 0, "initial_const": 1.0}
    attack = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=5, stepsize=0.01, abort_early=False, **settings)
    expected = theirs(attack, model, images, labels, None)
    ours = CarliniWagner(searches=5, steps=100, first_c=1.0, learning_rate=0.01, abort_early=False)
    found = ours(model, images, labels, runtime=FP32)
    fell = model(expected).argmax(1) != labels
    assert fell.all()
    assert found.success.all()
    near = found.distance / L2(0).distance(expected, images)
    assert float(near.max()) < 1.01  # polished in fp32, so often nearer
    assert float(near.median()) > 0.95
