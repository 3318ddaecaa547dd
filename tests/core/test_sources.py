"""Sources: what is read is what was written, and what cannot be read is one clear error."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from stillproof.core.images import ImageSet
from stillproof.core.sources import DataSource, open_source
from stillproof.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 10, 8, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path: Path, rows: list[bytes], labels: list[int], names: list[str] | None = None) -> None:
    images = pa.array([{"bytes": row, "path": None} for row in rows])
    features = {"label": {"names": names, "_type": "ClassLabel"}} if names else {}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table({"img": images, "label": labels}).replace_schema_metadata(metadata), path)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for split, share in (("train", slice(0, 20)), ("test", slice(20, 30))):
        rows = [encoded(pixels) for pixels in PIXELS[share]]
        write_parquet(tmp_path / f"{split}.parquet", rows, [i % 2 for i in range(len(rows))], ["cat", "</script>"])
    return tmp_path


def test_parquet_images_come_back_pixel_by_pixel(directory: Path) -> None:
    source = open_source(str(directory))
    train, test = source.load()
    assert torch.equal(train.images, torch.from_numpy(PIXELS[:20].transpose(0, 3, 1, 2)))
    assert test.known_labels().tolist() == [0, 1] * 5
    assert train.classes == ("cat", "</script>")
    assert source.facts() == (20, 10, 2)


def test_grey_images_have_one_channel_and_unnamed_classes_are_numbered(directory: Path) -> None:
    for split in ("train", "test"):
        write_parquet(directory / f"{split}.parquet", [encoded(p[..., 0]) for p in PIXELS[:4]], [0, 1, 2, 0])
    source = open_source(str(directory))
    assert source.facts().classes == 3
    assert source.load().train.shape == (1, 10, 8)
    assert source.load().train.classes == ("0", "1", "2")


def test_identity_follows_the_content_not_the_place(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = open_source(str(directory)).identity()
    moved = tmp_path_factory.mktemp("moved")
    for file in directory.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert open_source(str(moved)).identity() == before
    write_parquet(moved / "test.parquet", [encoded(PIXELS[0])], [0])
    assert open_source(str(moved)).identity() != before


def test_a_truncated_parquet_file_is_named(directory: Path) -> None:
    file = directory / "train.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"train.parquet is not a readable parquet file(.|\n)*truncated"):
        open_source(str(directory)).load()


def test_broken_rows_are_named(directory: Path) -> None:
    rows = [encoded(pixels) for pixels in PIXELS[:3]]
    write_parquet(directory / "train.parquet", [*rows, rows[0][:40]], [0, 1, 0, 1])
    with pytest.raises(InputError, match="row 3"):
        open_source(str(directory)).load()
    write_parquet(directory / "train.parquet", [*rows, encoded(PIXELS[0, :5])], [0, 1, 0, 1])
    with pytest.raises(InputError, match=r"sizes differ: \(10, 8\) in the first, \(5, 8\) in .*row 3(.|\n)*\?size="):
        open_source(str(directory)).load()
    write_parquet(directory / "train.parquet", rows, [0, 1, 2], ["cat", "dog"])
    with pytest.raises(InputError, match="name their classes differently: cat, dog and cat, </script>"):
        open_source(str(directory)).load()
    write_parquet(directory / "train.parquet", rows, [0, 1, 2], ["cat", "</script>"])
    with pytest.raises(InputError, match="out of range: 0 to 2"):
        open_source(str(directory)).load()


def test_only_pictures_of_8_bits_are_decoded(directory: Path) -> None:
    rows = [encoded(pixels) for pixels in PIXELS[:2]]
    deep = io.BytesIO()
    Image.fromarray(np.full((10, 8), 30_000, np.uint16)).save(deep, "PNG")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 10\n%%EndComments\nshowpage\n"
    for row, said in ((deep.getvalue(), "more than 8 bits"), (script, "cannot be decoded"), (None, "no image")):
        write_parquet(directory / "train.parquet", [*rows, row], [0, 1, 0])  # type: ignore[list-item]
        with pytest.raises(InputError, match=rf"{said}(.|\n)*row 2"):
            open_source(str(directory)).load()


def test_grey_and_colour_are_not_mixed_in_silence(directory: Path) -> None:
    rows = [encoded(PIXELS[0, ..., 0]), encoded(PIXELS[1])]
    write_parquet(directory / "train.parquet", rows, [0, 1])
    with pytest.raises(InputError, match=r"training images are \(1, 10, 8\) and test images \(3, 10, 8\)"):
        open_source(str(directory)).load()
    write_parquet(directory / "test.parquet", rows, [0, 1])
    with pytest.raises(InputError, match=r"first image is grey, and .*row 1 is in colour(.|\n)*\?channels="):
        open_source(str(directory)).load()
    train, test = open_source(f"{directory}?channels=3").load()
    assert train.shape == test.shape == (3, 10, 8)
    assert torch.equal(train.images[0, 0], train.images[0, 2])


def test_a_picture_that_would_fill_memory_is_refused_before_it_is_unpacked(directory: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    write_parquet(directory / "train.parquet", [bomb.getvalue()], [0])
    with pytest.raises(InputError, match=r"9000×9000 pixels is refused .*row 0"):
        open_source(f"{directory}?size=8").load()


def test_any_rows_can_be_read_across_files_and_row_groups(tmp_path: Path) -> None:
    rows = [encoded(pixels) for pixels in PIXELS]
    for number, share in enumerate((slice(0, 11), slice(11, 20), slice(20, 30))):
        images = pa.array([{"bytes": row, "path": None} for row in rows[share]])
        table = pa.table({"img": images, "label": [i % 2 for i in range(len(images))]})
        pq.write_table(table, tmp_path / f"train-{number}.parquet", row_group_size=4)
    write_parquet(tmp_path / "test.parquet", rows[:2], [0, 1])
    train = open_source(str(tmp_path)).open().train
    wanted = torch.tensor([0, 3, 4, 10, 11, 19, 28, 29])
    assert torch.equal(torch.cat(list(train.read(wanted))), torch.from_numpy(PIXELS[wanted].transpose(0, 3, 1, 2)))


def test_columns_that_hold_no_images_or_no_rows_are_named(directory: Path) -> None:
    for images in (["a", "b"], [[1], [2]]):
        pq.write_table(pa.table({"img": images, "label": [0, 1]}), directory / "train.parquet")
        with pytest.raises(InputError, match="the column 'img'"):
            open_source(str(directory)).load()
    write_parquet(directory / "train.parquet", [], [])
    with pytest.raises(InputError, match="0 training and 10 test images"):
        open_source(str(directory)).facts()


def test_only_the_labels_in_play_decide_the_classes(tmp_path: Path) -> None:
    more = {"y_mean": np.array([7.5]), "coarse_labels": np.arange(30)}
    path = save(tmp_path / "x.npz", images=PIXELS, labels=np.arange(30) % 4, **more)
    assert open_source(path).facts().classes == 4


def test_missing_splits_and_columns_are_named(directory: Path) -> None:
    with pytest.raises(InputError, match=r"no image column picture; it has img, label(.|\n)*\?image=COLUMN"):
        open_source(f"{directory}?image=picture").facts()
    (directory / "test.parquet").unlink()
    with pytest.raises(InputError, match=r"no test\*.parquet"):
        open_source(str(directory)).facts()


def save(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_npz_in_any_usual_layout_is_the_same_data(tmp_path: Path) -> None:
    labels = np.arange(30) % 3
    last = save(tmp_path / "a.npz", images=PIXELS, labels=labels)
    first = save(tmp_path / "b.npz", images=PIXELS.transpose(0, 3, 1, 2), labels=labels)
    floats = save(tmp_path / "c.npz", images=PIXELS / 255.0, labels=labels)
    loaded = [open_source(path).load() for path in (last, first, floats)]
    assert all(torch.equal(other.train.images, loaded[0].train.images) for other in loaded)
    assert len(loaded[0].train) + len(loaded[0].test) == 30
    assert open_source(last).facts().classes == 3


def test_npz_with_its_own_test_set_keeps_it(tmp_path: Path) -> None:
    grey = PIXELS[..., 0]
    path = save(
        tmp_path / "k.npz", x_train=grey[:20], y_train=np.arange(20) % 2, x_test=grey[20:], y_test=np.ones(10, int)
    )
    train, test = open_source(path).load()
    assert (len(train), len(test), train.shape) == (20, 10, (1, 10, 8))


class Loud:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("executed"),))


def test_object_arrays_are_refused_and_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.empty(3, dtype=object)
    images[:] = [Loud(), Loud(), Loud()]
    path = save(tmp_path / "evil.npz", images=images, labels=np.arange(3))
    with pytest.raises(InputError, match="nothing was executed"):
        open_source(path).load()
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": (PIXELS / 255.0 - 0.5) / 0.25, "labels": np.arange(30) % 2}, "look normalised"),
        ({"images": PIXELS * 1.0, "labels": np.arange(30) % 2}, r"outside \[0, 1\]"),
        ({"images": np.full((4, 8, 8), np.nan), "labels": np.arange(4)}, r"outside \[0, 1\]"),
        ({"images": PIXELS, "labels": np.arange(30) / 2}, "whole numbers"),
        ({"images": PIXELS, "labels": np.arange(29)}, "for 30 images"),
        ({"images": PIXELS[0, 0], "labels": np.arange(8)}, "has the shape"),
        ({"pictures": PIXELS}, "holds pictures"),
        ({"images": PIXELS, "labels": np.arange(30) - 1}, "out of range"),
    ],
)
def test_unusable_npz_says_what_and_what_next(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_source(save(tmp_path / "bad.npz", **arrays)).load()


def test_a_truncated_npz_and_a_missing_path_are_named(tmp_path: Path) -> None:
    path = Path(save(tmp_path / "x.npz", images=PIXELS, labels=np.arange(30) % 2))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="cannot be read"):
        open_source(str(path)).load()
    with pytest.raises(InputError, match="no file"):
        open_source(str(tmp_path / "none.npz"))
    with pytest.raises(InputError, match="no data at"):
        open_source(str(tmp_path / "none"))


def make_source(n: int = 40) -> DataSource:
    images = ImageSet(torch.zeros(n, 1, 8, 8, dtype=torch.uint8), torch.arange(n) % 2, ("a", "b"), "made")
    return DataSource(images, images)


def make_nonsense() -> str:
    return "nonsense"


def test_user_code_is_called_with_its_options() -> None:
    assert open_source(f"{__name__}:make_source?n=12").facts() == (12, 12, 2)
    with pytest.raises(InputError, match="returned str"):
        open_source(f"{__name__}:make_nonsense").load()


def test_digits_are_carved_once_and_for_all(digits: DataSource) -> None:
    facts = open_source("digits").facts()
    assert (len(digits.train), len(digits.test), len(digits.train.classes)) == facts
    assert int(digits.train.images.max()) == 255


def test_the_real_cifar10_is_read(cifar10: Path) -> None:
    source = open_source(str(cifar10))
    assert source.facts() == (50_000, 10_000, 10)
    rows = pq.ParquetFile(cifar10 / "test.parquet").read_row_group(0)
    first = np.asarray(Image.open(io.BytesIO(rows.column("img")[0].as_py()["bytes"])))
    test = source.load().test
    assert np.array_equal(test.images[0].permute(1, 2, 0).numpy(), first)
    assert test.known_labels().bincount().tolist() == [1000] * 10
    assert test.classes[0] == "airplane"
