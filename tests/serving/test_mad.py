"""MAD: what turns the thief's gradient most, within its distance, by a surrogate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stillproof.core.noise import Noise
from stillproof.serving.guard import guard
from stillproof.serving.responses.mad import LEAD, extreme, extreme_keeping

from .test_responses import Seen, images_for


def gradient_of_last_layer(surrogate: Seen, image: Tensor, answer: Tensor) -> Tensor:
    """The gradient of the soft cross-entropy with respect to the last layer, by automatic differentiation."""
    loss = -(answer * surrogate(image[None]).log_softmax(1)[0]).sum()
    (found,) = torch.autograd.grad(loss, surrogate.linear.weight)
    return found.flatten()


def test_mad_turns_the_gradient_of_the_last_layer_as_far_as_any_of_its_candidates() -> None:
    K, images = 4, images_for(6)
    surrogate = Seen(K, seed=9)
    p = (2 * Noise(6, torch.arange(6), 0).normal((K,))).softmax(1)
    q = surrogate(images).detach().softmax(1)
    winner = p.argmax(1, keepdim=True)
    corner, kept = extreme(p, q), extreme_keeping(p, q, winner)

    def turned(row: int, answer: Tensor) -> float:
        u, v = (gradient_of_last_layer(surrogate, images[row], a) for a in (answer, p[row]))
        return float((u / u.norm() - v / v.norm()).norm() ** 2)

    for row in range(6):
        corners = [turned(row, corner_answer) for corner_answer in torch.eye(K)]
        assert turned(row, corner[row]) == pytest.approx(max(corners), abs=1e-4)
        subsets = []
        for number in range(2**K):
            chosen = torch.tensor([float(number >> place & 1) for place in range(K)])
            if chosen[winner[row]]:
                chosen[winner[row]] += LEAD
                subsets.append(turned(row, chosen / chosen.sum()))
        assert turned(row, kept[row]) == pytest.approx(max(subsets), abs=1e-4)


def test_growing_a_subset_class_by_class_comes_near_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from stillproof.serving.responses import mad

    p = (2 * Noise(7, torch.arange(50), 0).normal((8,))).double().softmax(1)
    q = Noise(8, torch.arange(50), 0).normal((8,)).double().softmax(1)
    winner = p.argmax(1, keepdim=True)
    best = mad.turned(p, extreme_keeping(p, q, winner)[:, None], q)
    monkeypatch.setattr(mad, "EXHAUSTIVE", 1)
    grown = mad.turned(p, extreme_keeping(p, q, winner)[:, None], q)
    assert bool((grown <= best + 1e-9).all())
    assert float((grown / best).mean()) > 0.95


class _Says(nn.Module):
    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, _images: Tensor) -> Tensor:
        return self.answers


def test_of_two_classes_mad_moves_only_what_it_turns() -> None:
    logits, other = (2 * torch.randn(200, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    served = guard(nn.Identity(), "mad", [_Says(other)])(logits).exp()
    for row in range(0, 200, 20):
        alone = guard(nn.Identity(), "mad", [_Says(other[row : row + 1])])(logits[row : row + 1])
        assert torch.allclose(alone.exp()[0], served[row], atol=1e-6)
    p, q = logits.softmax(1), other.softmax(1)
    moved = (served - p).abs().sum(1) > 1e-5
    turned = (q - p)[:, 0] * (q - served)[:, 0] < 0
    assert 0 < int(moved.sum()) < 200
    assert torch.equal(moved, turned)


def test_mad_has_gradients_where_it_serves_nothing() -> None:
    images = torch.rand(8, 6, 1, 1, requires_grad=True)
    served = guard(
        nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), "mad?epsilon=2", [nn.Sequential(nn.Flatten(), nn.Linear(6, 4))]
    )
    served(images).logsumexp(1).sum().backward()
    assert bool(images.grad.isfinite().all())  # type: ignore[union-attr]
