"""PGD against closed forms and against the traps that other libraries fell into."""

import pytest
import torch
from torch import Tensor, nn

from stillproof.attacks.frozen import PROBES
from stillproof.attacks.gradient import PGD
from stillproof.attacks.threats import L2, Linf
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError

FP32 = Runtime("cpu", "fp32", 1)


class Linear(nn.Module):
    """Two classes; the margin is a linear function of the image, so the worst case is known."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(64, generator=generator) / 8)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        score = self.scale * (images.flatten(1) - 0.5) @ self.weight
        return torch.stack([score, -score], dim=1)


def linear_case() -> tuple[Linear, Tensor, Tensor]:
    images = 0.3 + 0.4 * torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model = Linear()
    return model, images, model(images).argmax(1)


@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
@pytest.mark.parametrize("threat", [Linf(0.02), L2(0.15)])
def test_on_a_linear_model_it_finds_exactly_what_can_be_found(threat: Linf | L2, loss: str) -> None:
    model, images, labels = linear_case()
    reach = model.weight.abs().sum() if isinstance(threat, Linf) else model.weight.norm()
    needed = ((images.flatten(1) - 0.5) @ model.weight).abs() / (threat.epsilon * reach)
    found = PGD(threat=threat, steps=40, loss=loss)(model, images, labels, runtime=FP32)  # type: ignore[arg-type]
    assert 5 < int((needed < 1).sum()) < 60
    assert found.success[needed < 0.98].all()
    assert not found.success[needed > 1].any()
    assert (found.distance <= threat.epsilon + 1e-6).all()
    assert torch.equal(model(found.images).argmax(1) != labels, found.success)
    assert torch.equal(found.first_success >= 0, found.success)


def test_a_misclassified_image_is_a_success_at_distance_zero() -> None:
    model, images, labels = linear_case()
    labels = labels.clone()
    labels[:7] = 1 - labels[:7]
    found = PGD(steps=3)(model, images, labels, runtime=FP32)
    assert found.success[:7].all()
    assert (found.distance[:7] == 0).all()
    assert (found.first_success[:7] == 0).all()


def test_targets_are_reached() -> None:
    model, images, labels = linear_case()
    found = PGD(threat=Linf(0.3), steps=20)(model, images, labels, target=1 - labels, runtime=FP32)
    assert found.success.all()
    assert torch.equal(model(found.images).argmax(1), 1 - labels)


def test_results_do_not_depend_on_batches_and_a_seed_repeats_them() -> None:
    model, images, labels = linear_case()
    whole = PGD(steps=4, batch_size=64)(model, images, labels, seed=3, runtime=FP32)
    parts = PGD(steps=4, batch_size=9)(model, images, labels, seed=3, runtime=FP32)
    assert torch.allclose(whole.images, parts.images)
    turned = PGD(steps=4)(model, images.flip(0), labels.flip(0), seed=3, ids=torch.arange(64).flip(0), runtime=FP32)
    assert torch.allclose(whole.images, turned.images.flip(0))
    assert not torch.equal(whole.images, PGD(steps=4)(model, images, labels, seed=4, runtime=FP32).images)


class Wave(nn.Module):
    """Adversarial only in a thin shell: a later iterate leaves it again."""

    def forward(self, images: Tensor) -> Tensor:
        moved = (images.flatten(1).mean(1) - 0.5) * 10
        wrong = torch.exp(-((moved - 0.4) ** 2) / 0.005)
        return torch.stack([torch.zeros_like(moved), -0.5 + wrong + 0.05 * moved], dim=1)


def test_an_earlier_success_is_kept_though_the_last_iterate_is_none() -> None:
    images = torch.full((2, 1, 8, 8), 0.5)
    labels = torch.zeros(2, dtype=torch.int64)
    attack = PGD(threat=Linf(0.2), steps=20, step=0.05, random_start=False)
    found = attack(Wave(), images, labels, runtime=FP32)
    assert found.success.all()
    to_the_end = PGD(threat=Linf(0.2), steps=20, step=0.05, random_start=False, run_to_end=True)
    assert to_the_end(Wave(), images, labels, runtime=FP32).success.all()


def test_running_to_the_end_finds_a_larger_loss() -> None:
    model, images, labels = linear_case()
    first = PGD(threat=Linf(0.1), steps=10)(model, images, labels, runtime=FP32)
    last = PGD(threat=Linf(0.1), steps=10, run_to_end=True)(model, images, labels, runtime=FP32)

    def loss(found: Tensor) -> float:
        return float(nn.functional.cross_entropy(model(found).detach(), labels))

    assert loss(last.images) > 1.5 * loss(first.images)
    assert torch.equal(first.success, last.success)


@pytest.mark.parametrize("run_to_end", [False, True])
def test_half_precision_finds_what_fp32_finds_and_counts_what_it_passes(run_to_end: bool) -> None:
    model, images, labels = linear_case()
    attack = PGD(threat=Linf(0.02), steps=40, run_to_end=run_to_end)
    full = attack(model, images, labels, runtime=FP32)
    half = attack(model, images, labels, runtime=Runtime("cpu", "bf16", 1))
    assert torch.equal(half.success, full.success)
    assert torch.equal(half.first_success >= 0, half.success)
    assert torch.equal(model(half.images).argmax(1) != labels, half.success)
    assert 0 < int(full.success.sum()) < 64


def test_the_model_is_left_as_it_was_and_passes_are_counted() -> None:
    model, images, labels = linear_case()
    model.train()
    counted = 0

    def count(_module: nn.Module, given: tuple[Tensor, ...], _out: Tensor) -> None:
        nonlocal counted
        counted += len(given[0])

    model.register_forward_hook(count)
    for steps in (5, 9):
        counted = 0
        found = PGD(steps=steps)(model, images, labels, runtime=FP32)
        told = int(found.forwards.sum())
        # beside what is told: the probes of the preparation, and what fills batches up, at most an eighth
        assert told <= counted <= told * 9 / 8 + 8 * PROBES
    assert model.training
    assert model.weight.requires_grad
    assert model.weight.grad is None


def test_bad_input_is_refused() -> None:
    model, images, labels = linear_case()
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        PGD(steps=1)(model, images * 2 - 1, labels, runtime=FP32)
    with pytest.raises(InputError, match="cannot run"):
        PGD(steps=0)
