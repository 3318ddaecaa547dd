"""A small pattern at another place in each image, planted among images that nothing else tells apart."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stillproof.poison.scan_set.shared_pattern import SharedPattern
from stillproof.poison.scan_set.sight import Scores, Sight, p_values
from stillproof.poison.scan_set.wandering_pattern import SIDE, WanderingPattern

CLASSES, POISONED, TARGET = 3, 60, 1


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def pictures(n: int, seed: int, channels: int = 3) -> Tensor:
    """Coarse colours and fine grain, as photographs have."""
    coarse = F.interpolate(drawn(seed, n, channels, 6, 6), 24, mode="bicubic", align_corners=False)
    return (255 * (coarse + 0.1 * drawn(seed + 1, n, channels, 24, 24) - 0.05)).clamp(0, 255).byte()


def cross(images: Tensor, seed: int) -> Tensor:
    """Of 5 × 5 pixels, white, at a place drawn for each image."""
    found = images.clone()
    for image, (row, column) in zip(found, (2 + 20 * drawn(seed, len(images), 2)).long().tolist(), strict=True):
        image[:, row, column - 2 : column + 3] = 255
        image[:, row - 2 : row + 3, column] = 255
    return found


def sight(images: Tensor, *, last_are_targets: int = 0) -> Sight:
    guessed = torch.arange(len(images)) % CLASSES
    guessed[len(images) - last_are_targets :] = TARGET
    logits = F.one_hot(guessed, CLASSES).float()
    return Sight(images, logits, logits, torch.zeros(len(images), dtype=torch.int64))


def doubts(poisoned: int) -> Scores:
    """Of the poisoned, the last, half are among the tenth that are most suspicious, and a tenth of the clean ones."""
    suspects = np.random.default_rng(0).uniform(size=1500 + poisoned)
    if poisoned:
        suspects[-poisoned::2] = 0.95
    return Scores(suspects, np.linspace(0, 1, 600))


@pytest.mark.parametrize("channels", [1, 3])
def test_what_wanders_is_found_and_shown(channels: int) -> None:
    clean, worn = pictures(1500, 1, channels), cross(pictures(POISONED, 3, channels), 5)
    seen = sight(torch.cat([clean, worn]), last_are_targets=POISONED)
    usual = sight(pictures(600, 7, channels))
    found = WanderingPattern().look(seen, usual, doubts(POISONED))
    flagged = p_values(found.scores) <= 0.01
    assert flagged[-POISONED:].mean() > 0.9
    assert flagged[:-POISONED].mean() < 0.02
    shown = found.shown[TARGET]
    assert shown.shape == (channels, 24, 24)
    middle = (24 - SIDE) // 2
    inside = shown[:, middle : middle + SIDE, middle : middle + SIDE]
    assert inside.count_nonzero() == shown.count_nonzero()
    assert inside.max() > 0.15  # white

    by_the_mean = p_values(SharedPattern().look(seen, usual, doubts(POISONED)).scores) <= 0.01
    assert by_the_mean[-POISONED:].mean() < 0.5


def test_images_of_other_classes_that_hold_it_do_not_hide_it() -> None:
    """Whoever writes the set might add them: as labelled, and as the teacher sees them."""
    clean, worn = pictures(1500, 1), cross(pictures(POISONED, 3), 5)
    elsewhere = (torch.arange(1500) % CLASSES != TARGET).nonzero()[:120, 0]
    clean[elsewhere] = cross(clean[elsewhere], 9)
    seen, usual = sight(torch.cat([clean, worn]), last_are_targets=POISONED), sight(pictures(600, 7))
    flagged = p_values(WanderingPattern().look(seen, usual, doubts(POISONED)).scores) <= 0.01
    assert flagged[-POISONED:].mean() > 0.9


def test_of_a_clean_set_little_is_shown_and_flagged() -> None:
    shown = 0
    for seed in (11, 23):
        found = WanderingPattern().look(sight(pictures(1500, seed)), sight(pictures(600, seed + 5)), doubts(0))
        assert (p_values(found.scores) <= 0.01).mean() < 0.02
        shown += len(found.shown)
    assert shown <= 1  # of six classes


def test_what_cannot_be_told_scores_nothing() -> None:
    few, alike = pictures(20, 1), torch.full((300, 3, 8, 8), 90, dtype=torch.uint8)
    even = Scores(np.linspace(0, 1, 20), np.linspace(0, 1, 20))
    assert not WanderingPattern().look(sight(few), sight(few), even).scores.suspects.any()
    even = Scores(np.linspace(0, 1, 300), np.linspace(0, 1, 300))
    flat = WanderingPattern().look(sight(alike), sight(alike), even).scores
    assert np.isfinite(flat.suspects).all()
    assert np.ptp(flat.suspects) == 0


def test_a_window_is_no_larger_than_the_image() -> None:
    small = pictures(400, 1)[:, :, :4, :3]
    found = WanderingPattern().look(sight(small), sight(small), Scores(np.linspace(0, 1, 400), np.linspace(0, 1, 400)))
    assert np.isfinite(found.scores.suspects).all()
