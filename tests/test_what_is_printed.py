"""What goes to standard output, who reads it, and what Python's door refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

import stillproof as public
from stillproof import cli
from tests.test_command_line import ROOT, TINY, elsewhere, stillproof

__all__ = ["elsewhere"]  # a fixture that every test here uses


def test_a_reader_who_leaves_early_changes_nothing() -> None:
    for arguments in ([*TINY, "--json"], TINY):
        command = [sys.executable, "-m", "stillproof", "steal", *arguments, "--defence=identity"]
        whole = subprocess.run(command, capture_output=True, check=False)
        assert whole.returncode == cli.FOUND
        reading, writing = os.pipe()
        os.close(reading)
        left = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writing)
        assert left.returncode == cli.FOUND, left.stderr
        assert "Traceback" not in left.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["doctor"], ["doctor", "--json"], ["list"], ["list", "--json"]])
def test_a_reader_may_leave(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "stillproof", *arguments]
    left = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (left.returncode, left.stderr) == (cli.OK, "")


def test_what_user_code_prints_is_no_part_of_the_result() -> None:
    tiny = [argument for argument in TINY if not argument.startswith("--victim")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = stillproof("steal", *tiny, "--victim=tests.victims:chatty", "--json", env=environment)
    assert json.loads(done.stdout)["verb"] == "steal", done.stderr
    assert "hello" in done.stderr


def test_doctor_looks_and_tells(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json"]) in (cli.OK, cli.INCOMPLETE)
    told = json.loads(capsys.readouterr().out)
    assert told["packages"]["torch"]
    assert told["checks"]["a training step"] == "ok"
    assert told["checks"]["the store"] == "ok"


@pytest.mark.parametrize(
    ("options", "settings", "said"),
    [
        ({"runs": "x"}, {}, "options is a dict"),
        (None, {"defence": 3}, "Input should be a valid tuple"),
        (None, {"defences": ("ast",)}, "Did you mean 'defence'"),
        (None, {"victim": "zoo:cnn?weights="}, "has no value"),
    ],
)
def test_the_door_of_python_says_what_is_wrong(options: Any, settings: dict[str, Any], said: str) -> None:
    given = {"data": "digits", "victim": "zoo:cnn", "queries": "5/class"} | settings
    with pytest.raises(public.InputError, match=said):
        public.run("steal", options, **given)


def test_names_may_be_one_text_or_several() -> None:
    from stillproof.verbs.steal import StealSettings

    for given in ("ast,round", ["ast", "round"], ("ast,round",)):
        assert StealSettings(data="digits", victim="zoo:cnn", defence=given).defence == ("ast", "round")  # type: ignore[arg-type]


def test_one_class_is_nothing_to_tell_apart() -> None:
    import numpy as np

    np.savez("one.npz", images=np.zeros((60, 8, 8), np.uint8), labels=np.zeros(60, int))
    with pytest.raises(public.InputError, match="has one class alone"):
        public.run("steal", data="one.npz", victim="zoo:cnn", queries="5/class")
