"""A classifier prepared for attack answers as the original, which is left as it was."""

import pytest
import torch
from torch import Tensor, nn

from stillproof.attacks.frozen import Frozen, frozen
from stillproof.core.classifiers import Model
from stillproof.core.runtime import Runtime

FP32, BF16 = Runtime("cpu", "fp32", 1), Runtime("cpu", "bf16", 1)
IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def lived_in(model: nn.Module) -> nn.Module:
    """With statistics in its batch norms that are not those of a fresh one."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight.data, module.running_var):
                values.copy_(0.5 + torch.rand(len(values), generator=generator))
            for values in (module.bias.data, module.running_mean):
                values.copy_(torch.randn(len(values), generator=generator) / 4)
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet18?width=8", 0),
        ("shufflenetv2?width=24", 0),
        ("cnn?width=8", 0),
        ("preresnet20?width=4", 10),
        ("vit", 0),
    ],
)
def test_what_can_be_folded_is_folded_and_the_answers_stay(name: str, left: int) -> None:
    model = lived_in(Model(f"zoo:{name}").fresh((3, 16, 16), 5, 0))
    with frozen(model, IMAGES, FP32) as prepared:
        assert prepared.folded == norms(model) - left
        expected = model(IMAGES)
        assert torch.allclose(prepared.judge(IMAGES), expected)
        assert torch.allclose(prepared.answer(IMAGES), expected, atol=1e-3 * float(expected.abs().max()))
    with frozen(model, IMAGES, BF16) as prepared:
        difference = (prepared.answer(IMAGES) - expected).abs().max()
        assert difference < 0.05 * (expected - expected.mean(1, keepdim=True)).abs().max()
        assert torch.equal(prepared.judge(IMAGES), model(IMAGES))
        wide = prepared.in_fp32()  # what HopSkipJump asks: folded, but not narrow
        assert (wide.fast is not wide.exact) == (prepared.folded > 0)
        assert torch.allclose(wide.answer(IMAGES), expected, atol=1e-3 * float(expected.abs().max()))


def test_the_gradient_is_that_of_the_original() -> None:
    model = lived_in(Model("zoo:resnet18?width=8").fresh((3, 16, 16), 5, 0)).eval()
    probe = IMAGES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(probe)[:, 2].sum(), probe)
    with frozen(model, IMAGES, FP32) as prepared:
        found = prepared.slope(IMAGES, lambda logits: logits[:, 2])
    assert torch.allclose(found.gradient, expected, atol=1e-3 * float(expected.abs().max()))


def test_the_original_is_left_as_it_was_even_after_an_error() -> None:
    model = lived_in(Model("zoo:resnet18?width=4").fresh((3, 16, 16), 5, 0)).train()
    part = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    part.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), frozen(model, IMAGES, BF16):
        raise ZeroDivisionError
    assert model.training
    assert not part.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.is_contiguous() for value in model.state_dict().values())


class Odd(nn.Module):
    """A convolution, a batch norm, and a way to use them that folding would break."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        normed = self.norm(features)
        if self.way == "output used twice":
            normed = normed + features
        if self.way == "norm called twice":
            normed = self.norm(normed)
        if self.way == "convolution called twice":
            normed = normed + self.first(images).relu()
        logits: Tensor = self.head(normed.relu().mean((2, 3)))
        if self.way == "randomised":
            logits = logits + 0.1 * torch.randn_like(logits)
        return logits + (1000 if self.way == "far from zero" else 0)


@pytest.mark.parametrize(
    "way", ["output used twice", "norm called twice", "convolution called twice", "randomised", "none"]
)
def test_what_cannot_be_folded_is_attacked_as_it_is(way: str) -> None:
    torch.manual_seed(0)
    model = lived_in(Odd(way)).eval()
    with frozen(model, IMAGES, FP32) as prepared:
        assert prepared.folded == (1 if way == "none" else 0)
        if way != "randomised":
            assert torch.allclose(prepared.answer(IMAGES), model(IMAGES), atol=1e-4)


def test_logits_that_bf16_cannot_tell_apart_are_computed_in_fp32() -> None:
    torch.manual_seed(0)
    with frozen(lived_in(Odd("far from zero")), IMAGES, BF16) as prepared:
        assert prepared.runtime.precision == "fp32"
    with frozen(lived_in(Odd("none")), IMAGES, BF16) as prepared:
        assert prepared.runtime.precision == "bf16"


def test_samples_average_a_randomised_model() -> None:
    torch.manual_seed(0)
    model = Odd("randomised").eval()
    with frozen(model, IMAGES, FP32) as prepared:
        assert isinstance(prepared, Frozen)
        single = torch.stack([prepared.slope(IMAGES, lambda z: z[:, 0]).logits for _ in range(20)]).std(0).mean()
        many = torch.stack([prepared.slope(IMAGES, lambda z: z[:, 0], samples=25).logits for _ in range(20)])
        assert many.std(0).mean() < single / 3
