"""Classifiers and inputs that have made attacks lie, or fail without saying why."""

import pytest
import torch
from torch import Tensor, nn

from stillproof.attacks.attack import GradientAttack, QueryAttack
from stillproof.attacks.carlini_wagner import CarliniWagner
from stillproof.attacks.frozen import frozen
from stillproof.attacks.gradient import APGD, PGD
from stillproof.attacks.hop_skip_jump import HopSkipJump
from stillproof.attacks.minimal import DDN, FMN
from stillproof.attacks.square import Square
from stillproof.attacks.threats import L2, Linf
from stillproof.errors import InputError

from .test_all_attacks import BF16, EVERY, FP32, case


class Gamma(nn.Module):
    """The derivative of its root is infinite at black pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images ** (1 / 2.2))
        return logits


@pytest.mark.parametrize("attack", [PGD(threat=L2(0.3), random_start=False), APGD(threat=L2(0.3)), DDN(), FMN()])
def test_an_infinite_gradient_makes_no_image_of_nan(attack: GradientAttack) -> None:
    model, images, _ = case()
    gamma = Gamma(model).eval()
    images[:, :, :2] = 0
    labels = gamma(images).argmax(1)
    found = attack(gamma, images, labels, runtime=FP32)
    assert found.images.isfinite().all()
    assert torch.equal(gamma(found.images).argmax(1) != labels, found.success)
    if not isinstance(attack, FMN):  # whose estimate of the distance to the boundary needs a finite slope
        assert found.success.any()


class NaN(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :5] * torch.nan


@EVERY
def test_nan_is_taken_for_nothing(attack: GradientAttack | QueryAttack) -> None:
    found = attack(NaN(), torch.rand(3, 3, 8, 8), torch.tensor([1, 2, 3]), runtime=FP32)
    assert not found.success.any()


@EVERY
def test_a_callers_autocast_and_gradients_change_nothing(attack: GradientAttack | QueryAttack) -> None:
    model, images, labels = case()
    with torch.autocast("cpu", torch.bfloat16):
        found = attack(model, images.clone().requires_grad_(), labels, runtime=FP32)
    assert torch.equal(model(found.images).argmax(1) != labels, found.success)
    assert not found.images.requires_grad
    with torch.inference_mode():
        again = attack(model, images.clone(), labels, runtime=FP32)
    assert torch.equal(again.success, found.success)


class InPlace(Gamma):
    def forward(self, images: Tensor) -> Tensor:
        images -= 0.5
        images *= 2
        logits: Tensor = self.model(images)
        return logits


@EVERY
def test_a_model_that_works_in_place_spoils_nothing(attack: GradientAttack | QueryAttack) -> None:
    model, images, _ = case(channels=1)
    labels = InPlace(model)(images.clone()).argmax(1)
    before = images.clone()
    found = attack(InPlace(model).eval(), images, labels, runtime=FP32)
    assert torch.equal(images, before)
    assert torch.equal(InPlace(model)(found.images.clone()).argmax(1) != labels, found.success)
    assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1


@pytest.mark.parametrize("queries", [2, 3, 12, 40, 600])
@pytest.mark.parametrize("name", ["square", "hop-skip-jump", "hop-skip-jump linf"])
def test_images_of_8_bits_stay_within_the_budget(name: str, queries: int) -> None:
    model, images, _ = case()
    images = (images * 255).round() / 255
    labels = model(images).argmax(1)
    asked = 0

    def answer(given: Tensor) -> Tensor:
        nonlocal asked
        asked += len(given)
        return model(given).detach()

    kind = Square if name == "square" else HopSkipJump
    settings = {"norm": "linf"} if name.endswith("linf") else {}
    found = kind(queries=queries, uint8=True, **settings)(answer, images, labels, runtime=FP32)  # type: ignore[arg-type]
    assert int(found.queries.max()) <= queries
    assert int(found.queries.sum()) == asked
    if queries == 600 and kind is HopSkipJump:
        smooth = kind(queries=queries, **settings)(answer, images, labels, runtime=FP32)  # type: ignore[arg-type]
        assert float(found.distance.median()) < 2 * float(smooth.distance.median()) + 1 / 255


@EVERY
def test_labels_and_answers_that_do_not_fit_are_refused(attack: GradientAttack | QueryAttack) -> None:
    model, images, labels = case()
    for wrong in (labels + 5, labels - 5):
        with pytest.raises(InputError, match="classes"):
            attack(model, images, wrong, runtime=FP32)
    with pytest.raises(InputError, match="own label"):
        attack(model, images, labels, target=labels)
    with pytest.raises(InputError, match="do not fit"):
        attack(model, images, labels.float())
    with pytest.raises(InputError, match="float32"):
        attack(model, images.double(), labels)
    single = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    with pytest.raises(InputError, match="K of 2 or more"):
        attack(single, images, labels * 0, runtime=FP32)
    nothing = attack(model, images[:0], labels[:0], runtime=FP32)
    assert len(nothing.images) == len(nothing.success) == 0


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, int]:
        return images.flatten(1), 1


def test_a_model_that_fails_or_answers_with_no_tensor_is_named() -> None:
    model, images, labels = case()
    for broken, given in ((Pair(), images), (model, images[:, :1])):
        with pytest.raises(InputError, match="the classifier fails on images of shape"):
            PGD()(broken, given, labels, runtime=FP32)


def test_an_attack_on_gradients_wants_a_module() -> None:
    _, images, labels = case()
    with pytest.raises(InputError, match="Square, HopSkipJump or Transfer"):
        PGD()(lambda given: given, images, labels)


def test_saturated_pixels_do_not_hold_fmn_back() -> None:
    model, images, _ = case()
    images[torch.rand(images.shape, generator=torch.Generator().manual_seed(5)) < 0.4] = 0
    labels = model(images).argmax(1)
    found = FMN()(model, images, labels, runtime=FP32)
    reference = DDN()(model, images, labels, runtime=FP32)
    assert found.success.all()
    assert float(found.distance.median()) <= 1.02 * float(reference.distance.median())


@pytest.mark.parametrize("attack", [DDN(), FMN(), FMN(norm="linf"), HopSkipJump(queries=1500)])
def test_half_precision_does_not_lose_the_nearest(attack: GradientAttack | QueryAttack) -> None:
    model, images, labels = case()
    full = attack(model, images, labels, runtime=FP32)
    half = attack(model, images, labels, runtime=BF16)
    assert float((half.distance / full.distance).quantile(0.9)) < 1.3


def test_nearest_images_are_adversarial_in_any_batch() -> None:
    model, images, labels = case()
    for attack in (FMN(), CarliniWagner(searches=4, steps=60, first_c=1), HopSkipJump(queries=1500, norm="linf")):
        found = attack(model, images, labels, runtime=FP32)
        one_by_one = torch.cat([model(image[None]).argmax(1) for image in found.images])
        assert torch.equal(one_by_one != labels, found.success)


class Kept(nn.Module):
    """Its copy is itself, and its train() returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = case()[0]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        return logits

    def __deepcopy__(self, _: object) -> "Kept":
        return self

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_a_copy_that_is_none_is_left_alone() -> None:
    model = Kept()
    images, labels = case()[1:]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with frozen(model, images, BF16) as prepared:
        assert prepared.folded == 0
        assert prepared.runtime.precision == "fp32"
    PGD(threat=Linf(0.03), steps=3)(model, images, labels, runtime=BF16)
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_square_moves_the_mass_of_each_channel_into_the_same_channel() -> None:
    model, images, labels = case()
    found = Square(threat=L2(0.5), queries=200)(model, images, labels, runtime=FP32)
    assert (found.distance <= 0.5 + 1e-5).all()
    assert found.success.float().mean() > 0.5
