"""Folders of pictures and Hugging Face data sets: the same pixels as were written, and one clear error."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stillproof.core.sources import open_source
from stillproof.errors import InputError

PIXELS = np.random.default_rng(1).integers(0, 256, (20, 9, 8, 3), dtype=np.uint8)
CLASSES = ("cat", "dog")


def write_folder(root: Path, rows: range, suffix: str = "png") -> None:
    for row in rows:
        folder = root / CLASSES[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[row]).save(folder / f"{row:02}.{suffix}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "train", range(12))
    write_folder(tmp_path / "val", range(12, 20))
    return tmp_path


def test_a_folder_of_pictures_comes_back_pixel_by_pixel(folder: Path) -> None:
    (folder / "train" / "cat" / "Thumbs.db").write_bytes(b"no picture")
    source = open_source(str(folder))
    train, test = source.load()
    assert (train.classes, source.facts()) == (CLASSES, (12, 8, 2))
    assert train.known_labels().tolist() == [0] * 6 + [1] * 6
    written = PIXELS[[*range(0, 12, 2), *range(1, 12, 2)]].transpose(0, 3, 1, 2)
    assert torch.equal(train.images, torch.from_numpy(written))
    assert len(test) == 8


def test_a_folder_without_a_test_set_gives_up_thirty_percent_of_each_class(tmp_path: Path) -> None:
    write_folder(tmp_path, range(20))
    train, test = open_source(str(tmp_path)).load()
    assert train.known_labels().bincount().tolist() == [7, 7]
    assert test.known_labels().bincount().tolist() == [3, 3]


def test_a_folders_identity_follows_content_and_options(folder: Path) -> None:
    before = open_source(str(folder)).identity()
    assert open_source(f"{folder}?size=8").identity() != before
    Image.fromarray(PIXELS[3]).save(folder / "train" / "cat" / "00.png")
    assert open_source(str(folder)).identity() != before


def test_pictures_of_any_size_are_scaled_and_cropped_where_that_is_asked_for(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number, picture in enumerate((wide, wide.transpose(1, 0, 2), wide[:, 20:40], np.repeat(wide, 2, axis=0))):
            Image.fromarray(picture).save(tmp_path / name / f"{number}.png")
    with pytest.raises(InputError, match=r"sizes differ: \(20, 60\) in the first, .*\.png(.|\n)*\?size="):
        open_source(str(tmp_path)).load()
    train, _ = open_source(f"{tmp_path}?size=10").load()
    assert train.shape == (3, 10, 10)
    assert all((image[:, 2:-2, 2:-2] == 200).all() for image in train.images[:2])


def test_what_is_wrong_with_a_folder_is_named(folder: Path) -> None:
    (folder / "train" / "dog" / "01.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    with pytest.raises(InputError, match=r"cannot be decoded(.|\n)*dog/01\.png"):
        open_source(str(folder)).load()
    (folder / "train" / "eel").mkdir()
    with pytest.raises(InputError, match=r"the class 'eel' has no pictures"):
        open_source(str(folder)).facts()
    Image.fromarray(PIXELS[0]).save(folder / "train" / "eel" / "x.png")
    with pytest.raises(InputError, match="not the same classes: eel"):
        open_source(str(folder)).facts()
    for left in (folder / "val").rglob("*.png"):
        left.unlink()
    (folder / "val").rename(folder / "elsewhere")
    with pytest.raises(InputError, match=r"a folder train/ and none of test/"):
        open_source(str(folder)).facts()
    with pytest.raises(InputError, match=r"0 folders of pictures, and no parquet"):
        open_source(str(folder / "train" / "cat")).facts()


def save_dataset(path: Path) -> str:
    datasets = pytest.importorskip("datasets")

    def rows(numbers: range) -> object:
        pictures = []
        for row in numbers:
            stream = io.BytesIO()
            Image.fromarray(PIXELS[row]).save(stream, "PNG")
            pictures.append({"bytes": stream.getvalue(), "path": None})
        features = datasets.Features({"pic": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))})
        return datasets.Dataset.from_dict({"pic": pictures, "kind": [row % 2 for row in numbers]}, features=features)

    datasets.DatasetDict({"train": rows(range(12)), "validation": rows(range(12, 20))}).save_to_disk(str(path))
    return str(path)


@pytest.mark.filterwarnings("default")
def test_a_saved_hugging_face_data_set_comes_back_pixel_by_pixel(tmp_path: Path) -> None:
    source = open_source(save_dataset(tmp_path / "saved"))
    train, test = source.load()
    assert torch.equal(train.images, torch.from_numpy(PIXELS[:12].transpose(0, 3, 1, 2)))
    assert (train.classes, source.facts(), test.known_labels().tolist()) == (CLASSES, (12, 8, 2), [0, 1] * 4)
    assert source.identity() == open_source(save_dataset(tmp_path / "again")).identity()
    with pytest.raises(InputError, match=r"has the splits train, validation(.|\n)*\?train=SPLIT"):
        open_source(f"{tmp_path / 'saved'}?test=none").facts()
    with pytest.raises(InputError, match=r"has the columns pic, kind(.|\n)*\?image=COLUMN"):
        open_source(f"{tmp_path / 'saved'}?image=img").facts()


@pytest.mark.filterwarnings("default")
def test_a_data_set_that_cannot_be_had_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurt = Path(save_dataset(tmp_path / "hurt"))
    for file in hurt.rglob("*.arrow"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match=r"hurt cannot be read(.|\n)*complete"):
        open_source(str(hurt)).facts()
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"the data set nobody/nothing cannot be read(.|\n)*network"):
        open_source("hf:nobody/nothing").facts()


def test_floats_are_rounded_and_the_loss_is_told(tmp_path: Path) -> None:
    exact, finer = PIXELS / np.float32(255), np.random.default_rng(0).random((20, 8, 8, 3))
    for name, images in (("exact", exact), ("finer", finer)):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(20) % 2)
    assert open_source(str(tmp_path / "exact.npz")).open().notes == ()
    (note,) = open_source(str(tmp_path / "finer.npz")).open().notes
    assert "no pixel changed by more than 0.00" in note


def test_grey_is_made_of_colour_where_that_is_asked_for(folder: Path) -> None:
    train, _ = open_source(f"{folder}?channels=1").load()
    assert train.shape == (1, 9, 8)


def test_a_folder_with_too_few_pictures_for_a_test_set_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, range(2))
    with pytest.raises(InputError, match="too few images for a training and a test set"):
        open_source(str(tmp_path)).facts()


@pytest.mark.filterwarnings("default")
def test_other_names_for_the_test_classes_are_an_error(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = Path(save_dataset(tmp_path / "saved"))
    both = datasets.load_from_disk(str(saved))
    swapped = both["validation"].cast_column("kind", datasets.ClassLabel(names=["dog", "cat"]))
    datasets.DatasetDict({"train": both["train"], "test": swapped}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(InputError, match="name their classes differently"):
        open_source(str(tmp_path / "other")).facts()


@pytest.mark.filterwarnings("default")
def test_pictures_outside_a_data_set_are_part_of_its_identity(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_folder(tmp_path / "pictures", range(20))
    paths = sorted(str(path) for path in (tmp_path / "pictures").rglob("*.png"))
    features = datasets.Features({"pic": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))})
    labels = [int("dog" in path) for path in paths]

    def identity(name: str) -> object:
        made = datasets.Dataset.from_dict({"pic": paths, "kind": labels}, features=features)
        made.save_to_disk(str(tmp_path / name))
        return open_source(str(tmp_path / name)).identity()

    before = identity("before")
    Image.fromarray(PIXELS[5]).save(paths[0])
    assert identity("after") != before
