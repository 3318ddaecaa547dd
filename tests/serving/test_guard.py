"""A classifier behind a response: joined ones, what the oracle reveals of it, and helpers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stillproof
from stillproof.core.images import ImageSet
from stillproof.core.noise import Noise
from stillproof.core.plugins import build
from stillproof.core.runtime import Runtime
from stillproof.core.spec import Spec
from stillproof.errors import InputError
from stillproof.serving.guard import Guard, finite, guard
from stillproof.serving.oracle import Oracle, Reveal
from stillproof.serving.responses import with_winner
from stillproof.theft.transfer import log_probabilities

from .test_responses import Seen, images_for, made, served


def test_joined_responses_apply_one_after_the_other() -> None:
    logits = 2 * Noise(4, torch.arange(20), 0).normal((10,))
    both = served("top?k=3+round?decimals=1", logits)
    assert torch.equal(both, served("round?decimals=1", served("top?k=3", logits)))
    assert not torch.equal(both, served("round?decimals=1+top?k=3", logits))
    assert bool((both.isneginf().sum(1) >= 7).all())
    assert made("top+label-only").keeps_argmax
    assert not made("top+round").keeps_argmax


def test_a_guard_serves_log_probabilities_and_leaves_the_helper_in_eval_mode() -> None:
    model, helper = Seen(5), nn.Sequential(nn.Dropout(0.9), Seen(5, seed=2))
    guarded = guard(model, "mad+top?k=2", helpers=[helper])
    assert guarded.training
    assert not helper.training
    images = images_for(8)
    assert torch.equal(guarded(images), guarded(images))
    assert torch.allclose(guarded(images).exp().sum(1), torch.ones(8), atol=1e-5)
    assert stillproof.guard is guard
    assert isinstance(stillproof.guard(model, build("response", Spec("power"))), Guard)


def test_a_guard_passes_gradients_where_its_response_has_some() -> None:
    images = images_for(4).requires_grad_()
    guard(Seen(5), "power")(images).exp()[:, 0].sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


def test_the_oracle_reveals_what_the_response_left(runtime: Runtime, toy: ImageSet) -> None:
    class Wide(Seen):
        def __init__(self) -> None:
            super().__init__(4)
            self.linear = nn.Linear(192, 4)

    model = Wide()
    for text in ("probabilities", "logits", "top-2", "label"):
        reveal = Reveal.parse(text)
        plain = Oracle(model, reveal, runtime).ask(toy)
        answer = Oracle(model, reveal, runtime, response=made("label-only")).ask(toy)
        taught = log_probabilities(answer, reveal, 4)
        assert not taught.isnan().any()
        assert torch.equal(taught.argmax(1), log_probabilities(plain, reveal, 4).argmax(1))
        assert float(taught.exp().amax(1).min()) > 1 - 1e-6


def test_a_hidden_class_gets_a_finite_stand_in() -> None:
    found = finite(torch.tensor([[0.0, -torch.inf, -200.0]]))
    assert found[0, 1] == pytest.approx(-87.336, abs=1e-2)
    assert found[0, 2] == -200


def test_the_winner_is_named_even_where_float32_has_made_it_a_tie() -> None:
    tied = torch.tensor([[0.5, 0.5, 0.5], [1.0, 3.0, 2.0]])
    assert torch.equal(with_winner(tied, torch.tensor([[2], [1]])).argmax(1), torch.tensor([2, 1]))
    assert torch.allclose(with_winner(tied, torch.tensor([[2], [1]])), tied)


# equal L1


def test_helpers_are_asked_for_and_counted() -> None:
    with pytest.raises(InputError, match="needs a network"):
        guard(Seen(3), "mad")
    with pytest.raises(InputError, match="no use for 1"):
        guard(Seen(3), "round", helpers=[Seen(3)])
