"""Is the attack itself strong enough for this classifier? A test on problems that are known to have a solution.

Around an image, random points inside the ball are told apart from one point on its surface by a linear readout of the
classifier's own features. That point is adversarial for the readout, by construction. An attack that cannot find one
like it says nothing about the classifier when it fails there.
Source: Zimmermann et al. 2022, arXiv 2206.13991.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from stillproof.attacks.attack import GradientAttack
from stillproof.attacks.inner_logits import last_linear, last_weighted
from stillproof.attacks.random_draws import RandomDraws
from stillproof.attacks.straight_through import way_through
from stillproof.attacks.threats import L2, Linf, unit
from stillproof.core.measurement import Cost
from stillproof.core.noise import Noise, derive
from stillproof.core.runtime import Runtime
from stillproof.evasion.allowance import Allowance

INNER_SHARE = 0.95
"""η: inner points lie within this share of the ball."""

CLOSENESS = 0.95
"""How far from the nearest inner point to the boundary point the readout changes its mind. (The paper's code has .999,
at which rounding decides.)"""

NOISE = 1e-5
"""A spread of the features, of the largest, that may be rounding."""

RIDGE = 1e-3
"""What is added to the features' variances, of their mean."""


@dataclass(frozen=True, slots=True)
class Binarised:
    """What was solved: each bool, (m,), a row a problem. random: solved by as many random draws as there were inner
    points; those tell how hard the problems are. was_cut: the budget ended it."""

    attack: Tensor
    random: Tensor
    cost: Cost = field(default_factory=Cost)
    was_cut: bool = False

    @classmethod
    def nothing(cls) -> Binarised:
        """No problem was posed."""
        return cls(torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool))


def binarisation_test(
    classifier: nn.Module,
    images: Tensor,
    attack: GradientAttack,
    threat: Linf | L2,
    runtime: Runtime,
    allowance: Allowance | None = None,
    *,
    points: int,
    seed: int,
) -> Binarised:
    """Pose a problem around each image, float32, (m, C, H, W), and let the attack, and random draws, solve it.

    points: random inner points a problem; allowance: no problem is posed when it is spent. Problems that cannot be
    posed (the readout's classes do not separate, the module cannot be copied) are left out. Where the classifier has
    steps without gradient, the attack climbs straight through them.
    """
    solved: list[Tensor] = []
    lucky: list[Tensor] = []
    cost = Cost()
    readouts = _readouts(classifier, images[:2].to(runtime.device)) if len(images) else []
    allowance = Allowance() if allowance is None else allowance
    was_cut = False
    for number in range(len(images)):
        if allowance.is_spent:
            was_cut = True
            break
        one = images[number : number + 1]
        inner, boundary = _points(one, threat, points, derive(seed, "binarisation", number))
        around = torch.cat([one, inner, boundary]).to(runtime.device)
        own = derive(seed, "solve", number)  # the problems are trials of their own
        luck = RandomDraws(threat=threat, queries=points)
        posed = (_posed(classifier, readout, around) for readout in readouts)
        answers = (_answered(problem, one, attack, luck, around, runtime, own) for problem in posed if problem)
        found = next((answer for answer in answers if answer is not None), None)
        if found is None:
            continue
        if found.skips_head:  # what hides a gradient in the head, or after it, has to be got past as well
            whole = _posed(classifier, Readout(_on), around)
            found = found.both(_answered(whole, one, attack, luck, around, runtime, own) if whole else None)
        solved.append(found.solved)
        lucky.append(found.lucky)
        allowance.passes += found.cost.forwards + found.cost.backwards
        cost += found.cost
    if not solved:
        return replace(Binarised.nothing(), was_cut=was_cut)
    return Binarised(torch.cat(solved), torch.cat(lucky), cost, was_cut)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the attack, and random draws, made of a problem: each bool, (1,)."""

    solved: Tensor
    lucky: Tensor
    cost: Cost
    skips_head: bool

    def both(self, other: _Answer | None) -> _Answer:
        """Of two problems as one, that is solved where each is that luck does not solve."""
        if other is None:
            return self
        solved = (self.solved | self.lucky) & (other.solved | other.lucky)
        return _Answer(solved, self.lucky & other.lucky, self.cost + other.cost, skips_head=False)


def _answered(
    posed: _Posed,
    image: Tensor,
    attack: GradientAttack,
    luck: RandomDraws,
    around: Tensor,
    runtime: Runtime,
    seed: int,
) -> _Answer | None:
    """The attack climbs the problem as it is, and then past steps without a gradient; None where it cannot."""
    inside = torch.zeros(1, dtype=torch.int64)
    cost = Cost(forwards=2 * len(around))  # to pose it
    try:
        searched = attack(posed.problem, image, inside, seed=seed, runtime=runtime)
        cost += searched.cost
        way = None
        if not bool(searched.success.all()):
            way = way_through(posed.problem, around[:4], within=posed.readout.is_in_place)
        if way is not None:
            searched = attack(posed.problem, image, inside, seed=seed, runtime=runtime, through=way)
            cost += searched.cost
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:  # a module's own backward may know how many classes it had
        return None
    drawn = luck(posed.problem, image, inside, seed=seed, runtime=runtime)
    return _Answer(searched.success, drawn.success, cost + drawn.cost, posed.readout.skips_head)


def _points(image: Tensor, threat: Linf | L2, points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random points inside the ball, and one on its surface. Every second is as far out as they may be.

    Where a ball has few dimensions a readout would else tell corners from what is inside, and any corner would do.
    """
    inner = type(threat)(INNER_SHARE * threat.epsilon)
    ids = torch.arange(points)
    inside = inner.random_start(image.expand(points, *image.shape[1:]), Noise(derive(seed, "inner"), ids, 0))
    inside[::2] = _on_surface(image, inner, Noise(derive(seed, "outermost"), ids[::2], 0))
    return inside, _on_surface(image, threat, Noise(derive(seed, "boundary"), ids[:1], 0))


def _on_surface(image: Tensor, threat: Linf | L2, noise: Noise) -> Tensor:
    """As many points as the noise has rows: corners (Linf), or in any direction (L2)."""
    shape = tuple(image.shape[1:])
    direction = noise.integers(0, 2, shape) * 2.0 - 1 if isinstance(threat, Linf) else unit(noise.normal(shape))
    return threat.project(image + threat.epsilon * direction, image)


@dataclass(frozen=True, slots=True)
class Readout:
    """A way to put a readout of two classes into a classifier.

    make: (a copy of the classifier, points) -> it with the readout, that layer, and what goes into it; is_in_place:
    whether all that followed the last layer follows it; skips_head: whether nothing of the last layer is left.
    """

    make: Callable[[nn.Module, Tensor], tuple[nn.Module, nn.Linear, Tensor]]
    is_in_place: bool = False
    skips_head: bool = False


@dataclass(frozen=True, slots=True)
class _Posed:
    problem: nn.Module
    readout: Readout


def _readouts(classifier: nn.Module, images: Tensor) -> list[Readout]:
    """Where a readout may be put, the best place first: in place of the last layer with weights, if that is linear; on
    what goes into it; on the logits."""
    layer = last_weighted(classifier, images.clone())
    if not layer:
        return [Readout(_on)]
    found = [Readout(lambda copy, points: _on(_Features(copy, layer), points), skips_head=True), Readout(_on)]
    if layer == last_linear(classifier, images.clone()):
        found.insert(0, Readout(lambda copy, points: _in_place(copy, layer, points), is_in_place=True))
    return found


def _in_place(copy: nn.Module, head: str, points: Tensor) -> tuple[nn.Module, nn.Linear, Tensor]:
    seen: list[Tensor] = []
    hook = copy.get_submodule(head).register_forward_hook(lambda _module, given, _answer: seen.append(given[0]))
    copy(points.clone())
    hook.remove()
    layer = nn.Linear(seen[0].shape[1], 2).to(seen[0].device, seen[0].dtype)
    copy.set_submodule(head, layer)
    return copy, layer, seen[0]


def _on(copy: nn.Module, points: Tensor) -> tuple[nn.Module, nn.Linear, Tensor]:
    features = copy(points.clone()).float()
    layer = nn.Linear(features.shape[1], 2).to(points.device)
    return nn.Sequential(copy, _Float(), layer), layer, features


class _Float(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.float()


class _Features(nn.Module):
    """What goes into a layer; of maps and of tokens, their means."""

    def __init__(self, classifier: nn.Module, layer: str) -> None:
        super().__init__()
        self.classifier, self.layer = classifier, layer

    def forward(self, images: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = self.classifier.get_submodule(self.layer).register_forward_pre_hook(
            lambda _module, given: seen.append(given[0])
        )
        try:
            self.classifier(images)
        finally:
            hook.remove()
        found = seen[-1]
        return found.mean(1) if found.ndim == 3 else found.flatten(2).mean(2) if found.ndim > 3 else found


def _posed(classifier: nn.Module, readout: Readout, points: Tensor) -> _Posed | None:
    """The classifier with a readout of two classes: class 1 is the last of these points.

    None where it cannot be made, or does not tell the points apart.
    """
    try:
        with torch.no_grad():
            posed, layer, features = readout.make(deepcopy(classifier).eval(), points)
            linear = _readout(features.flatten(1).double().cpu())
            if linear is None:
                return None
            weight, bias = linear
            layer.weight.copy_(torch.stack([-weight, weight]))
            layer.bias.copy_(torch.stack([-bias, bias]))
            said = posed(points.clone()).argmax(1)
    except Exception:  # a module that cannot be copied, or whose layers are not what they seem
        return None
    return _Posed(posed.requires_grad_(False), readout) if int(said[-1]) == 1 and int(said[0]) == 0 else None


def _readout(features: Tensor) -> tuple[Tensor, Tensor] | None:
    """A linear function that is 1 for the last row and below −1 for the others; None where none is found.

    Between them it is 0 close to the last row: what is like it by luck is not enough. Its direction is Fisher's
    discriminant, in closed form; a support vector machine may not converge here.
    """
    others, own = features[:-1], features[-1]
    if float(others.std(0).max()) <= NOISE * float(features.abs().max()):
        return None
    mean = others.mean(0)
    centred, towards = others - mean, own - mean
    n, width = centred.shape
    ridge = RIDGE * (centred.square().sum() / (n * width)).clamp_min(torch.finfo(torch.float64).tiny)
    if width <= n:
        scatter = centred.T @ centred / n + ridge * torch.eye(width, dtype=own.dtype)
        weight = torch.linalg.solve(scatter, towards)
    else:  # the same by Woodbury's identity, where features are many
        gram = centred @ centred.T + n * ridge * torch.eye(n, dtype=own.dtype)
        weight = (towards - centred.T @ torch.linalg.solve(gram, centred @ towards)) / ridge
    highest, score = (others @ weight).max(), own @ weight
    if not bool(score > highest):
        return None
    above = (1 - CLOSENESS) * (score - highest)
    return weight / above, (above - score) / above
