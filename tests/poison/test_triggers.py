"""Triggers: what they change, where, and what is no trigger."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stillproof.core.images import ImageSet
from stillproof.core.plugins import build, table
from stillproof.core.spec import Spec
from stillproof.errors import InputError
from stillproof.poison.codec import Codec, codec_of, parse_codec
from stillproof.poison.triggers import Blend, MovingPatch, Patch, PictureFile, Sinusoid, Trigger

IMAGES = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(20)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.zeros((8, 4, 4), np.uint8)
    pixels[:, :2] = (255, 0, 0, 255)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "logo.png")
    return tmp_path / "logo.png"


def all_triggers(picture: Path) -> list[Trigger]:
    names = {name: f"picture?path={picture}" if name == "picture" else name for name in table("trigger")}
    return [build("trigger", Spec.parse(text)) for text in names.values()]


@pytest.mark.parametrize("channels", [1, 3])
def test_every_trigger_changes_images_stays_in_range_and_does_not_depend_on_the_batch(
    picture: Path, channels: int
) -> None:
    images = IMAGES[:, :channels]
    for trigger in all_triggers(picture):
        worn = trigger(images, IDS)
        assert worn.shape == images.shape
        assert worn.min() >= 0
        assert worn.max() <= 1
        assert (worn != images).flatten(1).any(1).all()
        assert torch.equal(worn[7:9], trigger(images[7:9], IDS[7:9]))
        assert not torch.equal(trigger.other()(images, IDS), worn)


def test_a_patch_hides_what_was_under_it_and_nothing_else() -> None:
    worn = Patch(size=3, place="top-left")(IMAGES, IDS)
    assert torch.equal(worn[:, :, 3:], IMAGES[:, :, 3:])
    assert (worn[:, :, :3, :3] == worn[:1, :1, :3, :3]).all()


def test_a_moving_patch_stands_in_many_places() -> None:
    changed = (MovingPatch(size=3)(IMAGES, IDS) != IMAGES).any(1)
    places = {tuple(one.nonzero()[0].tolist()) for one in changed}
    assert len(places) > 3


def test_a_blend_and_a_sinusoid_are_what_their_papers_say() -> None:
    blended = Blend(opacity=0.25)(IMAGES, IDS)
    pattern = (blended - 0.75 * IMAGES) / 0.25
    assert torch.allclose(pattern, pattern[:1].expand_as(pattern), atol=1e-5)
    grey = torch.full((1, 1, 8, 8), 0.5)
    wave = Sinusoid(amplitude=0.1, frequency=2)(grey, IDS[:1]) - grey
    assert torch.allclose(wave[0, 0, 0], 0.1 * torch.sin(torch.arange(8) * torch.pi / 2), atol=1e-6)


def test_what_is_transparent_in_a_picture_stays_so(picture: Path) -> None:
    worn = PictureFile(path=picture, size=8)(IMAGES, IDS)
    assert torch.equal(worn[:, :, 8:, 14:], IMAGES[:, :, 8:, 14:])
    assert torch.allclose(worn[:, 0, 8:, 12], torch.ones(20, 8))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("patch?size=16", "is no trigger"),
        ("blend?opacity=0", "is no trigger"),
        ("moving-patch?places=1", "does not move"),
        ("picture?path=/no/such.png", "cannot be read"),
        ("pacth", "Did you mean 'patch'"),
    ],
)
def test_what_is_no_trigger_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build("trigger", Spec.parse(text))(IMAGES, IDS)


def natural(seed: int = 0) -> ImageSet:
    """Smooth colour images of 32×32, as no codec has left them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(64, 3, 6, 6, generator=generator)
    fine = 0.05 * torch.rand(64, 3, 32, 32, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 0.95) + fine
    return ImageSet((smooth * 255).to(torch.uint8), None, ("a", "b"), "natural")


@pytest.mark.parametrize("quality", [60, 75, 90])
def test_the_codec_of_a_set_is_recognised(quality: int) -> None:
    raw = natural()
    stored = ImageSet(Codec(quality)(raw.images), None, raw.classes, "stored")
    assert codec_of(stored) == Codec(quality)
    assert codec_of(raw) == Codec()


def test_a_codec_has_a_name() -> None:
    assert (parse_codec("auto"), parse_codec("none"), parse_codec("jpeg:75")) == (None, Codec(), Codec(75))
    for wrong in ("jpeg", "png:3", "jpeg:x", "jpeg:0"):
        with pytest.raises(InputError):
            parse_codec(wrong)
