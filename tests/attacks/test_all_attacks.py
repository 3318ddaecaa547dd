"""What every attack promises, attack by attack."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from stillproof.attacks.attack import GradientAttack, QueryAttack
from stillproof.attacks.carlini_wagner import CarliniWagner
from stillproof.attacks.gradient import APGD, FGSM, PGD
from stillproof.attacks.hop_skip_jump import HopSkipJump
from stillproof.attacks.minimal import DDN, FMN
from stillproof.attacks.random_draws import RandomDraws
from stillproof.attacks.record import AttackResult
from stillproof.attacks.square import Square
from stillproof.attacks.threats import L2, Linf
from stillproof.core.plugins import factory_of, table
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError

FP32, BF16 = Runtime("cpu", "fp32", 1), Runtime("cpu", "bf16", 1)

ATTACKS: dict[str, GradientAttack | QueryAttack] = {
    "fgsm": FGSM(threat=Linf(0.03)),
    "fgsm l2": FGSM(threat=L2(0.4), loss="margin"),
    "pgd": PGD(threat=Linf(0.03), steps=6, step=0.3, restarts=2),
    "pgd l2 to the end": PGD(threat=L2(0.4), steps=6, step=0.3, run_to_end=True, loss="dlr"),
    "apgd": APGD(threat=Linf(0.03), steps=12),
    "apgd l2": APGD(threat=L2(0.4), steps=12, loss="dlr"),
    "apgd targets": APGD(threat=Linf(0.03), steps=6, loss="dlr", targets=3),
    "cw": CarliniWagner(searches=3, steps=30, first_c=1.0, learning_rate=0.02),
    "fmn": FMN(steps=30),
    "fmn linf": FMN(steps=30, norm="linf"),
    "ddn": DDN(steps=30, shrink=0.1),
    "square": Square(threat=Linf(0.05), queries=60),
    "square l2": Square(threat=L2(0.8), queries=60),
    "random draws": RandomDraws(threat=Linf(0.08), queries=60),
    "random draws l2": RandomDraws(threat=L2(1.2), queries=60),
    "pgd standardised": PGD(threat=Linf(0.03), steps=6, step=0.3, loss="standardised"),
    "hop-skip-jump": HopSkipJump(queries=300, first_evaluations=20),
    "hop-skip-jump linf": HopSkipJump(queries=300, first_evaluations=20, norm="linf"),
}

EVERY = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())


class Net(nn.Sequential):
    """A small convolutional network with batch norm, whose weights come from a seed."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__(
            nn.Conv2d(channels, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.Softplus(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * 16, classes),
        )
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
        self.eval()
        noise = torch.rand(256, channels, 8, 8, generator=generator)
        self[-1].bias.data.sub_(self(noise).detach().mean(0))  # so that each class is that of some noise


def case(channels: int = 3, classes: int = 5, n: int = 24) -> tuple[Net, Tensor, Tensor]:
    model = Net(channels, classes)
    images = torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    images[0], images[1] = 0, 1  # at the edges of the pixel range
    return model, images, model(images).argmax(1)


def check(
    attack: GradientAttack | QueryAttack, found: AttackResult, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    """The promises that hold in every case."""
    n = len(images)
    assert found.images.shape == images.shape
    assert found.images.dtype == torch.float32
    assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1
    wrong = model(found.images).argmax(1) != labels
    assert torch.equal(wrong, found.success)
    assert torch.equal(found.first_success >= 0, found.success)
    for name in ("success", "distance", "forwards", "backwards", "queries", "first_success"):
        assert getattr(found, name).shape == (n,)
    if hasattr(attack, "threat"):
        assert (found.distance <= attack.threat.epsilon * (1 + 1e-5) + 1e-7).all()
    norm = attack.threat if hasattr(attack, "threat") else L2(0) if getattr(attack, "norm", "l2") == "l2" else Linf(0)
    reached = found.success | torch.full_like(found.success, hasattr(attack, "threat"))
    assert torch.allclose(found.distance[reached], norm.distance(found.images, images)[reached])
    if isinstance(attack, QueryAttack):
        assert (found.queries <= attack.queries).all()
        assert not found.backwards.any()
    else:
        assert not found.queries.any()


def test_every_attack_is_in_the_table_and_here() -> None:
    known = {factory_of("attack", name) for name in table("attack")}
    assert {type(attack) for attack in ATTACKS.values()} == known


@EVERY
@pytest.mark.parametrize("runtime", [FP32, BF16], ids=["fp32", "bf16"])
def test_success_is_what_fp32_says_inside_the_ball_and_the_pixel_range(
    attack: GradientAttack | QueryAttack, runtime: Runtime
) -> None:
    model, images, labels = case()
    found = attack(model, images, labels, runtime=runtime)
    check(attack, found, model, images, labels)
    assert found.success.float().mean() > 0.25  # it is an attack


@EVERY
def test_a_seed_repeats_it_whatever_the_batches_and_the_order(attack: GradientAttack | QueryAttack) -> None:
    model, images, labels = case()
    whole = attack(model, images, labels, seed=3, runtime=FP32)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))
    turned = replace(attack, batch_size=7)(model, images[order], labels[order], seed=3, ids=order, runtime=FP32)
    assert torch.equal(turned.success, whole.success[order])
    same = (turned.images - whole.images[order]).abs().flatten(1).amax(1) < 1e-3
    assert same.float().mean() > 0.9  # the others had a choice to make on a rounding


@EVERY
@pytest.mark.parametrize(("channels", "classes", "n"), [(1, 5, 4), (3, 2, 4), (1, 2, 1), (3, 5, 1)])
def test_one_channel_two_classes_one_image(
    attack: GradientAttack | QueryAttack, channels: int, classes: int, n: int
) -> None:
    model, images, labels = case(channels, classes, max(n, 2))
    images, labels = images[-n:], labels[-n:]
    check(attack, attack(model, images, labels, runtime=BF16), model, images, labels)


@EVERY
def test_what_is_misclassified_already_is_returned_untouched(attack: GradientAttack | QueryAttack) -> None:
    model, images, labels = case()
    labels = labels.clone()
    labels[::2] = (labels[::2] + 1) % 5
    found = attack(model, images, labels, runtime=FP32)
    assert found.success[::2].all()
    assert torch.equal(found.images[::2], images[::2])
    assert (found.distance[::2] == 0).all()
    assert (found.first_success[::2] == 0).all()
    assert (found.forwards[::2] == 1).all()


@EVERY
def test_images_of_8_bits_succeed_as_images_of_8_bits(attack: GradientAttack | QueryAttack) -> None:
    model, images, _ = case()
    images = (images * 255).round() / 255
    labels = model(images).argmax(1)
    found = replace(attack, uint8=True)(model, images, labels, runtime=BF16)
    check(attack, found, model, images, labels)
    levels = found.images * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert torch.equal(model(levels.round() / 255).argmax(1) != labels, found.success)
    assert found.success.float().mean() > 0.2
    with pytest.raises(InputError, match="multiples of 1/255"):
        replace(attack, uint8=True)(model, images * 0.999, labels)


@EVERY
def test_a_target_is_what_the_image_is_taken_for(attack: GradientAttack | QueryAttack) -> None:
    model, images, labels = case()
    target = (labels + 1) % 5
    found = attack(model, images, labels, target=target, runtime=BF16)
    assert torch.equal(model(found.images).argmax(1) == target, found.success)
    assert found.success.any()


def shifted(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, _Plus(1000.0))


def scaled(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, _Times(300.0))


class _Plus(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.by


class _Times(_Plus):
    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.by


MARGIN = {
    name: attack
    for name, attack in ATTACKS.items()
    if getattr(attack, "loss", "margin") in ("margin", "dlr") and name != "cw"
}


@pytest.mark.parametrize("attack", MARGIN.values(), ids=MARGIN.keys())
@pytest.mark.parametrize("change", [shifted, scaled])
@pytest.mark.parametrize("runtime", [FP32, BF16], ids=["fp32", "bf16"])
def test_neither_shift_nor_scale_of_the_logits_hides_anything(
    attack: GradientAttack | QueryAttack, change: Callable[[nn.Module], nn.Module], runtime: Runtime
) -> None:
    model, images, labels = case()
    plain = attack(model, images, labels, runtime=runtime)
    hidden = change(model)
    found = attack(hidden, images, labels, runtime=runtime)
    check(attack, found, hidden, images, labels)
    assert found.success.float().mean() > plain.success.float().mean() - 0.1


@EVERY
def test_what_cannot_be_attacked_is_refused(attack: GradientAttack | QueryAttack) -> None:
    model, images, labels = case()
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        attack(model, images * 2 - 1, labels)
    with pytest.raises(InputError, match="do not fit"):
        attack(model, images, labels[:-1])
    with pytest.raises(InputError, match="do not fit"):
        attack(model, images, labels, target=labels[:-1])
    with pytest.raises(InputError, match="batch size"):
        type(attack)(batch_size=0)
