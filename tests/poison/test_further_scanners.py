"""The scanners that are reported beside, and the baselines: each finds what it is made for, planted, and no more."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import TEACHER
from stillproof.core.images import ImageSet
from stillproof.core.noise import Noise
from stillproof.core.runtime import Runtime
from stillproof.core.training import Recipe, fit
from stillproof.errors import InputError
from stillproof.poison.account import area_under_curve
from stillproof.poison.further_scanning import FURTHER, further_named
from stillproof.poison.scan_set.activation_clustering import activation_clustering
from stillproof.poison.scan_set.early_loss import early_loss
from stillproof.poison.scan_set.probe import Learned, Watching
from stillproof.poison.scan_set.sight import Scores, p_values
from stillproof.poison.scan_set.spectral import spectral_signatures, whitened_spectrum
from stillproof.poison.scan_set.stability import VIEWS, fragility, movements, stability
from stillproof.poison.scan_set.strip import sureness
from stillproof.poison.scan_set.two_groups import two_groups

FP32 = Runtime(precision="fp32", threads=1)

PLANTED, CLEAN, TRUSTED, CLASSES = 60, 1140, 600, 6


def learned(apart: float, *, seed: int = 0) -> Learned:
    """Features of six classes; the last `PLANTED` suspects, of class 2, lie apart from their class."""
    generator = torch.Generator().manual_seed(seed)
    total = CLEAN + PLANTED + TRUSTED
    guessed = torch.arange(total) % CLASSES
    guessed[CLEAN : CLEAN + PLANTED] = 2
    centres = 8 * torch.randn(CLASSES, 16, generator=generator)
    loud = torch.ones(16)
    loud[0] = 6  # a direction in which every class spreads, and that says nothing
    features = centres[guessed] + loud * torch.randn(total, 16, generator=generator)
    features[CLEAN : CLEAN + PLANTED, 1] += apart
    losses = torch.rand(total, 5, generator=generator)
    losses[CLEAN : CLEAN + PLANTED] *= 1 - min(apart, 9) / 10
    return Learned(features, losses, guessed, CLEAN + PLANTED)


def auroc(scores: Scores) -> float:
    return area_under_curve(scores.suspects[CLEAN:], scores.suspects[:CLEAN])


@pytest.mark.parametrize("scanner", [two_groups, whitened_spectrum, early_loss])
def test_what_lies_apart_in_a_probe_is_found(scanner: Callable[[Learned], Scores]) -> None:
    assert auroc(scanner(learned(8.0))) > 0.97
    assert auroc(scanner(learned(0.0))) < 0.75  # class 2 alone may be odd by chance


@pytest.mark.parametrize("scanner", [two_groups, whitened_spectrum, early_loss, spectral_signatures])
def test_trusted_and_clean_images_score_alike(scanner: Callable[[Learned], Scores]) -> None:
    rates = []
    for seed in range(8):
        scores = scanner(learned(0.0, seed=seed))
        rates.append(float((p_values(scores) <= 0.05).mean()))
    assert np.mean(rates) == pytest.approx(0.05, abs=0.02)


def test_the_baselines_find_what_spreads_most() -> None:
    far = learned(40.0)
    assert auroc(spectral_signatures(far)) > 0.97
    assert auroc(activation_clustering(far)) > 0.9
    near = learned(8.0)  # the loud direction hides it from what does not whiten
    assert auroc(spectral_signatures(near)) < 0.8 < auroc(whitened_spectrum(near))


def test_a_probe_notes_the_loss_of_each_image_in_each_epoch(toy: ImageSet) -> None:
    plain = ImageSet(toy.images, None, toy.classes, toy.name)
    answers = torch.randn(len(toy), 3, generator=torch.Generator().manual_seed(0))
    watching = Watching(len(toy), 3)
    seen: list[Tensor] = []

    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.watching = watching

        def forward(self, student: nn.Module, batch) -> Tensor:  # type: ignore[no-untyped-def]
            loss = self.watching(student, batch)
            epoch = self.watching.seen[batch.index] - 1
            seen.append(self.watching.losses[batch.index, epoch].mean() * watching.temperature**2 - loss)
            return loss

    student = Model("zoo:cnn?width=4").fresh(toy.shape, 3, 0)
    recipe = Recipe.standard(3)
    fit(student, Checked(), plain, recipe=recipe, runtime=FP32, seed=0, columns={TEACHER: answers})
    assert watching.seen.tolist() == [3] * len(toy)
    assert torch.stack(seen).abs().max() < 1e-4


class Linear(nn.Module):
    """Ten logits that are sums over the image; the class does not depend on it much."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3 * 8 * 8, generator=torch.Generator().manual_seed(1)))

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(images.flatten(1) - 0.5, self.weight)


def test_every_view_is_a_small_change_that_batches_do_not_alter(toy: ImageSet) -> None:
    noise = Noise(3, torch.arange(60), 0)
    for name, view in VIEWS.items():
        found = view(toy.images, noise)
        assert found.dtype == torch.uint8
        assert found.shape == toy.images.shape
        assert not torch.equal(found, toy.images), name
        assert torch.equal(view(toy.images[20:30], Noise(3, torch.arange(20, 30), 0)), found[20:30]), name
    model = Linear()
    whole = movements(model, toy, predict(model, toy, FP32), runtime=FP32, seed=3)
    assert whole.shape == (60, len(VIEWS))
    assert whole.isfinite().all()


def test_of_two_classes_the_margin_moves(toy: ImageSet) -> None:
    class Two(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))], dim=1)

    model = Two()
    found = movements(model, toy, predict(model, toy, FP32), runtime=FP32, seed=3)
    assert all(len(column.unique()) > 40 for name, column in zip(VIEWS, found.T, strict=True) if name != "flip")


def test_images_that_are_all_alike_fall_into_no_clusters() -> None:
    features = torch.zeros(40, 6)
    features[20:] = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    guessed = torch.arange(40) // 20
    scores = activation_clustering(Learned(features, torch.zeros(40, 2), guessed, 30))
    assert (scores.suspects[:20] == 0).all()
    assert (scores.suspects[20:] > 0).all()


def test_the_median_is_that_of_two_by_two_pixels(toy: ImageSet) -> None:
    found = VIEWS["median of 2 × 2"](toy.images, Noise(0, torch.arange(60), 0))
    assert int(found[4, 1, 2, 5]) == int(toy.images[4, 1, 2:4, 5:7].flatten().median())


def test_what_moves_less_is_as_suspicious_as_what_moves_more() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator)
    trusted, clean, poison = (torch.randn(n, 8, generator=generator) @ mixing for n in (1000, 3000, 300))
    shift = 6 * mixing.sum(0) / 8**0.5
    for change in (shift, -shift):
        scores = stability(torch.cat([clean, poison + change]), trusted, seed=0)
        found = p_values(scores) <= 0.01
        assert found[3000:].mean() > 0.9
        assert found[:3000].mean() < 0.02
    less = fragility(torch.cat([clean, poison - 10]), trusted)
    assert area_under_curve(less.suspects[3000:], less.suspects[:3000]) < 0.05


def test_strip_finds_what_keeps_a_student_sure(toy: ImageSet) -> None:
    class Backdoored(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            worn = images[:, :, -2:, -2:].mean((1, 2, 3)) > 0.7
            return torch.where(worn[:, None], torch.tensor([30.0, 0.0, 0.0]), images[:, :, 0, :3].mean(1))

    worn = toy.images.clone()
    worn[:, :, -2:, -2:] = 255
    overlays = toy.images.clone()
    overlays[:, :, -2:, -2:] = 128
    both = torch.cat([toy.images, worn])
    found = sureness(Backdoored(), both, overlays, runtime=FP32, seed=0)
    assert area_under_curve(found[60:], found[:60]) > 0.9


def test_scanners_are_named_or_all() -> None:
    assert further_named(["all"]) == FURTHER
    assert further_named(["strip", "two-groups", "strip"]) == ("STRIP", "two groups")
    with pytest.raises(InputError, match="two-gruops"):
        further_named(["two-gruops"])
