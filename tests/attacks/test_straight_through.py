"""Ways through steps without a gradient: the same answers, and a gradient where there was none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.attacks.gradient import APGD
from stillproof.attacks.straight_through import StraightThrough, way_through
from stillproof.attacks.threats import Linf
from stillproof.core.runtime import Runtime

FP32 = Runtime("cpu", "fp32", 1)


class Stepped(nn.Module):
    """A linear classifier of 8×8 images, behind something done to the images, or before something done to logits."""

    def __init__(
        self,
        before: Callable[[Tensor], Tensor] = torch.Tensor.clone,
        after: Callable[[Tensor], Tensor] = torch.Tensor.clone,
    ) -> None:
        super().__init__()
        self.before, self.after = before, after
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 64, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.before(images).flatten(1) @ self.weight.T)


def thermometer(images: Tensor) -> Tensor:
    return sum((images > level / 4).float() for level in range(4)) / 4  # type: ignore[return-value]


def masks(images: Tensor) -> Tensor:
    bright = (images >= 0.5) & ~(images < 0.25)
    found = torch.zeros_like(images)
    found[bright] = 1.0
    return found + (images > 0.5)


def either(images: Tensor) -> Tensor:
    return torch.where(images > 0.5, torch.ones_like(images), torch.zeros_like(images))


def written_to(images: Tensor) -> Tensor:
    levels = (images * 15).int()
    levels[levels > 12] = 12
    return levels / 15


def of_half_the_branches(images: Tensor) -> Tensor:
    return torch.where(images > 0.5, (images - 0.5).log(), images) + (images > 0.3)


def masked_by_a_view(images: Tensor) -> Tensor:
    return ((7 * images).round() / 7).masked_fill((images.mean(1) > 0.99)[:, None], 0)


BEFORE = {
    "an integer tensor that is written to": written_to,
    "a view of a mask": masked_by_a_view,
    "either, of integers": lambda images: torch.where(images > 0.5, 1, 0).float(),
    "an index that goes to a device": lambda images: (
        (7 * images).round() / 7 * torch.ones(8)[(7 * images).long().to(images.device)]
    ),
    "an integer made a float by another": lambda images: (7 * images).int().to(images) / 7,
    "a keyword": lambda images: (7 * images).round() / 7 * torch.gt(images, other=0.1),
    "whole division in place": lambda images: images.clone().floor_divide_(0.25) / 4,
    "either, as a method": lambda images: torch.ones_like(images).where(images > 0.5, torch.zeros_like(images)),
    "thermometer": thermometer,
    "masks": masks,
    "either": either,
    "a remainder taken off": lambda images: images - images % 0.25,
    "a remainder taken off, as a function": lambda images: images - torch.remainder(images, 0.25),
    "whole division": lambda images: images // 0.25 / 4,
    "division that rounds": lambda images: torch.div(images, 0.25, rounding_mode="floor") / 4,
    "steep tanh": lambda images: torch.tanh(1000 * (images - 0.5)),
    "steep sigmoid": lambda images: (1000 * (images - 0.5)).sigmoid(),
    "rounding": lambda images: (7 * images).round() / 7,
    "a cast": lambda images: (7 * images).to(torch.uint8).float() / 7,
}
AFTER = {
    "a vote": lambda logits: F.one_hot(logits.argmax(1), 5).float(),
    "votes": lambda logits: sum(F.one_hot((logits + n).argmax(dim=-1), 5).double() for n in range(3)),
}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "model",
    [*(Stepped(step) for step in BEFORE.values()), *(Stepped(after=step) for step in AFTER.values())],
    ids=[*BEFORE, *AFTER],
)
def test_the_answers_are_the_same_and_have_a_gradient(model: Stepped, images: Tensor) -> None:
    through = way_through(model, images)
    assert isinstance(through, StraightThrough)
    probe = images.clone().requires_grad_()
    answer = through(probe)
    assert torch.allclose(answer.double(), model(images).double(), atol=1e-5)
    (slope,) = torch.autograd.grad((answer * torch.arange(5)).sum(), probe)
    assert (slope != 0).float().mean() > 0.5


@pytest.mark.parametrize("name", BEFORE)
def test_an_attack_that_climbs_through_finds_what_the_front_door_hides(name: str, images: Tensor) -> None:
    model = Stepped(BEFORE[name]).eval()
    labels = model(images).argmax(1)
    attack = APGD(threat=Linf(0.5), steps=20, loss="margin")
    found = attack(model, images, labels, runtime=FP32, through=way_through(model, images))
    assert found.success.all()
    assert torch.equal(model(found.images).argmax(1) != labels, found.success)


def test_what_is_not_chosen_spoils_no_gradient(images: Tensor) -> None:
    probe = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(StraightThrough(Stepped(of_half_the_branches))(probe).sum(), probe)
    assert slope.isfinite().all()


def test_no_way_changes_what_is_said_unnoticed(images: Tensor) -> None:
    def added(images: Tensor) -> Tensor:
        return ((images > 0.2) + (images > 0.4)).float() + (7 * images).round() / 7

    model = Stepped(added)
    through = way_through(model, images)  # as floats, two masks would add up to 2
    assert through is not None
    assert torch.allclose(through(images.clone().requires_grad_()), model(images), atol=1e-5)


def test_plain_numbers_that_are_made_of_a_mask_are_not_the_mask(images: Tensor) -> None:
    def shifted(images: Tensor) -> Tensor:
        mask = images > 0.5
        numbers = mask.float()
        numbers -= 0.5
        return images.masked_fill(mask, 0) + numbers

    model = Stepped(shifted)
    through = way_through(model, images)
    assert through is not None
    assert torch.allclose(through(images.clone().requires_grad_()), model(images), atol=1e-5)


def checked(images: Tensor) -> Tensor:
    if images.min() < 0 or not bool((images <= 1).all()):
        raise ValueError("outside [0, 1]")
    return images.clamp(0, 1)


@pytest.mark.parametrize("step", [checked, lambda images: images.tanh(), lambda images: images * (images > -100)])
def test_what_lies_beside_the_gradients_way_is_no_step_without_one(
    step: Callable[[Tensor], Tensor], images: Tensor
) -> None:
    assert way_through(Stepped(step), images) is None


def test_a_mask_of_constants_stays_a_mask(images: Tensor) -> None:
    def upper(images: Tensor) -> Tensor:
        rows = torch.arange(8.0)
        assert (rows > 3).dtype == torch.bool
        return images.masked_fill((rows > 3)[:, None], 0).round()

    model = Stepped(upper)
    through = way_through(model, images)
    assert through is not None
    assert torch.allclose(through(images), model(images), atol=1e-5)
