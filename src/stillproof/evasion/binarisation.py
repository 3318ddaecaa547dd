"""Is the attack itself strong enough for this classifier? A test on problems that are known to have a solution.

Around an image, random points inside the ball are told apart from one point on its surface by a linear readout of the
classifier's own features. That point is adversarial for the readout, by construction. An attack that cannot find one
like it says nothing about the classifier when it fails there.
Source: Zimmermann et al. 2022, arXiv 2206.13991.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillproof.attacks.attack import GradientAttack
from stillproof.attacks.random_draws import RandomDraws
from stillproof.attacks.threats import L2, Linf, unit
from stillproof.core.noise import Noise, derive
from stillproof.core.runtime import Runtime

INNER_SHARE = 0.95
"""η: inner points lie within this share of the ball."""

STRONG_ENOUGH = 0.95
"""Share of the problems that a strong enough attack solves."""


@dataclass(frozen=True, slots=True)
class Binarised:
    """What was solved: each bool, (m,), a row a problem. random: solved by as many random draws as there were inner
    points; those tell how hard the problems are."""

    attack: Tensor
    random: Tensor


def binarisation_test(
    classifier: nn.Module,
    images: Tensor,
    attack: GradientAttack,
    threat: Linf | L2,
    runtime: Runtime,
    *,
    points: int,
    seed: int,
) -> Binarised:
    """Pose a problem around each image, float32, (m, C, H, W), and let the attack, and random draws, solve it.

    points: random inner points a problem. Problems that the readout cannot pose (its classes do not separate) are left
    out.
    """
    solved: list[Tensor] = []
    lucky: list[Tensor] = []
    head = _head_of(classifier, images[:2])
    for number in range(len(images)):
        one = images[number : number + 1]
        inner, boundary = _points(one, threat, points, derive(seed, "binarisation", number))
        posed = _posed(classifier, head, torch.cat([one, inner, boundary]))
        if posed is None:
            continue
        inside = torch.zeros(1, dtype=torch.int64)
        solved.append(attack(posed, one, inside, seed=seed, runtime=runtime).success)
        draws = RandomDraws(threat=threat, queries=points)
        lucky.append(draws(posed, one, inside, seed=seed, runtime=runtime).success)
    nothing = torch.zeros(0, dtype=torch.bool)
    return Binarised(torch.cat([nothing, *solved]), torch.cat([nothing, *lucky]))


def _points(image: Tensor, threat: Linf | L2, points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random points inside the ball, and one on its surface."""
    shape = tuple(image.shape[1:])
    around = image.expand(points, *shape)
    inner = type(threat)(INNER_SHARE * threat.epsilon)
    inside = inner.random_start(around, Noise(derive(seed, "inner"), torch.arange(points), 0))
    noise = Noise(derive(seed, "boundary"), torch.zeros(1, dtype=torch.int64), 0)
    if isinstance(threat, Linf):
        direction = noise.integers(0, 2, shape).to(torch.float32) * 2 - 1
    else:
        direction = unit(noise.normal(shape))
    return inside, threat.project(image + threat.epsilon * direction, image)


def _head_of(classifier: nn.Module, images: Tensor) -> str | None:
    """The name of the linear layer that runs last, if there is one and it runs once."""
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _module, _given, _answer, name=name: ran.append(name))
        for name, module in classifier.named_modules()
        if type(module) is nn.Linear
    ]
    try:
        with torch.no_grad():
            classifier(images)
    finally:
        for hook in hooks:
            hook.remove()
    return ran[-1] if ran and ran.count(ran[-1]) == 1 else None


class _OnLogits(nn.Module):
    """A readout of the logits, for a classifier whose features cannot be found."""

    def __init__(self, classifier: nn.Module, classes: int) -> None:
        super().__init__()
        self.classifier, self.head = classifier, nn.Linear(classes, 2)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.classifier(images))
        return found


def _posed(classifier: nn.Module, head: str | None, points: Tensor) -> nn.Module | None:
    """The classifier with a readout of two classes in place of its last layer: class 1 is the last of these points."""
    try:
        posed = deepcopy(classifier).eval()
    except Exception:  # a module that cannot be copied
        return None
    if head is None:
        with torch.no_grad():
            features = posed(points)
        posed = _OnLogits(posed, features.shape[1])
        layer = posed.head
    else:
        old = posed.get_submodule(head)
        layer = nn.Linear(old.in_features, 2).to(old.weight.dtype)  # type: ignore[arg-type]
        seen: list[Tensor] = []
        hook = old.register_forward_hook(lambda _module, given, _answer: seen.append(given[0]))
        with torch.no_grad():
            posed(points)
        hook.remove()
        features = seen[0].flatten(1)
        posed.set_submodule(head, layer)
    readout = _readout(features.double())
    if readout is None:
        return None
    weight, bias = readout
    with torch.no_grad():
        layer.weight.copy_(torch.stack([-weight, weight]))
        layer.bias.copy_(torch.stack([-bias, bias]))
        if not bool(posed(points[-1:]).argmax(1) == 1) or not bool(posed(points[:1]).argmax(1) == 0):
            return None
    return posed.requires_grad_(False)


def _readout(features: Tensor) -> tuple[Tensor, Tensor] | None:
    """A linear function that is positive for the last row only, halfway between it and the nearest of the others."""
    from sklearn.svm import LinearSVC

    centre, scale = features.mean(0), features.std(0).clamp_min(1e-12)
    given = ((features - centre) / scale).numpy()
    wanted = [0] * (len(given) - 1) + [1]
    fitted = LinearSVC(C=1e3, class_weight="balanced", dual=True, max_iter=2000, random_state=0)
    fitted.fit(given, wanted)
    weight = torch.from_numpy(fitted.coef_[0]) / scale
    scores = features @ weight
    highest, own = scores[:-1].max(), scores[-1]
    if not bool(own > highest):
        return None
    size = (own - highest).clamp_min(1e-12) / 2
    return weight / size, -(own + highest) / 2 / size
