"""The traps that other attack libraries fell into, one by one."""

import inspect

import pytest
import torch
from torch import Tensor, nn

from stillproof.attacks.attack import GradientAttack
from stillproof.attacks.carlini_wagner import CarliniWagner
from stillproof.attacks.gradient import APGD, PGD
from stillproof.attacks.losses import dlr, margin
from stillproof.attacks.minimal import DDN, FMN
from stillproof.attacks.threats import L2, Linf
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError

from .test_gradient import FP32, Linear, Wave, linear_case

BF16 = Runtime("cpu", "bf16", 1)


def test_a_one_hot_product_would_clamp_negative_logits() -> None:
    logits, labels = torch.tensor([[-1.0, -5.0, -6.0]]), torch.tensor([0])
    assert margin(logits, labels).item() == -4  # max(one_hot * z) says max(-4, -5, 0) - ... = 1


class _Undecided(nn.Module):
    """Brighter images are first taken for class 1; then no class has much, and the label a little more than others."""

    def forward(self, images: Tensor) -> Tensor:
        brighter = (images.flatten(1).mean(1) - 0.5) * 10
        late = torch.sigmoid((brighter - 1) * 10)
        first = 0.2 - 5 * torch.sigmoid((0.3 - brighter) * 10) + (0.97 * late + 1.22 * (1 - late)).log() - 0.2
        return torch.stack([torch.zeros_like(late), first, (1e-4 + 0.97 * late).log()], dim=1)


@pytest.mark.parametrize("run_to_end", [False, True])
def test_any_success_is_kept_though_another_image_has_a_larger_loss(run_to_end: bool) -> None:
    model, images, labels = _Undecided(), torch.full((1, 1, 8, 8), 0.5), torch.zeros(1, dtype=torch.int64)
    attack = PGD(threat=Linf(0.2), steps=20, step=0.1, random_start=False, run_to_end=run_to_end)
    found = attack(model, images, labels, runtime=FP32)
    assert found.success.item()
    edge = images + 0.2

    def loss(of: Tensor) -> float:
        return nn.functional.cross_entropy(model(of), labels).item()

    assert loss(edge) > loss(found.images)
    assert model(edge).argmax(1) == 0


def test_the_last_iterate_is_not_the_only_one_that_counts() -> None:
    images, labels = torch.full((1, 1, 8, 8), 0.5), torch.zeros(1, dtype=torch.int64)
    found = PGD(threat=Linf(0.2), steps=20, step=0.05, random_start=False)(Wave(), images, labels, runtime=FP32)
    assert found.success.item()
    assert found.first_success.item() < 21


def test_one_image_whose_loss_rises_does_not_stop_the_batch() -> None:
    model, images, labels = linear_case()
    attack = CarliniWagner(searches=4, steps=60, first_c=1, learning_rate=0.02)
    together = attack(model, images, labels, runtime=FP32)
    for row in range(4):
        alone = attack(model, images[row : row + 1], labels[row : row + 1], runtime=FP32)
        assert alone.backwards.item() == together.backwards[row].item()


@pytest.mark.parametrize("attack", [PGD(steps=20), APGD(steps=20), DDN(steps=20, loss="cross-entropy")])
def test_a_cross_entropy_of_exactly_zero_stops_nothing(attack: GradientAttack) -> None:
    """A distilled model's: the search goes on to its last step, and the margin finds what the loss hides."""
    _, images, labels = linear_case()
    model = Linear(1000)
    logits = model(images)
    assert (nn.functional.cross_entropy(logits, labels, reduction="none") == 0).float().mean() > 0.5
    blind = attack(model, images, labels, runtime=FP32)
    assert (blind.backwards[~blind.success] == 20).all()
    seeing = PGD(threat=Linf(0.3), steps=20, loss="margin")(model, images, labels, runtime=FP32)
    assert seeing.success.all()


def test_defaults_are_those_of_the_papers() -> None:
    """A ten-step attack under the name of a hundred-step one has fooled many."""
    assert APGD().steps == 100
    assert (CarliniWagner().searches, CarliniWagner().steps, CarliniWagner().first_c) == (9, 10_000, 1e-3)
    assert (FMN().steps, FMN().shrink, FMN().last_shrink) == (100, 0.05, 0.001)
    assert (DDN().steps, DDN().shrink) == (100, 0.05)


def test_images_outside_the_pixel_range_are_refused_not_clamped() -> None:
    model, images, labels = linear_case()
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        PGD(steps=1)(model, 255 * images, labels, runtime=FP32)


def test_black_and_white_pixels_do_not_freeze() -> None:
    images = torch.tensor([0.0, 1.0]).repeat(32).view(1, 1, 8, 8)
    model = Linear()
    found = CarliniWagner(searches=2, steps=800, first_c=50, abort_early=False)(
        model, images, model(images).argmax(1), runtime=FP32
    )
    assert found.success.all()
    assert (found.images != images).float().mean() > 0.4


def test_the_norm_is_of_each_image_not_of_the_batch() -> None:
    model, images, labels = linear_case()
    found = PGD(threat=L2(0.1), steps=5, run_to_end=True)(model, images, labels, runtime=FP32)
    assert float((found.images - images).flatten(1).norm(dim=1).median()) == pytest.approx(0.1, rel=0.01)


class _NearlyTied(nn.Module):
    """Two logits that bf16 cannot tell apart: it calls the first image's label wrong, fp32 does not."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3, bias=False)
        weight = torch.ones(3, 64) / 64
        weight[0] += 1e-5
        weight[2] = -1
        self.head.weight.data.copy_(weight)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits.flip(1)  # a tie goes to the first


def test_half_precision_judges_nothing() -> None:
    model = _NearlyTied()
    images = 0.5 + torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 2
    labels = model(images).argmax(1)
    assert (labels == 2).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(images).argmax(1) != 2).any()
    for attack in (PGD(threat=Linf(1e-9), steps=3), FMN(steps=3), APGD(threat=Linf(1e-9), steps=3)):
        found = attack(model, images, labels, runtime=BF16)
        assert torch.equal(model(found.images).argmax(1) != 2, found.success)


def test_dlr_is_defined_for_any_number_of_classes_and_sorts_no_more_than_it_needs() -> None:
    for classes in (2, 3, 4, 10):
        logits = torch.randn(5, classes, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(5) % classes
        assert dlr(logits, labels).isfinite().all()
        assert dlr(logits, labels, (labels + 1) % classes).isfinite().all()
        assert torch.equal(dlr(logits, labels) > 0, logits.argmax(1) != labels)
    assert "sort" not in inspect.getsource(dlr).replace("topk", "")
