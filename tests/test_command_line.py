"""The command line as a person meets it: exit codes, one clear message, layers of settings, nothing executed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from stillproof import cli
from stillproof.runs.config import NO_SPEC, refuse_code
from stillproof.runs.options import RunOptions
from stillproof.verbs import VERBS, verb_named

ROOT = Path(__file__).parent.parent

TINY = [
    "--data=digits", "--limit=200", "--victim=zoo:cnn?width=3", "--thief-model=zoo:cnn?width=3", "--thief=label-only",
    "--queries=2/class", "--seeds=1", "--epochs=1", "--thief-epochs=1", "--no-labels",
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    for name in [name for name in os.environ if name.startswith("STILLPROOF_")]:
        monkeypatch.delenv(name)
    return tmp_path


def stillproof(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stillproof", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one message on stderr; stdout stays empty."""
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if not line.startswith(" ")]) == 1, err
    return err


def test_help_needs_no_torch_and_no_numpy() -> None:
    script = (
        "import sys; from stillproof.cli import run; code = run(['--help']);"
        "run(['steal', '--help']); assert not {'torch', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("steal", "harden", "distill", "audit", "poison", "scan", "demo", "report", "resume", "list", "doctor"):
        assert verb in done.stdout


def save_npz(name: str, **arrays: Any) -> str:
    np.savez(name, **arrays)
    return f"--data={name}"


PIXELS = np.zeros((200, 8, 8), np.uint8)


class Loud:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("executed"),))


def object_arrays() -> str:
    images = np.empty(2, dtype=object)
    images[:] = [Loud(), Loud()]
    return save_npz("o.npz", images=images, labels=np.arange(2))


def truncated_parquet() -> str:
    Path("p").mkdir()
    for split in ("train", "test"):
        Path(f"p/{split}.parquet").write_bytes(b"PAR1 and no more")
    return "--data=p"


def hostile_pickle() -> str:
    torch.save({"w": Loud()}, "evil.pt")
    return "--victim=zoo:cnn?weights=evil.pt"


def bare_array() -> str:
    with Path("a.npz").open("wb") as stream:
        np.save(stream, PIXELS)
    return "--data=a.npz"


BAD_INPUT = {
    "missing file": (lambda: "--data=nowhere.npz", "no file nowhere.npz"),
    "missing place": (lambda: "--data=nowhere", "no data at 'nowhere'"),
    "truncated parquet": (truncated_parquet, "not a readable parquet"),
    "object arrays": (object_arrays, "nothing was executed"),
    "labels out of range": (
        lambda: save_npz("l.npz", images=PIXELS, labels=np.arange(200) % 3, classes=np.array(["a", "b"])),
        "out of range",
    ),
    "already normalised": (
        lambda: save_npz("n.npz", images=PIXELS - 1.0, labels=np.arange(200) % 2),
        "look normalised",
    ),
    "not in [0, 1]": (lambda: save_npz("n.npz", images=PIXELS + 255.0, labels=np.arange(200) % 2), "outside [0, 1]"),
    "NaN outputs": (lambda: "--victim=tests.victims:nan_outputs", "returns NaN"),
    "wrong classes": (lambda: "--victim=tests.victims:seven_classes", "returns 7 classes, and 'digits"),
    "hostile pickle": (hostile_pickle, "nothing in it was executed"),
    "unknown thief model": (lambda: "--thief-model=zoo:nosuch", "no model named 'nosuch'"),
    "unknown option of a thief model": (lambda: "--thief-model=zoo:cnn?wdith=3", "Did you mean 'width'"),
    "no thief": (lambda: "--thief=,", "no thief takes part"),
    "an unknown thief beside all": (lambda: "--thief=all,typo", "no thief named 'typo'"),
    "a factory that exits": (lambda: "--victim=tests.victims:leaves", "tests.victims:leaves fails: SystemExit"),
    "a forward that exits": (lambda: "--victim=tests.victims:leaves_later", "ended the program"),
    "a factory that fails": (lambda: "--victim=tests.victims:fails", "RuntimeError: boom"),
    "no factory": (lambda: "--victim=tests.victims:A_MODEL", "not a factory"),
    "a missing argument": (lambda: "--victim=os:system", "os:system fails: TypeError"),
    "an index on the CPU": (lambda: "--device=cpu:5", "the CPU has no index"),
    "a path too long": (lambda: "--data=" + 5000 * "x", "cannot be a path"),
    "no such home": (lambda: "--data=~nosuchuser/x", "cannot be a path"),
    "one class in millions": (
        lambda: save_npz("m.npz", images=PIXELS, labels=np.full(200, 2**63, np.uint64)),
        "labels are out of range",
    ),
    "a bare array": (bare_array, "is a single array"),
    "unknown model": (lambda: "--victim=zoo:resnet81", "Did you mean 'resnet18'"),
    "no such module": (lambda: "--victim=no_module:factory", "cannot be loaded"),
    "unknown option": (lambda: "--sedes=3", "Did you mean --seeds"),
    "bad value": (lambda: "--seeds=many", "seeds"),
    "value out of range": (lambda: "--seeds=0", "greater than or equal to 1"),
    "unknown device": (lambda: "--device=tpu7", "device"),
    "unknown precision": (lambda: "--precision=fp8", "unknown precision"),
    "unknown profile": (lambda: "--profile=quick", "smoke"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_and_exit_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, said = BAD_INPUT[case]
    changed = make()
    arguments = [a for a in TINY if a.split("=")[0] != changed.split("=")[0]]
    assert cli.run(["steal", *arguments, changed]) == cli.USAGE
    out, err = capsys.readouterr()
    message = err[err.index("Error: ") :]
    assert said in message
    assert "Traceback" not in err
    assert out == ""
    assert not Path("executed").exists()
    assert not list(Path().rglob("result.json"))
    assert not list(Path().rglob("*.partial"))


def test_a_missing_required_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["steal", "--data=digits"]) == cli.USAGE
    assert "--victim" in complaint(capsys)
    assert cli.run(["stael"]) == cli.USAGE
    assert 'Did you mean "steal"' in complaint(capsys)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seedz: 3", "unknown setting 'seedz' in c.yaml.\n  Did you mean 'seed"),
        ("allow_code: true", "unknown setting 'allow_code'"),
        ("just text", "holds no settings"),
        ("a: [", "no plain YAML"),
        ("seeds: !!python/object/apply:os.system ['touch executed']", "no plain YAML"),
        ("victim: tests.victims:random_labels", "would run code"),
        ("defence: ast\ndata: 'package.module:factory'", "would run code"),
        ("seeds: many", "seeds"),
    ],
)
def test_a_config_file_is_checked_and_runs_nothing(content: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(content)
    assert cli.run(["steal", "--config", "c.yaml", "--data=digits", "--victim=zoo:cnn", "--dry-run"]) == cli.USAGE
    assert said in complaint(capsys)
    assert not Path("executed").exists()


def test_code_from_a_config_file_runs_only_where_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text("victim: tests.victims:random_labels")
    tiny = [argument for argument in TINY if not argument.startswith("--victim")]
    assert cli.run(["steal", *tiny, "--config=c.yaml", "--dry-run", "--allow-code"]) == cli.OK
    assert "look at the victim" in capsys.readouterr().out


PLAN = ["--dry-run", "--json"]


def planned_seeds(capsys: pytest.CaptureFixture[str], *arguments: str) -> int:
    capsys.readouterr()
    assert (
        cli.run(["steal", "--data=digits", "--victim=zoo:cnn?width=3", "--queries=5/class", *PLAN, *arguments])
        == cli.OK
    )
    stages = json.loads(capsys.readouterr().out)["stages"].values()
    return len([found for found in stages if found["stage"].startswith("train the victim")])


def test_a_flag_beats_the_environment_beats_the_file_beats_the_profile(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned_seeds(capsys) == 3  # the profile `standard`
    assert planned_seeds(capsys, "--profile=thorough") == 5
    Path("c.yaml").write_text("seeds: 4")
    assert planned_seeds(capsys, "--profile=thorough", "--config=c.yaml") == 4
    monkeypatch.setenv("STILLPROOF_SEEDS", "6")
    assert planned_seeds(capsys, "--config=c.yaml") == 6
    assert planned_seeds(capsys, "--config=c.yaml", "--seeds=2") == 2


def test_a_dry_run_shows_all_and_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["steal", *TINY, "--dry-run"]) == cli.OK
    out = capsys.readouterr().out
    assert "train the victim, seed 0" in out
    assert "million image passes" in out
    assert list(Path().iterdir()) == []


def test_a_run_leaves_its_directory_and_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run(["steal", *TINY, "--json"])
    out, err = capsys.readouterr()
    assert code in (cli.OK, cli.FOUND, cli.INCOMPLETE)
    shown = json.loads(out)
    (directory,) = Path("runs").glob("*-steal-*")
    assert f"{directory}/report.html" in err
    assert json.loads((directory / "result.json").read_text()) == shown
    names = {path.name for path in directory.iterdir()}
    assert names == {"settings.yaml", "environment.json", "events.jsonl", "result.json", "report.html", "models"}
    saved = yaml.safe_load((directory / "settings.yaml").read_text())
    assert saved["settings"]["epochs"] == 1
    assert saved["settings"]["utility_budget"] == 0.02  # the resolved settings, defaults included

    assert cli.run(["list", "--json"]) == cli.OK
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["verb"], row["status"]) == ("steal", shown["status"])

    page = (directory / "report.html").read_text()
    (directory / "report.html").unlink()
    assert cli.run(["report", str(directory)]) == cli.OK
    assert (directory / "report.html").read_text() == page
    assert cli.run(["report", str(directory / "result.json")]) == cli.OK

    # what it left is a model SPEC, and the same run again runs no stage
    (model,) = (directory / "models").glob("victim*.safetensors")
    capsys.readouterr()
    assert cli.run(["harden", "--data=digits", f"--model={model}", "--epochs=1", "--limit=200", "--dry-run"]) == cli.OK
    assert "look at the model" in capsys.readouterr().out
    assert cli.run(["steal", *TINY, "--dry-run"]) == cli.OK
    assert "0 of " in capsys.readouterr().out


def test_a_failed_finding_is_exit_1_unless_told_otherwise() -> None:
    from stillproof.findings import Finding, Result
    from stillproof.runs.options import RunOptions

    def code(severity: Any, status: Any, fail_on: Any) -> int:
        found = Finding(rule="SP-T1", subject="x", title="x", status=status, severity=severity)
        return cli.exit_code(Result(verb="steal", status=status, findings=[found]), RunOptions(fail_on=fail_on))

    assert code("high", "fail", "high") == cli.FOUND
    assert code("medium", "fail", "high") == cli.OK
    assert code("medium", "fail", "low") == cli.FOUND
    assert code("high", "fail", "never") == cli.OK
    assert code("high", "inconclusive", "never") == cli.INCOMPLETE
    assert code("low", "pass", "low") == cli.OK


def test_reports_of_what_is_no_run_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.json").write_text('{"verb": 3}')
    for path in ("x.json", "nowhere", "."):
        assert cli.run(["report", path]) == cli.USAGE
        complaint(capsys)
    assert cli.run(["resume"]) == cli.USAGE
    assert "no unfinished run" in complaint(capsys)
    assert cli.run(["list"]) == cli.OK


SPECS = [
    (verb, name)
    for verb in VERBS
    for name, field in verb_named(verb).settings.model_fields.items()
    if "str" in str(field.annotation) and "Literal" not in str(field.annotation) and name not in NO_SPEC
]


@pytest.mark.parametrize(("verb", "name"), SPECS)
@pytest.mark.parametrize("form", ["{}", "[{}]", "cnn+{}", "'{}?place=http://there'"])
def test_no_setting_of_a_file_runs_code_without_leave(
    verb: str, name: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("touching.py").write_text("open('executed', 'w')\ndef make(): ...\n")
    Path("c.yaml").write_text(f"{name}: {form.format('touching:make')}")
    Path("touching:make?a=1").write_text("")  # a file of that name makes it no place
    assert cli.run(["--config=c.yaml", verb, "--dry-run"]) == cli.USAGE
    assert "would run code" in complaint(capsys)
    assert not Path("executed").exists()


def test_what_a_run_was_begun_with_beats_the_environment_when_it_is_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("runs/20260101T000000Z-steal-00000000")
    folder.mkdir(parents=True)
    settings = {"data": "digits", "victim": "zoo:cnn?width=3", "queries": "5/class"}
    content = {"verb": "steal", "settings": settings, "how": {"store": "began-here", "precision": "fp32"}}
    (folder / "settings.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setenv("STILLPROOF_STORE", "elsewhere")
    monkeypatch.setattr(cli, "_perform", lambda _name, _settings, options, _directory: seen.append(options) or cli.OK)
    seen: list[RunOptions] = []
    assert cli.run(["resume", str(folder)]) == cli.OK
    for store in ("by-flag", "elsewhere"):
        assert cli.run(["resume", str(folder), f"--store={store}"]) == cli.OK
    assert [options.store for options in seen] == ["began-here", "by-flag", "elsewhere"]


def test_an_empty_setting_of_a_file_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text("defence: null\nthief:\nlimit: null\n")
    assert cli.run(["--config=c.yaml", "steal", *TINY, "--dry-run"]) == cli.OK


def test_a_run_that_names_code_is_not_resumed_without_leave(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("runs/20260101T000000Z-steal-00000000")
    folder.mkdir(parents=True)
    settings = {"data": "digits", "victim": "tests.victims:random_labels"}
    content = {"verb": "steal", "settings": settings, "how": {"store": "s", "precision": "fp32"}}
    (folder / "settings.yaml").write_text(yaml.safe_dump(content))
    assert cli.run(["resume"]) == cli.USAGE
    assert "would run code" in complaint(capsys)
    hidden = (
        "verb: steal\nhow: {store: s}\nsettings: {data: digits, victim: !!binary dGVzdHMudmljdGltczpyYW5kb21fbGFiZWxz}"
    )
    (folder / "settings.yaml").write_text(hidden)
    assert cli.run(["resume"]) == cli.USAGE
    assert "is a bytes" in complaint(capsys)
    (folder / "settings.yaml").write_text("verb: [")
    assert cli.run(["resume", str(folder)]) == cli.USAGE
    assert "cannot be read" in complaint(capsys)


def test_a_store_that_was_tampered_with_names_no_code_to_run() -> None:
    import hashlib

    stillproof("steal", *TINY)
    for manifest in Path("runs/store/artefacts").glob("*/artefact.json"):
        about = json.loads(manifest.read_text())
        if not about["about"]["label"].startswith("train the victim"):
            manifest.unlink()  # so that what reads the victim runs again
            continue
        values = json.loads((manifest.parent / "values.json").read_text())
        values["spec"] = "os:system?command=touch executed"
        content = json.dumps(values).encode()
        (manifest.parent / "values.json").write_bytes(content)
        about["files"]["values.json"] = hashlib.sha256(content).hexdigest()
        manifest.write_text(json.dumps(about))
    done = stillproof("steal", *TINY)
    assert done.returncode == cli.USAGE, done.stderr
    assert "which is not what this run was asked for" in done.stderr
    assert not Path("executed").exists()


def test_a_run_that_was_refused_is_not_the_one_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = [argument for argument in TINY if not argument.startswith("--victim")]
    assert cli.run(["steal", *tiny, "--victim=tests.victims:nan_outputs"]) == cli.USAGE
    assert (next(Path("runs").glob("*-steal-*")) / "refused.txt").is_file()
    capsys.readouterr()
    assert cli.run(["resume"]) == cli.USAGE
    assert "no unfinished run" in complaint(capsys)


@pytest.mark.parametrize("place", ["http://host:1/a,b:c", "kept+x/a:b"])
def test_a_place_in_a_file_is_no_code(place: str) -> None:
    Path("kept+x").mkdir()
    Path("kept+x/a:b").write_text("")
    refuse_code({"data": place, "transfer_set": [place]}, "c.yaml", allowed=False)
