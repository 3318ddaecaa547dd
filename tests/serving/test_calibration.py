"""The strength at which a response changes answers by as much as is wanted."""

from __future__ import annotations

import pytest
import torch

from stillproof.core.noise import Noise
from stillproof.errors import InputError
from stillproof.serving.calibration import calibrated, nearest_to
from stillproof.serving.guard import guard

from .test_responses import Given, Seen, helpers_of, images_for, l1, made


@pytest.mark.parametrize(
    "text", ["round", "power", "reverse-sigmoid", "mad", "mad?argmax=false", "adaptive-misinformation", "modelguard-w"]
)
def test_responses_are_tuned_to_an_equal_l1(text: str) -> None:
    logits = 2 * Noise(4, torch.arange(300), 0).normal((10,))
    response = made(text)
    images, helpers = images_for(300), helpers_of(response, 10)
    found = calibrated(response, logits, 0.4, images=images, helpers=helpers)
    answers = guard(Given(logits), found, helpers)(images).detach()
    assert float(l1(logits, answers).mean()) == pytest.approx(0.4, rel=0.02)
    assert type(found) is type(response)


@pytest.mark.parametrize("wanted", [0.0, 0.3, 0.7, 0.887, 1.0])
def test_a_strength_that_does_not_only_grow_is_found_all_the_same(wanted: float) -> None:
    """Rounding moves these answers by .68 at no decimals, and by 1.1 at a fraction of one."""
    logits = torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    found = nearest_to(made("round"), logits, wanted)
    assert not found.misses(wanted)


def test_what_cannot_be_tuned_is_refused_with_a_reason() -> None:
    logits = torch.zeros(5, 4)
    with pytest.raises(InputError, match="no strength"):
        calibrated(made("top"), logits, 0.1)
    with pytest.raises(InputError, match="no strength"):
        calibrated(made("top+round"), logits, 0.1)
    with pytest.raises(InputError, match="cannot change these answers"):
        calibrated(made("power"), logits, 0.5)  # uniform answers stay uniform
    with pytest.raises(InputError, match="reads the images"):
        calibrated(made("mad"), logits, 0.1)


def test_what_cannot_be_reached_comes_as_near_as_it_can() -> None:
    logits = 3 * Seen(10)(images_for(40))
    found = nearest_to(made("reverse-sigmoid"), logits, 1.9)
    assert found.misses(1.9)
    assert found.l1 < 1.9
    weaker = nearest_to(made("reverse-sigmoid"), logits, found.l1 / 2)
    assert not weaker.misses(found.l1 / 2)
    assert weaker.response.beta < found.response.beta  # type: ignore[attr-defined]


def test_answers_in_pieces_are_as_far_apart_as_all_at_once() -> None:
    images = images_for(600)  # more than are changed at once
    logits = Seen(10)(images).detach()
    surrogate = Seen(10, seed=5)
    found = nearest_to(made("mad"), logits, 0.3, images=images, helpers=[surrogate])
    whole = guard(Given(logits), found.response, [surrogate])(images)
    assert float(l1(logits, whole).mean()) == pytest.approx(found.l1, abs=1e-4)
    assert not found.misses(0.3)


@pytest.mark.parametrize("l1", [float("nan"), -0.1, 2.1])
def test_no_response_is_tuned_to_what_is_no_distance(l1: float) -> None:
    with pytest.raises(InputError, match="no L1 distance"):
        calibrated(made("power"), torch.randn(10, 3), l1)
