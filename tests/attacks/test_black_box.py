"""Attacks that only ask: what they find, what they count, and that anything that answers can be asked."""

import pytest
import torch
from torch import Tensor

from stillproof.attacks.hop_skip_jump import HopSkipJump
from stillproof.attacks.square import Square
from stillproof.attacks.threats import L2, Linf
from stillproof.core.classifiers import Model
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError

from .test_gradient import FP32, Linear
from .test_minimal import case

BF16 = Runtime("cpu", "bf16", 1)


class Counting:
    """A function, not a module: it counts how often each image's neighbourhood is asked about."""

    def __init__(self, model: Linear, *, labels_only: bool = False) -> None:
        self.model, self.labels_only, self.asked = model, labels_only, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        logits = self.model(images).detach()
        return logits.argmax(1) if self.labels_only else logits


@pytest.mark.parametrize("runtime", [FP32, BF16])
@pytest.mark.parametrize("threat", [Linf(0.015), L2(0.1)])
def test_square_finds_what_is_well_inside_the_ball_and_nothing_outside(threat: Linf | L2, runtime: Runtime) -> None:
    model, images, labels, score = case()
    weight = model.weight.detach()
    needed = score / (weight.abs().sum() if isinstance(threat, Linf) else weight.norm()) / threat.epsilon
    found = Square(threat=threat, queries=600)(model, images, labels, runtime=runtime)
    assert 3 < int((needed < 0.6).sum()) < 30
    assert found.success[needed < 0.6].all()
    assert not found.success[needed > 1].any()
    assert (found.distance <= threat.epsilon * (1 + 1e-5)).all()
    assert torch.equal(model(found.images).argmax(1) != labels, found.success)


def test_square_asks_in_fp32_whatever_the_runtime_says() -> None:
    model, images, labels, _ = case()
    narrow, full = (Square(threat=Linf(0.015), queries=60)(model, images, labels, runtime=r) for r in (BF16, FP32))
    assert 0 < int(full.success.sum()) < len(images)
    assert torch.equal(narrow.images, full.images)
    assert torch.equal(narrow.queries, full.queries)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_hop_skip_jump_walks_to_the_nearest(norm: str) -> None:
    model, images, labels, score = case()
    weight = model.weight.detach()
    nearest = score / (weight.norm() if norm == "l2" else weight.abs().sum())
    attack = HopSkipJump(norm=norm, queries=4000, steps=15)  # type: ignore[arg-type]
    found = attack(Counting(model, labels_only=True), images, labels, runtime=FP32)
    assert found.success.all()
    assert (model(found.images).argmax(1) != labels).all()
    far = score > score.median()
    assert float((found.distance / nearest)[far].median()) < 1.35
    assert (found.distance >= nearest * (1 - 1e-3)).all()


@pytest.mark.parametrize("queries", [1, 2, 3, 40, 700])
@pytest.mark.parametrize("attack", [Square, HopSkipJump])
@pytest.mark.parametrize("runtime", [FP32, BF16])
def test_every_query_is_counted_and_none_is_over_the_budget(
    attack: type[Square | HopSkipJump], queries: int, runtime: Runtime
) -> None:
    model, images, labels, _ = case()
    asked = Counting(model)
    found = attack(queries=queries)(asked, images, labels, runtime=runtime)
    assert int(found.queries.sum()) == asked.asked
    assert int(found.queries.max()) <= queries
    assert torch.equal(found.queries, found.forwards)
    assert not found.backwards.any()
    module = attack(queries=queries)(model, images, labels, runtime=runtime)
    assert int(module.queries.max()) <= queries


def test_labels_alone_are_no_scores_but_square_still_runs() -> None:
    model, images, labels, _ = case()
    found = Square(threat=Linf(0.3), queries=50)(Counting(model, labels_only=True), images, labels, runtime=FP32)
    assert found.success.float().mean() > 0.5


def test_each_image_has_squares_of_its_own() -> None:
    model, images, labels, _ = case()
    twice = torch.stack([images[0], images[0]])
    found = Square(threat=Linf(1e-4), queries=10)(model, twice, labels[:1].expand(2), runtime=FP32)
    assert not torch.equal(found.images[0], found.images[1])


def test_hop_skip_jump_goes_to_a_class_that_noise_never_is() -> None:
    images = 0.5 + 0.02 * torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    bright = torch.full((1, 1, 8, 8), 0.95)

    def answers(asked: Tensor) -> Tensor:
        return (asked.mean((1, 2, 3)) > 0.8).long()

    labels, target = torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)
    settings = {"queries": 1500, "steps": 5, "norm": "l2"}
    lost = HopSkipJump(**settings)(answers, images, labels, target=target, runtime=FP32)  # type: ignore[arg-type]
    assert not lost.success.any()
    found = HopSkipJump(starts=bright, **settings)(answers, images, labels, target=target, runtime=FP32)  # type: ignore[arg-type]
    assert found.success.all()
    nearest = (0.8 - images.mean((1, 2, 3))) * 8  # all 64 pixels by as much
    assert (found.distance < 1.2 * nearest).all()
    wrong = torch.zeros(1, 3, 8, 8)
    with pytest.raises(InputError, match="same shape"):
        HopSkipJump(starts=wrong)(answers, images, labels, runtime=FP32)
    with pytest.raises(InputError, match="start from"):
        HopSkipJump(starts=bright + 1)


@pytest.mark.parametrize("queries", [8, 60])
def test_a_small_budget_is_not_spent_on_judging_the_search(queries: int) -> None:
    model = Model("zoo:resnet18?width=4").fresh((3, 16, 16), 5, 0).eval()
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    found = HopSkipJump(queries=queries, steps=1)(model, images, labels, runtime=Runtime(precision="fp32", threads=1))
    oracle = HopSkipJump(queries=queries, steps=1)(lambda given: model(given), images, labels, runtime=Runtime())
    assert torch.equal(found.queries, oracle.queries)
    assert torch.equal(found.success, oracle.success)
