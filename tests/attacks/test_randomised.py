"""Classifiers that answer otherwise every time: one lucky draw is no success."""

import torch
from torch import Tensor, nn

from stillproof.attacks.gradient import PGD
from stillproof.attacks.threats import Linf
from stillproof.core.runtime import Runtime

FP32 = Runtime("cpu", "fp32", 1)


class Coin(nn.Module):
    """It prefers class 0 by 1, whatever it sees, and adds noise of standard deviation 1 to each logit."""

    def forward(self, images: Tensor) -> Tensor:
        preferred = torch.tensor([1.0, 0.0]) + 0 * images.mean((1, 2, 3))[:, None]
        return preferred + torch.randn_like(preferred)


def attacked(samples: int) -> float:
    torch.manual_seed(0)
    images, labels = torch.full((200, 1, 8, 8), 0.5), torch.zeros(200, dtype=torch.int64)
    attack = PGD(threat=Linf(0.1), steps=5, samples=samples)
    return float(attack(Coin(), images, labels, runtime=FP32).success.float().mean())


def test_a_success_is_what_the_mean_of_fresh_passes_says() -> None:
    assert attacked(1) > 0.5  # P(fooled by one draw) = 0.24, and it looks often
    assert attacked(60) == 0.0  # the mean of 60 prefers class 0 by five standard deviations


def test_its_passes_are_counted() -> None:
    torch.manual_seed(0)
    images, labels = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)
    found = PGD(threat=Linf(0.1), steps=5, samples=60)(Coin(), images, labels, runtime=FP32)
    assert (found.backwards == 5 * 60).all()
    # the clean image, five looks and the last, and now and then a judgement
    assert (found.forwards >= 60 * 6 + 1).all()
    assert (found.forwards % 60 <= 1).all()
