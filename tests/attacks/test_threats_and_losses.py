"""Threats and losses: properties that every attack relies on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillproof.attacks.losses import cross_entropy, log_odds, margin
from stillproof.attacks.threats import L2, Linf, parse_threat
from stillproof.core.noise import Noise
from stillproof.errors import InputError

THREATS = st.one_of(st.floats(0, 1).map(Linf), st.floats(0, 20).map(L2))


@given(THREATS, st.integers(0, 999))
def test_projection_and_start_stay_in_the_ball_and_the_pixel_range(threat: Linf | L2, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    origin = torch.rand(4, 3, 8, 8, generator=generator)
    far = origin + 3 * torch.randn(4, 3, 8, 8, generator=generator)
    for images in (threat.project(far, origin), threat.random_start(origin, Noise(seed, torch.arange(4), 0))):
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        assert (threat.distance(images, origin) <= threat.epsilon * (1 + 1e-5) + 1e-6).all()
    inside = threat.project(origin, origin)
    assert torch.allclose(inside, origin, atol=1e-6)


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.7)])
def test_the_steepest_direction_gains_the_most_of_all_of_its_length(threat: Linf | L2) -> None:
    gradient = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    best = (gradient * threat.steepest(gradient)).flatten(1).sum(1)
    dual = gradient.flatten(1).abs().sum(1) if isinstance(threat, Linf) else gradient.flatten(1).norm(dim=1)
    assert torch.allclose(best, dual, rtol=1e-5)
    assert threat.steepest(torch.zeros(1, 3, 8, 8)).isfinite().all()
    faint = threat.steepest(gradient * 1e-30)  # what a distilled model leaves of its gradient
    assert torch.allclose(faint, threat.steepest(gradient), atol=1e-4)


def test_the_norm_is_taken_image_by_image() -> None:
    origin = torch.zeros(2, 1, 8, 8)
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    assert L2(1.0).distance(images, origin).tolist() == [0.0, 8.0]
    shrunk = L2(2.0).project(images, origin)
    assert L2(2.0).distance(shrunk, origin).tolist() == pytest.approx([0.0, 2.0])


def test_random_starts_fill_the_l2_ball() -> None:
    origin = torch.full((500, 1, 8, 8), 0.5)
    lengths = L2(0.2).distance(L2(0.2).random_start(origin, Noise(0, torch.arange(500), 0)), origin)
    assert float(lengths.median()) > 0.19  # in 64 dimensions nearly all volume lies at the surface


@given(st.integers(2, 6), st.integers(0, 999))
def test_the_margin_is_positive_exactly_where_the_image_is_misclassified(classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, classes, generator=generator) - 10  # all negative: a one-hot product would fail
    labels = torch.randint(0, classes, (20,), generator=generator)
    found = margin(logits, labels)
    assert torch.equal(found > 0, logits.argmax(1) != labels)
    for row, label, value in zip(logits.tolist(), labels.tolist(), found.tolist(), strict=True):
        assert value == pytest.approx(max(v for j, v in enumerate(row) if j != label) - row[label], abs=1e-5)


@given(st.integers(2, 12), st.booleans(), st.integers(0, 999))
def test_the_log_odds_rise_with_cross_entropy_and_have_its_direction(classes: int, targeted: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, classes, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(classes, (6,), generator=generator)
    target = (labels + 1) % classes if targeted else None
    odds, entropy = log_odds(logits, labels, target), cross_entropy(logits, labels, target)
    expected = -torch.log1p(torch.exp(-odds)) if targeted else torch.log1p(torch.exp(odds))
    assert torch.allclose(entropy, expected)
    one, other = (torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (odds, entropy))
    assert torch.allclose(one / one.norm(dim=1, keepdim=True), other / other.norm(dim=1, keepdim=True))


def test_the_log_odds_are_alive_where_the_softmax_saturates() -> None:
    logits = torch.tensor([[300.0, 0.0, -50.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(log_odds(logits, torch.tensor([0])).sum(), logits)
    assert torch.allclose(gradient, torch.tensor([[-1.0, 1.0, 0.0]]))


def test_cross_entropy_vanishes_in_float32_where_the_margin_does_not() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    label = torch.tensor([0])
    (gradient,) = torch.autograd.grad(cross_entropy(logits, label).sum(), logits)
    assert gradient[0, 0] == 0
    (gradient,) = torch.autograd.grad(margin(logits, label).sum(), logits)
    assert gradient[0, 0] == -1


@pytest.mark.parametrize(
    ("text", "threat"),
    [("linf:8/255", Linf(8 / 255)), ("L2:0.5", L2(0.5)), ("linf:0", Linf(0.0)), ("l2:1/2", L2(0.5))],
)
def test_threats_are_parsed(text: str, threat: Linf | L2) -> None:
    assert parse_threat(text) == threat


@pytest.mark.parametrize("text", ["linf", "l3:1", "linf:8/0", "linf:-1", "l2:", "linf:1.2.3", ""])
def test_what_is_no_threat_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no threat"):
        parse_threat(text)
    for bad in (-0.1, math.inf, math.nan):
        with pytest.raises(InputError, match="no radius"):
            Linf(bad)
