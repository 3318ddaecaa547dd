"""Plans and the store: keys, resuming, damage, remote stores."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from stillproof.core.measurement import Cost
from stillproof.core.plan import Context, Execution, Plan, Stage, job, stage
from stillproof.core.runtime import Runtime
from stillproof.core.store import MANIFEST, VALUES, Artefact, Store
from stillproof.errors import InputError, StoreError

FP32, BF16 = Runtime("cpu", "fp32", 1), Runtime("cpu", "bf16", 1)
ran: list[str] = []


@job(version=1)
def number(_context: Context, *, value: int, name: str = "number") -> Artefact:
    ran.append(name)
    return Artefact({"value": value}, {"row": torch.arange(value)}, Cost(queries=value))


@job(version=1)
def total(_context: Context, first: Artefact, others: list[Artefact], *, name: str = "total") -> Artefact:
    ran.append(name)
    return Artefact({"value": first.values["value"] + sum(other.values["value"] for other in others)})


@job(version=1)
def drawing(_context: Context, *, value: int) -> Artefact:
    return Artefact({}, {"row": torch.rand(value)})


@job(version=2)
def number_anew(_context: Context, *, value: int) -> Artefact:
    return Artefact({"value": value})


@dataclass(frozen=True)
class One:
    x: int = 1


@dataclass(frozen=True)
class Other:
    x: int = 1


@dataclass(frozen=True)
class File:
    path: str
    content: str

    def identity(self) -> dict[str, str]:
        return {"content": self.content}


class Silent:
    def started(self, *_: object) -> None: ...
    def advanced(self, *_: object) -> None: ...
    def finished(self, *_: object) -> None: ...


def sum_of(*values: int) -> Stage:
    numbers = [stage(number, f"number {value}", value=value, name=str(value)) for value in values]
    return stage(total, "total", first=numbers[0], others=numbers[1:])


def key(found: Stage, runtime: Runtime = FP32) -> str:
    return Plan({"it": found}, runtime).key(found)


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    ran.clear()


def test_a_key_depends_on_job_version_settings_precision_and_inputs_and_on_nothing_else() -> None:
    base = key(sum_of(1, 2, 3))
    assert key(sum_of(1, 2, 3)) == base
    others = [
        key(sum_of(1, 2, 4)),
        key(sum_of(1, 3, 2)),
        key(sum_of(2, 1, 3)),
        key(sum_of(1, 2)),
        key(sum_of(1, 2, 3), BF16),
        key(stage(number, "x", value=1)),
        key(stage(number_anew, "x", value=1)),
        key(stage(number, "x", value=One())),
        key(stage(number, "x", value=Other())),
        key(stage(number, "x", value=[One(), Other()])),
        key(stage(number, "x", value=[Other(), One()])),
        key(stage(number, "x", value=File("a", "content"))),
    ]
    assert len({base, *others}) == 13
    assert key(stage(number, "another label", passes=99, value=1)) == key(stage(number, "x", value=1))
    assert key(stage(number, "x", value=File("b", "content"))) == others[-1]


def run(plan: Plan, store: Store) -> dict[str, Artefact]:
    return Execution(plan, store, Silent()).run()


def test_what_two_outputs_share_runs_once_and_a_second_run_runs_nothing(tmp_path: Path) -> None:
    plan = Plan({"a": sum_of(1, 2), "b": sum_of(1, 2, 3)}, FP32)
    store = Store(str(tmp_path))
    values = run(plan, store)
    assert (values["a"].values["value"], values["b"].values["value"]) == (3, 6)
    assert sorted(ran) == ["1", "2", "3", "total", "total"]
    again = run(Plan({"a": sum_of(1, 2), "b": sum_of(1, 2, 3)}, FP32), store)
    assert len(ran) == 5
    assert again["b"].values == values["b"].values
    assert Execution(plan, store, Silent()).cost().queries == 6


def test_only_what_is_missing_and_wanted_runs(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    run(Plan({"a": sum_of(1, 2)}, FP32), store)
    ran.clear()
    run(Plan({"b": sum_of(1, 2, 7)}, FP32), store)
    assert ran == ["7", "total"]
    for folder in (tmp_path / "artefacts").iterdir():  # the inputs of a finished output are not wanted
        if json.loads((folder / MANIFEST).read_text())["about"]["label"] != "total":
            (folder / MANIFEST).unlink()
    ran.clear()
    assert run(Plan({"b": sum_of(1, 2, 7)}, FP32), store)["b"].values == {"value": 10}
    assert ran == []


def test_a_stage_that_failed_leaves_the_others_finished(tmp_path: Path) -> None:
    @job(version=1)
    def broken(_context: Context, first: Artefact) -> Artefact:
        raise ZeroDivisionError

    store = Store(str(tmp_path))
    first = stage(number, "x", value=4)
    plan = Plan({"it": stage(broken, "broken", first=first)}, FP32)
    with pytest.raises(ZeroDivisionError):
        run(plan, store)
    assert store.has(plan.key(first))
    assert [found.label for found in plan.needed(store)] == ["broken"]


@pytest.mark.parametrize("place", [str, lambda _: "memory://artefacts-of-a-test"])
def test_an_artefact_comes_back_as_it_was(
    tmp_path: Path, place: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    store = Store(place(tmp_path))
    made = Artefact(
        {"list": [1, None, "ä"]}, {"x": torch.rand(3, 2), "y": torch.arange(4, dtype=torch.uint8)}, Cost(queries=3)
    )
    store.save("ab" * 16, made, {"label": "x"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    other = Store(place(tmp_path))  # as another host would see it
    assert other.has("ab" * 16)
    assert not other.has("cd" * 16)
    back = other.load("ab" * 16)
    assert back.values == made.values
    assert back.cost == made.cost == other.cost("ab" * 16)
    assert all(torch.equal(back.tensors[name], made.tensors[name]) for name in ("x", "y"))


@pytest.mark.parametrize("name", [VALUES, "tensors.safetensors", MANIFEST])
def test_a_damaged_artefact_is_named_and_never_used(tmp_path: Path, name: str) -> None:
    store = Store(str(tmp_path))
    store.save("ab" * 16, Artefact({"a": 1}, {"x": torch.rand(3)}), {})
    file = tmp_path / "artefacts" / ("ab" * 16) / name
    file.write_bytes(file.read_bytes()[:-2] + b"zz")
    with pytest.raises(StoreError, match="Delete that folder, then resume"):
        store.load("ab" * 16)


def test_without_its_manifest_there_is_no_artefact(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.save("ab" * 16, Artefact({"a": 1}), {})
    (tmp_path / "artefacts" / ("ab" * 16) / MANIFEST).unlink()
    assert not store.has("ab" * 16)


def test_a_manifest_cannot_point_elsewhere(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.save("ab" * 16, Artefact({"a": 1}), {})
    file = tmp_path / "artefacts" / ("ab" * 16) / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["files"] = {"../../../etc/passwd": "0" * 64}
    file.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="unexpected file"):
        store.load("ab" * 16)


def test_not_a_number_never_enters_the_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        Store(str(tmp_path)).save("ab" * 16, Artefact({"a": float("nan")}), {})
    assert not Store(str(tmp_path)).has("ab" * 16)


def test_a_store_that_cannot_be_opened_or_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened"):
        Store("nosuchprotocol://x")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(str(tmp_path / "file")).save("ab" * 16, Artefact({"a": 1}), {})


@job(version=1)
def large(context: Context, *, fill: int) -> Artefact:
    images = context.allocate("images", (5, 3))
    images[:] = fill
    if fill > 200:
        raise InputError("no more.", "Stop.")
    return Artefact({}, {"images": images, "labels": torch.arange(5)})


def test_large_tensors_go_to_disk_and_come_back_mapped_and_unharmed(tmp_path: Path) -> None:
    store, plan = Store(str(tmp_path)), Plan({"large": stage(large, "large", fill=7)}, Runtime())
    made = Execution(plan, store, Silent()).run()["large"]
    made.tensors["images"][0] = 9  # a later stage's mistake
    again = store.load(plan.key(plan.outputs["large"]))
    assert again.tensors["images"].equal(torch.full((5, 3), 7, dtype=torch.uint8))
    assert again.tensors["labels"].tolist() == list(range(5))
    files = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {"artefact.json", "values.json", "tensors.safetensors", "images.npy"}


def test_a_stage_that_fails_leaves_no_large_file_behind(tmp_path: Path) -> None:
    plan = Plan({"large": stage(large, "large", fill=201)}, Runtime())
    with pytest.raises(InputError, match="no more"):
        Execution(plan, Store(str(tmp_path)), Silent()).run()
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_changed_or_cut_large_file_is_noticed(tmp_path: Path) -> None:
    store, plan = Store(str(tmp_path)), Plan({"large": stage(large, "large", fill=7)}, Runtime())
    Execution(plan, store, Silent()).run()
    (file,) = tmp_path.rglob("images.npy")
    content = file.read_bytes()
    for harm in (content[:-1], content[:-1] + b"\0", b""):
        file.write_bytes(harm)
        with pytest.raises(StoreError, match=r"images\.npy has changed"):
            store.load(plan.key(plan.outputs["large"]))


def test_two_processes_that_build_one_artefact_do_not_disturb_each_other(tmp_path: Path) -> None:
    script = (
        "import sys; from tests.core.test_plan_and_store import *\n"
        "for fill in range(60):\n"
        "    plan = Plan({'large': stage(large, 'large', fill=fill)}, Runtime())\n"
        "    Execution(plan, Store(sys.argv[1]), Silent()).run()\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    for fill in range(60):
        plan = Plan({"large": stage(large, "large", fill=fill)}, Runtime())
        made = Store(str(tmp_path)).load(plan.key(plan.outputs["large"]))
        assert made.tensors["images"].unique().tolist() == [fill]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_large_tensor_travels_to_a_remote_store_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    plan = Plan({"large": stage(large, "large", fill=7)}, Runtime())
    Execution(plan, Store("memory://large"), Silent()).run()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    loaded = Store("memory://large").load(plan.key(plan.outputs["large"]))
    assert loaded.tensors["images"].unique().tolist() == [7]


def test_a_finished_artefact_stays_when_another_writer_of_it_is_killed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.save("ab" * 16, Artefact({"by": "first"}, {"x": torch.zeros(3)}), {})
    script = (
        "import sys, torch; from stillproof.core.store import Artefact, Store\n"
        "Store(sys.argv[1]).save('ab' * 16, Artefact({'by': 'second'}, {'x': torch.ones(3)}), {})\n"
    )
    for nth in (1, 2, 3):
        surroundings = {**os.environ, "STILLPROOF_KILL_AT": f"artefact:{nth}"}
        killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=surroundings, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert store.load("ab" * 16).values == {"by": "first"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert store.load("ab" * 16).tensors["x"].tolist() == [0, 0, 0]
    assert not list(tmp_path.rglob("*.partial"))


def test_an_artefact_under_another_key_is_not_taken_for_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.save("ab" * 16, Artefact({"a": 1}), {})
    (tmp_path / "artefacts" / ("ab" * 16)).rename(tmp_path / "artefacts" / ("cd" * 16))
    with pytest.raises(StoreError, match="it is the artefact abab"):
        store.load("cd" * 16)


def test_what_could_not_be_handed_over_is_handed_over_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = Store("memory://late")
    with monkeypatch.context() as broken:
        broken.setattr(store._remote, "put_file", lambda *_: (_ for _ in ()).throw(OSError("no network")))
        with pytest.raises(StoreError, match="no network"):
            store.save("ab" * 16, Artefact({"a": 1}), {})
    assert store.has("ab" * 16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert Store("memory://late").load("ab" * 16).values == {"a": 1}


def test_of_what_can_run_the_least_work_is_first() -> None:
    base = stage(number, "base", value=0)
    stages = {
        name: stage(total, name, passes=passes, first=base, others=[], name=name)
        for name, passes in (("long", 1000), ("short", 10), ("look", 0))
    }
    last = stage(total, "last", first=stages["long"], others=[stages["look"]], name="last")
    plan = Plan({**stages, "last": last}, FP32)
    assert [found.label for found in plan.order] == ["base", "look", "short", "long", "last"]


def test_an_edited_plug_in_is_another_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another package brings has no version of ours: its code is in the key."""
    monkeypatch.syspath_prepend(tmp_path)
    body = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Setting:\n    x: int = 1\n"
    keys = []
    for added in ("", "# edited\n"):
        (tmp_path / "a_plug_in.py").write_text(body + added)
        sys.modules.pop("a_plug_in", None)
        setting = __import__("a_plug_in").Setting()
        one = stage(number, "one", value=1, name=setting)
        keys.append(Plan({"one": one}, FP32).key(one))
    assert keys[0] != keys[1]


def test_what_a_stage_draws_is_the_same_in_every_run(tmp_path: Path) -> None:
    found = []
    for place in ("a", "b"):
        torch.rand(len(place) + len(found))
        before = torch.random.get_rng_state()
        made = run(Plan({"drawn": stage(drawing, "draw", value=3)}, FP32), Store(str(tmp_path / place)))
        assert torch.equal(torch.random.get_rng_state(), before)
        found.append(made["drawn"].tensors["row"])
    assert torch.equal(found[0], found[1])
