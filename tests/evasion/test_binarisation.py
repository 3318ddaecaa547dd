"""The binarisation test can be posed to classifiers whatever their last layer is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from stillproof.attacks.gradient import APGD
from stillproof.attacks.threats import Linf
from stillproof.core.runtime import Runtime
from stillproof.evasion.binarisation import binarisation_test

FP32 = Runtime("cpu", "fp32", 1)
THREAT = Linf(0.1)


class Cosine(nn.Module):
    """A head that is no layer of torch's."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width))

    def forward(self, features: Tensor) -> Tensor:
        return 20 * nn.functional.cosine_similarity(features[:, None], self.weight[None], dim=2)


class Tokens(nn.Module):
    """A class token at the root, as timm's and torchvision's ViT have, and a head on the mean of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.patches = nn.Conv2d(1, 32, 2, 2)
        self.norm, self.mix, self.head = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], 1)
        found: Tensor = self.head(
            self.norm(self.mix(tokens).relu()).flatten(1)[:, : 32 * 17].unflatten(1, (17, 32)).mean(1)
        )
        return found


class OnTokens(nn.Module):
    """A weight-normed head on every token, and then the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(1, 32, 2, 2), nn.LayerNorm(32)
        self.head = weight_norm(nn.Linear(32, 4))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(self.patches(images).flatten(2).transpose(1, 2).relu())).mean(1)
        return found


class Swish(nn.Module):
    """By hand, and steep: where it is flat, its derivative is nearly 0 or 1."""

    def forward(self, features: Tensor) -> Tensor:
        return features * (20 * features).sigmoid()


def features(width: int) -> list[nn.Module]:
    return [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, width, 3, padding=1), nn.ReLU()]


def flat(*head: nn.Module) -> nn.Module:
    return nn.Sequential(*features(8), nn.Flatten(), nn.Linear(8 * 64, 64), nn.ReLU(), *head)


def classifiers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "linear": flat(nn.Linear(64, 4)),
        "weight norm": flat(weight_norm(nn.Linear(64, 4))),
        "cosine": flat(Cosine(64, 4)),
        "a token at the root": Tokens(),
        "a head on tokens": OnTokens(),
        "swish by hand": nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), Swish(), nn.Linear(64, 64), Swish(), nn.Linear(64, 4)
        ),
        "convolution": nn.Sequential(*features(64), nn.Conv2d(64, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    }


@pytest.mark.parametrize("name", classifiers())
def test_problems_are_posed_and_a_real_attack_solves_what_luck_does_not(name: str) -> None:
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    attack = APGD(threat=THREAT, steps=60, loss="margin", restarts=2)
    found = binarisation_test(classifiers()[name].eval(), images, attack, THREAT, FP32, points=100, seed=0)
    assert len(found.attack) == 6
    hard = ~found.random
    assert hard.sum() >= 3
    assert found.attack[hard].all()


def test_an_attack_that_cannot_see_a_gradient_solves_nothing_that_is_hard() -> None:
    class Blind(nn.Module):
        def __init__(self, classifier: nn.Module) -> None:
            super().__init__()
            self.classifier = classifier

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.classifier(torch.from_numpy((images * 15).detach().numpy().round() / 15))
            return found

    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    attack = APGD(threat=THREAT, steps=20, loss="margin")
    blind = Blind(classifiers()["convolution"]).eval()
    found = binarisation_test(blind, images, attack, THREAT, FP32, points=100, seed=0)
    assert not found.attack[~found.random].any()
