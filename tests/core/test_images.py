"""ImageSet and augmentation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillproof.core.images import Augmentation, ImageSet, as_float, augmentation_for, check_range
from stillproof.core.noise import Noise
from stillproof.errors import InputError


def test_per_class_takes_n_of_each_and_another_seed_takes_others(toy: ImageSet) -> None:
    rows = toy.per_class(7, seed=0)
    assert toy.subset(rows).known_labels().bincount().tolist() == [7, 7, 7]
    assert rows.equal(rows.unique())
    assert not rows.equal(toy.per_class(7, seed=1))
    with pytest.raises(InputError, match="at most 20/class"):
        toy.per_class(21, seed=0)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.integers(0, 99))
def test_split_is_disjoint_and_keeps_shares_in_every_class(weights: list[float], seed: int) -> None:
    images = ImageSet(torch.zeros(120, 1, 8, 8, dtype=torch.uint8), torch.arange(120) % 3, ("a", "b", "c"), "x")
    shares = tuple(weight / sum(weights) for weight in weights)
    parts = images.split(shares, seed)
    assert torch.cat(parts).sort().values.equal(torch.arange(120))
    for part, share in zip(parts, shares, strict=True):
        counts = images.known_labels()[part].bincount(minlength=3)
        assert ((counts - 40 * share).abs() <= len(parts)).all()
        assert (counts > 0).all()


@given(st.integers(1, 30), st.integers(1, 4))
def test_no_part_is_empty_that_need_not_be(each: int, parts: int) -> None:
    images = ImageSet(
        torch.zeros(2 * each, 1, 8, 8, dtype=torch.uint8), torch.arange(2 * each) % 2, ("a", "b"), "small"
    )
    split = images.split((1 - 0.1 * (parts - 1), *[0.1] * (parts - 1)), seed=0)
    assert torch.cat(split).sort().values.equal(torch.arange(2 * each))
    assert all(len(part) >= 2 for part in split) == (each >= parts)


def test_fingerprint_changes_with_any_pixel_label_or_name(toy: ImageSet) -> None:
    seen = {toy.fingerprint()}
    pixel = toy.images.clone()
    pixel[59, 2, 7, 7] += 1
    labels = toy.known_labels().clone()
    labels[0] = 2
    for other in (
        ImageSet(pixel, toy.labels, toy.classes, "toy"),
        ImageSet(toy.images, labels, toy.classes, "toy"),
        ImageSet(toy.images, toy.labels, ("a", "b", "z"), "toy"),
        ImageSet(toy.images, None, toy.classes, "toy"),
    ):
        seen.add(other.fingerprint())
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (torch.zeros(2, 3, 8, 8), None, "float32"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), None, "transposed"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), None, "no images"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 2]), "out of range: 0 to 2"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([-1, 0]), "out of range"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0]), "for 2 images"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0.0, 1.0]), "int64"),
    ],
)
def test_what_does_not_fit_together_is_refused(images: torch.Tensor, labels: torch.Tensor | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ImageSet(images, labels, ("a", "b"), "bad")


def test_augmentation_is_shift_and_mirror_of_each_image(toy: ImageSet) -> None:
    augmentation = Augmentation(shift=2, flip=True)
    noise = Noise(11, torch.arange(60), 4)
    moved = 2 + noise.integers(-2, 3, (2,), stream="shift")
    padded = torch.nn.functional.pad(toy.images.float(), [2, 2, 2, 2], mode="reflect").to(torch.uint8)
    mirrored = []
    for epoch in (0, 1):
        out = augmentation(toy.images, noise, epoch)
        for index in range(60):
            row, column = moved[index].tolist()
            expected = padded[index, :, row : row + 8, column : column + 8]
            mirrored.append(torch.equal(out[index], expected.flip(2)))
            assert mirrored[-1] or torch.equal(out[index], expected)
    assert 10 < sum(mirrored[:60]) < 50
    assert all(first != second for first, second in zip(mirrored[:60], mirrored[60:], strict=True))


def test_grey_images_are_not_mirrored(toy: ImageSet) -> None:
    assert augmentation_for(toy) == Augmentation(shift=1, flip=True)
    grey = ImageSet(toy.images[:, :1], toy.labels, toy.classes, "grey")
    assert augmentation_for(grey) == Augmentation(shift=1, flip=False)
    still = Augmentation(shift=0, flip=False)(toy.images, Noise(0, torch.arange(60), 0), 0)
    assert torch.equal(still, toy.images)


def test_float_images_span_zero_to_one_and_a_bad_range_names_the_cause() -> None:
    assert as_float(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).flatten().tolist() == [0.0, 1.0]
    check_range(0.0, 1.0, "here")
    with pytest.raises(InputError, match=r"min -2.12, max 2.64 \(batch 0\)(.|\n)*look normalised(.|\n)*normalised\("):
        check_range(-2.12, 2.64, "batch 0")
    with pytest.raises(InputError, match="Divide by the largest"):
        check_range(0.0, 255.0, "batch 0")
    with pytest.raises(InputError):
        check_range(float("nan"), float("nan"), "batch 0")
