"""Attacks that look for the nearest adversarial image, where the nearest is known."""

import pytest
import torch
from torch import Tensor, nn

from stillproof.attacks.attack import GradientAttack
from stillproof.attacks.carlini_wagner import CarliniWagner
from stillproof.attacks.minimal import DDN, FMN
from stillproof.core.runtime import Runtime

from .test_gradient import FP32, Linear

BF16 = Runtime("cpu", "bf16", 1)
CW = CarliniWagner(searches=9, steps=200)


def case() -> tuple[Linear, Tensor, Tensor, Tensor]:
    """Grey images in the middle of [0, 1], so that the nearest adversarial image is the projection on a plane."""
    images = 0.4 + 0.2 * torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model = Linear()
    scores = ((images.flatten(1) - 0.5) @ model.weight).detach()
    return model, images, model(images).argmax(1), scores.abs()


@pytest.mark.parametrize("runtime", [FP32, BF16])
@pytest.mark.parametrize(
    ("attack", "norm"), [(CW, "l2"), (FMN(norm="l2"), "l2"), (FMN(norm="linf"), "linf"), (DDN(), "l2")]
)
def test_they_find_the_nearest(attack: GradientAttack, norm: str, runtime: Runtime) -> None:
    model, images, labels, score = case()
    weight = model.weight.detach()
    nearest = score / (weight.norm() if norm == "l2" else weight.abs().sum())
    found = attack(model, images, labels, runtime=runtime)
    assert found.success.all()
    assert (model(found.images).argmax(1) != labels).all()
    assert (found.distance >= nearest * (1 - 1e-3) - 1e-6).all()
    assert float((found.distance / nearest).median()) < 1.02
    assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1


@pytest.mark.parametrize("scale", [0.02, 1.0, 300.0])
def test_c_is_found_at_any_scale_of_the_logits(scale: float) -> None:
    _, images, labels, score = case()
    model = Linear(scale)
    found = CW(model, images, labels, runtime=FP32)
    assert found.success.all()
    assert float((found.distance / score).median() * model.weight.detach().norm()) < 1.02


def test_black_and_white_pixels_move() -> None:
    model = Linear()
    images = (torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    labels = model(images).argmax(1)
    patient = CarliniWagner(searches=3, steps=1000, first_c=10, abort_early=False)
    found = patient(model, images, labels, runtime=FP32)
    assert found.images.isfinite().all()
    assert found.success.all()


def test_a_confidence_is_kept() -> None:
    model, images, labels, _ = case()
    sure = CarliniWagner(searches=9, steps=200, confidence=0.3)(model, images, labels, runtime=FP32)
    logits = model(sure.images).detach()
    margins = logits.gather(1, 1 - labels[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]
    assert sure.success.all()
    assert (margins >= 0.3).all()
    assert float(margins.median()) < 0.33
    assert (sure.distance > CW(model, images, labels, runtime=FP32).distance).all()


def test_an_image_that_stalls_does_not_stop_the_others() -> None:
    """Summed over the batch, the loss of one image that rises would end the search of all."""
    model, images, labels, _ = case()
    alone = CW(model, images[:1], labels[:1], runtime=FP32)
    together = CW(model, images, labels, runtime=FP32)
    assert torch.allclose(alone.images, together.images[:1], atol=1e-5)
    assert len(set(together.backwards.tolist())) > 1  # each has a clock of its own


class Constant(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :2] * 0 + torch.tensor([1.0, 0.0])


@pytest.mark.parametrize("attack", [CarliniWagner(searches=2, steps=5), FMN(steps=5), DDN(steps=5)])
def test_what_was_not_found_is_infinitely_far(attack: GradientAttack) -> None:
    images = torch.rand(3, 1, 8, 8)
    found = attack(Constant(), images, torch.zeros(3, dtype=torch.int64), runtime=FP32)
    assert not found.success.any()
    assert found.distance.isinf().all()
    assert torch.equal(found.images, images)
