"""Conditional mutual information against NumPy, and what the running means of a class do to it."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stillproof.core.carving import carve, load_data
from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import Batch
from stillproof.core.noise import Noise
from stillproof.core.plan import Context
from stillproof.core.plugins import build
from stillproof.core.runtime import Runtime
from stillproof.core.sources.digits import Digits
from stillproof.core.spec import Spec
from stillproof.core.stages import train_fresh
from stillproof.core.training import Recipe
from stillproof.errors import InputError
from stillproof.theft.hardening.cmim import (
    CMIM,
    Concentration,
    class_means,
    conditional_information,
    divergence_from,
)

SIZES = st.tuples(st.integers(1, 12), st.integers(2, 6), st.integers(0, 10_000))


def some(n: int, classes: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, classes, (n,), generator=generator)


def by_numpy(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """From the joint distribution: I(X; Ŷ | Y) = H(Ŷ | Y) − H(Ŷ | X, Y), X uniform over the images."""
    powers = np.exp(logits.numpy()) ** (1 / temperature)  # the power transform of the probabilities, renormalised
    p, y = powers / powers.sum(axis=1, keepdims=True), labels.numpy()

    def entropy(rows: Any) -> Any:
        return -(rows * np.log(rows)).sum(axis=-1)

    of_classes = sum((y == k).mean() * entropy(p[y == k].mean(axis=0)) for k in np.unique(y))
    return float(of_classes - entropy(p).mean())


@given(SIZES, st.floats(0.5, 20))
def test_conditional_information_is_what_numpy_says(sizes: tuple[int, int, int], temperature: float) -> None:
    logits, labels = some(*sizes)
    found = float(conditional_information(logits, labels, temperature))
    assert found == pytest.approx(by_numpy(logits, labels, temperature), abs=1e-9)


@given(SIZES)
def test_it_is_0_where_all_images_of_a_class_get_the_same_answer_and_only_there(sizes: tuple[int, int, int]) -> None:
    logits, labels = some(*sizes)
    by_class = logits[[int((labels == label).nonzero()[0]) for label in labels]]
    assert float(conditional_information(by_class, labels, 2.0)) == pytest.approx(0, abs=1e-12)
    same = all(bool((labels == label).sum() == 1) for label in labels)
    assert (float(conditional_information(logits, labels)) > 1e-12) != same


@given(SIZES)
def test_the_class_means_are_the_best_centres(sizes: tuple[int, int, int]) -> None:
    logits, labels = some(*sizes)
    classes, logs = sizes[1], logits.log_softmax(dim=1)
    others = torch.randn(classes, classes, generator=torch.Generator().manual_seed(9), dtype=torch.float64).softmax(1)
    least = conditional_information(logits, labels)
    assert float(divergence_from(others, logs, labels)) >= float(least) - 1e-12


@given(SIZES)
def test_holding_the_means_fixed_loses_nothing_of_the_gradient(sizes: tuple[int, int, int]) -> None:
    logits, labels = some(*sizes)
    free, held = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (whole,) = torch.autograd.grad(conditional_information(free, labels, 2.0), free)
    logs = (held / 2).log_softmax(dim=1)
    means = class_means(logs.detach().exp(), labels, sizes[1])
    (partial,) = torch.autograd.grad(divergence_from(means, logs, labels), held)
    assert torch.allclose(whole, partial, atol=1e-12)


class Given(nn.Module):
    """Answers with logits that were given to it."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits.float().requires_grad_()

    def forward(self, _images: Tensor) -> Tensor:
        return self.logits


def batch(labels: Tensor) -> Batch:
    index = torch.arange(len(labels))
    return Batch(torch.zeros(len(labels), 1, 8, 8), labels, index, {}, Noise(0, index, 0))


def test_without_memory_the_loss_is_that_of_the_batch_averaged_over_the_temperatures() -> None:
    logits, labels = some(12, 4, 1)
    method = CMIM(weight=3.0, memory=0.0)
    loss = Concentration(method, 4)(Given(logits), batch(labels))
    information = np.mean([by_numpy(logits, labels, T) for T in (1, 2, 4, 8, 16)])
    expected = float(F.cross_entropy(logits, labels)) + 3 * information
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_running_mean_follows_its_class_and_leaves_the_others() -> None:
    objective = Concentration(CMIM(points=1, memory=0.5), 3)
    first = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]])
    objective(Given(first), batch(torch.tensor([0, 1])))
    assert torch.allclose(objective.means[0, :2], first.softmax(1))  # a class's first answers are its mean
    assert torch.allclose(objective.means[0, 2], torch.full((3,), 1 / 3))  # never seen
    second = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    objective(Given(second), batch(torch.tensor([0, 0])))
    expected = 0.25 * first.softmax(1)[0] + 0.75 * second.softmax(1).mean(0)  # two images: half of a half is kept
    assert torch.allclose(objective.means[0, 0], expected)
    assert torch.allclose(objective.means[0, 1], first.softmax(1)[1])


def test_a_single_image_of_a_class_is_drawn_to_the_mean_of_those_before() -> None:
    """With a hundred classes a batch has hardly two of one: the batch's own information would be 0."""
    labels = torch.arange(4)
    logits, _ = some(4, 4, 3)
    assert float(conditional_information(logits, labels)) == pytest.approx(0, abs=1e-12)
    objective = Concentration(CMIM(), 4)
    objective(Given(some(4, 4, 4)[0]), batch(labels))
    seen = Given(logits)
    loss = objective(seen, batch(labels)) - F.cross_entropy(seen.logits, labels)
    (gradient,) = torch.autograd.grad(loss, seen.logits)
    assert float(loss.detach()) > 0.05
    assert (gradient.abs().amax(dim=1) > 1e-3).all()


def test_answers_that_underflow_leave_loss_and_gradient_finite() -> None:
    far = Given(torch.tensor([[2000.0, 0.0, -2000.0], [-2000.0, 0.0, 2000.0]]))
    loss = Concentration(CMIM(memory=0.0), 3)(far, batch(torch.tensor([0, 0])))
    (gradient,) = torch.autograd.grad(loss, far.logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_its_means_are_part_of_a_checkpoint() -> None:
    objective, again = Concentration(CMIM(), 3), Concentration(CMIM(), 3)
    objective(Given(some(5, 3, 2)[0]), batch(torch.tensor([0, 1, 2, 0, 1])))
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again.means, objective.means)
    assert again.seen.all()


def test_on_digits_it_leaves_less_to_be_learnt_from_an_answer_than_plain_training_does() -> None:
    runtime = Runtime.choose(threads=1)
    context = Context(runtime)
    parts = carve(load_data.run(context, source=Digits(), limit=600))
    labels = parts.test.known_labels()
    found: dict[float, tuple[float, float]] = {}
    for weight in (0.0, 5.0):
        student, _ = train_fresh(
            context,
            parts.training,
            Concentration(CMIM(weight=weight), 10),
            model=Model("zoo:cnn?width=8"),
            recipe=Recipe.standard(10),
            seed=1,
        )
        logits = predict(student, parts.test, runtime)
        right = float((logits.argmax(dim=1) == labels).double().mean())
        found[weight] = right, float(conditional_information(logits, labels, 4.0))
    assert found[5.0][1] < 0.5 * found[0.0][1]
    assert found[5.0][0] > 0.85


def test_options_reach_it_and_its_title_says_what_was_changed() -> None:
    method = build("hardening", Spec.parse("cmim?weight=2&hottest=20&points=3&memory=0.9"))
    assert method == CMIM(weight=2, hottest=20, points=3, memory=0.9)
    assert method.title == "cmim (weight=2, hottest=20, points=3, memory=0.9)"
    assert CMIM().title == "cmim"
    assert CMIM().temperatures == pytest.approx((1, 2, 4, 8, 16))
    assert CMIM(points=1).temperatures == (1,)
    for bad in ("cmim?weight=-1", "cmim?hottest=0.5", "cmim?points=0", "cmim?memory=1", "cmim?weight=inf"):
        with pytest.raises(InputError):
            build("hardening", Spec.parse(bad))
