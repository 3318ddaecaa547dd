"""Every example runs and prints something."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
PLUG_IN = Path(__file__).parent.parent / "examples" / "plug_in"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


def installed(folder: Path) -> Path:
    """The plug-in as pip would leave it, in a folder for the path."""
    project = tomllib.loads((PLUG_IN / "pyproject.toml").read_text())["project"]
    shutil.copy(PLUG_IN / "stillproof_plug_in.py", folder)
    told = folder / "stillproof_plug_in-0.1.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: stillproof-plug-in\nVersion: 0.1\n")
    groups = project["entry-points"]
    lines = [line for group in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in groups[group].items()))]
    (told / "entry_points.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "steal --victim zoo:linear --thief-model zoo:linear --queries 5/class --thief kd,stubborn "
            "--defence shy?by=0.9 --thief-epochs 5",
            ["stubborn, T = 3", "shy by 0.9"],
        ),
        ("distill --teacher zoo:linear --student zoo:linear --objective squared", ["test accuracy"]),
    ],
)
def test_what_another_package_brings_has_a_name(arguments: str, said: list[str], tmp_path: Path) -> None:
    given = [*arguments.split(), "--data", "stripes", "--profile", "smoke", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "stillproof", *given],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed(tmp_path))},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode in (0, 1, 3), done.stderr
    assert all(text in done.stdout for text in said)
