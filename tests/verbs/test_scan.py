"""poison and scan end to end through the command line's own path: what one writes, the other reads and cleans."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillproof import InputError, Result, RunOptions, run
from stillproof.core.classifiers import Model
from stillproof.core.distillation import CrossEntropy
from stillproof.core.images import ImageSet
from stillproof.core.runtime import Runtime
from stillproof.core.sources import DataSource
from stillproof.core.training import Recipe, fit
from stillproof.core.weights import save_classifier
from stillproof.poison.further_scanning import FURTHER


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a poisoning."""
    root = tmp_path_factory.mktemp("poison")
    run(
        "poison",
        RunOptions(runs=root / "runs", store=str(root / "store")),
        profile="smoke",
        data="digits",
        teacher="zoo:cnn?width=16",
        student="zoo:cnn?width=8",
        trigger="patch?size=3&pattern=white",
        threat="linf:0.2",
        target=1,
        rate=0.1,
        epochs=20,
        seeds=1,
        controls=False,
    )
    (found,) = (root / "runs").iterdir()
    return found


def test_further_scanners_are_reported_beside_and_have_no_say(tmp_path: Path, planted: Path) -> None:
    plain, _ = scan(tmp_path / "plain", planted)
    result, _ = scan(tmp_path / "more", planted, also=("all",))
    rows = {row[0] for table in result.tables if table.title == "Scanners" for row in table.rows}
    assert rows == {"agreement", "shared pattern", "wandering pattern", "combined", *FURTHER}
    assert result.findings == plain.findings
    with pytest.raises(InputError, match="no further scanner 'strp'"):
        scan(tmp_path / "wrong", planted, also=("strp",))


def scan(place: Path, planted: Path, **given: Any) -> tuple[Result, Path]:
    chosen = {
        "transfer_set": str(planted / "sets/poisoned.npz"),
        "teacher": str(planted / "models/teacher.safetensors"),
    }
    options = RunOptions(runs=place / "runs", store=str(place / "store"))
    result = run("scan", options, **({"profile": "smoke", "epochs": 20} | chosen | given))
    (found,) = (place / "runs").iterdir()
    return result, found


def test_a_poisoned_set_is_marked_as_such(planted: Path) -> None:
    manifest = json.loads((planted / "sets/poisoned.json").read_text())
    held = np.load(planted / "sets/poisoned.npz")
    assert "POISONED" in manifest["what"]
    assert len(manifest["poisoned_rows"]) / len(held["train_images"]) == pytest.approx(0.1, abs=0.005)
    assert (held["train_labels"][manifest["poisoned_rows"]] == 1).all()


def test_what_poison_writes_scan_finds_and_leaves_a_cleaned_set_beside_it(tmp_path: Path, planted: Path) -> None:
    before = (planted / "sets/poisoned.npz").read_bytes()
    result, directory = scan(tmp_path, planted)
    assert [(f.rule, f.status) for f in result.findings] == [("SP-P2", "fail")]
    planted_rows = set(json.loads((planted / "sets/poisoned.json").read_text())["poisoned_rows"])
    manifest = json.loads((directory / "sets/cleaned.json").read_text())
    flagged = set(manifest["flagged"])
    assert len(flagged & planted_rows) > 0.85 * len(planted_rows)
    assert len(flagged - planted_rows) < 0.04 * 1000
    cleaned, poisoned = np.load(directory / "sets/cleaned.npz"), np.load(planted / "sets/poisoned.npz")
    assert np.array_equal(cleaned["train_images"], poisoned["train_images"][manifest["rows"]])
    assert np.array_equal(cleaned["test_images"], poisoned["test_images"])
    assert "flagged" in str(cleaned["what"])
    assert (planted / "sets/poisoned.npz").read_bytes() == before
    assert result.images


@pytest.mark.parametrize(("name", "is_backdoored"), [("clean", False), ("poisoned", True)])
def test_a_student_is_scanned_relative_to_its_teacher(
    tmp_path: Path, planted: Path, name: str, is_backdoored: bool
) -> None:
    student = str(planted / f"models/student-{name}.safetensors")
    result, _ = scan(tmp_path, planted, student=student, inversion_epochs=1)
    assert [f.rule for f in result.findings] == ["SP-P2", "SP-P3"]
    assert (result.findings[1].status == "fail") is is_backdoored
    assert {"Triggers of the bank", "Changes that were sought"} <= {table.title for table in result.tables}


def test_a_manifest_names_the_rows_of_the_file(tmp_path: Path, planted: Path) -> None:
    held = np.load(planted / "sets/poisoned.npz")
    order = np.random.default_rng(0).permutation(len(held["train_images"]))
    np.savez(tmp_path / "plain.npz", images=held["train_images"][order], labels=held["train_labels"][order])
    _, directory = scan(tmp_path, planted, transfer_set=str(tmp_path / "plain.npz"), trusted="digits")
    manifest = json.loads((directory / "sets/cleaned.json").read_text())
    cleaned = np.load(directory / "sets/cleaned.npz")["images"]
    assert np.array_equal(cleaned[:, 0], held["train_images"][order][manifest["rows"]][:, 0])
    assert sorted(manifest["rows"] + manifest["flagged"]) == list(range(len(order)))
    assert min(manifest["p_of_rows"]) > manifest["false_alarms"] >= max(manifest["p_of_flagged"])


def test_what_is_said_of_a_part_of_a_set_is_said_to_be_of_a_part(tmp_path: Path, planted: Path) -> None:
    result, directory = scan(tmp_path, planted, transfer_set="digits", limit=1000)
    assert any(note.startswith("1000 images of 1258") for note in result.notes)
    assert json.loads((directory / "sets/cleaned.json").read_text())["looked_at"] == "1000 of 1258"


def test_trusted_images_that_are_copies_of_each_other_count_once(tmp_path: Path, planted: Path) -> None:
    with pytest.raises(InputError, match="60 trusted images are too few"):
        scan(tmp_path / "few", planted, transfer_set="digits", trusted="tests.verbs.test_scan:copied?images=60")
    copied = "tests.verbs.test_scan:copied?images=110"
    result, _ = scan(tmp_path / "more", planted, transfer_set="digits", trusted=copied, false_alarms=0.02)
    assert result.findings[0].status != "fail"  # images whose copies a reference had learnt would make all else unusual


def test_a_trusted_set_that_is_the_poisoned_one_saved_anew_shows_nothing(tmp_path: Path, planted: Path) -> None:
    held = np.load(planted / "sets/poisoned.npz")
    np.savez(tmp_path / "anew.npz", images=held["train_images"] ^ 1, labels=held["train_labels"])
    result, _ = scan(tmp_path, planted, trusted=str(tmp_path / "anew.npz"))
    assert result.findings[0].status == "inconclusive"
    assert "are trusted as well, or nearly" in " ".join(result.findings[0].evidence)


def test_a_teacher_that_has_the_backdoor_itself_is_told(tmp_path: Path, digits: DataSource, runtime: Runtime) -> None:
    images = digits.train
    worn = images.images[::8].clone()
    worn[:, :, -3:, -3:] = 255
    both = ImageSet(
        torch.cat([images.images, worn]),
        torch.cat([images.known_labels(), torch.ones(len(worn), dtype=torch.int64)]),
        images.classes,
        "poisoned by its owner",
    )
    teacher = Model("zoo:cnn?width=16").fresh(images.shape, 10, 0)
    fit(teacher, CrossEntropy(), both, recipe=Recipe.standard(15), runtime=runtime, seed=0)
    save_classifier(
        tmp_path / "teacher.safetensors",
        teacher.state_dict(),
        spec="zoo:cnn?width=16",
        shape=images.shape,
        classes=images.classes,
    )
    result = run(
        "scan",
        RunOptions(runs=tmp_path / "runs", store=str(tmp_path / "store")),
        profile="smoke",
        epochs=20,
        transfer_set="digits",
        teacher=str(tmp_path / "teacher.safetensors"),
    )
    assert [f.status for f in result.findings] == ["inconclusive"]
    said = " ".join(result.findings[0].evidence)
    assert "teacher reacts to a trigger far more" in said
    assert said.count("no longer holds") == 3
    assert any("far more" in note for note in result.notes)


def test_a_clean_set_passes_and_keeps_nearly_all(tmp_path: Path, planted: Path) -> None:
    result, directory = scan(tmp_path, planted, transfer_set="digits")
    assert [f.status for f in result.findings] == ["pass"]
    assert "it reacts to none of them" in " ".join(result.findings[0].evidence)
    assert len(json.loads((directory / "sets/cleaned.json").read_text())["flagged"]) < 0.03 * 1258


def test_a_resistant_distillation_scans_first(tmp_path: Path, planted: Path) -> None:
    brought = {"data": planted / "sets/poisoned.npz", "teacher": planted / "models/teacher.safetensors"}
    result = run(
        "distill",
        RunOptions(runs=tmp_path / "runs", store=str(tmp_path / "store")),
        profile="smoke",
        student="zoo:cnn?width=8",
        resistant=True,
        reference="zoo:cnn?width=8",
        epochs=20,
        **{name: str(path) for name, path in brought.items()},
    )
    assert [(f.rule, f.status) for f in result.findings] == [("SP-P2", "fail")]
    rows = {row[0]: row[1].value for row in result.tables[0].rows}  # type: ignore[union-attr]
    assert set(rows) == {"teacher", "student", "student of all"}
    assert rows["student"] > 0.85  # type: ignore[operator]


@pytest.mark.parametrize("more", [{"defensive": True}, {"label_mode": "online"}, {"objective": "rkd"}])
def test_what_cannot_be_distilled_resistantly_is_refused(planted: Path, more: dict[str, Any]) -> None:
    teacher = str(planted / "models/teacher.safetensors")
    with pytest.raises(InputError, match="resistant"):
        run("distill", data="digits", teacher=teacher, student="zoo:cnn", resistant=True, **more)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"teacher": "zoo:cnn"}, "has no weights"),
        ({"student": "zoo:cnn"}, "has no weights"),
        ({"false_alarms": 0.001}, "cannot set a threshold"),
        ({"trusted": "tests.verbs.test_scan:few", "false_alarms": 0.1}, "too few"),
        ({"transfer_set": "tests.verbs.test_scan:other", "trusted": "digits"}, "images of one kind"),
    ],
)
def test_what_cannot_be_scanned_is_one_clear_error(
    tmp_path: Path, planted: Path, given: dict[str, str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        scan(tmp_path, planted, **given)


def few() -> Any:
    from stillproof.core.sources import DataSource
    from stillproof.core.sources.digits import Digits

    whole = Digits().load()
    return DataSource(whole.train.subset(whole.train.per_class(5, 0)), whole.test)


def copied(images: int) -> Any:
    from stillproof.core.sources import DataSource
    from stillproof.core.sources.digits import Digits

    whole = Digits().load()
    return DataSource(whole.test.subset(torch.arange(images).repeat(5)), whole.test)


def other() -> Any:
    from dataclasses import replace

    from stillproof.core.sources import DataSource
    from stillproof.core.sources.digits import Digits

    train, test = (replace(part, images=part.images.repeat(1, 1, 2, 2)) for part in Digits().load())
    return DataSource(train, test)
