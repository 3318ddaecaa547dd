"""One run from its settings to its report, in its directory."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stillproof.errors import InputError
from stillproof.findings import Result
from stillproof.runs.directory import ENVIRONMENT, MODELS, REFUSED, REPORT, RESULT, SETS, How, RunDirectory
from stillproof.runs.options import RunOptions
from stillproof.runs.progress import Reporting, stderr_console

if TYPE_CHECKING:
    from stillproof.core.plan import Plan
    from stillproof.core.runtime import Runtime
    from stillproof.core.store import Artefact, Store


class Work(Protocol):
    """What is run: a verb."""

    @property
    def name(self) -> str:
        """The verb's name."""

    @property
    def plan(self) -> Callable[..., Any]:
        """(settings, runtime) -> Plan."""

    @property
    def conclude(self) -> Callable[..., Result]:
        """(settings, values) -> Result."""

    @property
    def models(self) -> Callable[..., Mapping[str, Any]]:
        """(settings, values) -> artefacts of classifiers, by file name."""

    @property
    def sets(self) -> Callable[..., Mapping[str, Any]]:
        """(settings, values) -> sets of images, by file name."""


ONE_AT_A_TIME = threading.RLock()
"""Trainings seed torch, and Fabric wraps its backward, for the whole process: runs in threads take turns."""


class Run:
    """A verb with its settings, planned; nothing has run yet. Raises InputError where it cannot be planned."""

    def __init__(self, work: Work, settings: Any, options: RunOptions) -> None:
        from stillproof.core.runtime import Runtime
        from stillproof.core.store import Store

        self.work, self.settings, self.options = work, settings, options
        self.runtime: Runtime = Runtime.choose(options.device, options.precision, options.threads)
        with ONE_AT_A_TIME:
            self.runtime.apply()
            self.plan: Plan = work.plan(settings, self.runtime)
        self.store: Store = Store(options.store_location)

    def perform(self, directory: RunDirectory | None = None) -> tuple[RunDirectory, Result]:
        """Run what has no artefact yet, conclude, and leave result, report and models in the directory.

        directory: that of a run which is resumed; else a new one. Raises StillproofError.
        """
        with ONE_AT_A_TIME:
            self.runtime.apply()  # another run may have set its own number of threads meanwhile
            return self._perform(directory or self._new_directory())

    def _perform(self, directory: RunDirectory) -> tuple[RunDirectory, Result]:
        from stillproof.core.plan import Execution
        from stillproof.runs.environment import environment

        surroundings = environment(self.runtime)
        directory.write(ENVIRONMENT, _as_json(surroundings))
        passes = sum(found.passes for found in self.plan.needed(self.store))
        with interruptible() as check, Reporting(directory, stderr_console(), passes, check) as watcher:
            execution = Execution(self.plan, self.store, watcher, self.options.checkpoint_every)
            try:
                values = execution.run()
            except InputError as error:
                directory.write(REFUSED, f"{error}\n")
                raise
        result = self.work.conclude(self.settings, values)
        notes = dict.fromkeys(note for made in values.values() for note in made.values.get("notes", ()))
        more = {"notes": [*result.notes, *notes], "cost": execution.cost(), "environment": surroundings}
        result = result.model_copy(update=more)
        self._leave(directory, result, values)
        return directory, result

    def _new_directory(self) -> RunDirectory:
        runtime, place = self.runtime, self.options.store_location
        store = place if "://" in place else str(Path(place).absolute())
        how = How(store=store, precision=runtime.precision, device=runtime.device, threads=runtime.threads)
        saved = self.settings.model_dump(mode="json")
        return RunDirectory.create(self.options.runs, self.work.name, self.plan.digest, saved, how)

    def _leave(self, directory: RunDirectory, result: Result, values: Mapping[str, Artefact]) -> None:
        from stillproof.core.stages import save_artefact
        from stillproof.runs.image_sets import write_set
        from stillproof.runs.report import write_report

        for name, written in self.work.sets(self.settings, values).items():
            write_set(directory.path / SETS, safe_name(name), written)
        for name, artefact in self.work.models(self.settings, values).items():
            save_artefact(directory.path / MODELS / f"{safe_name(name)}.safetensors", artefact)
        directory.write(RESULT, result.model_dump_json(indent=1))
        write_report(result, directory.path / REPORT)
        directory.note("concluded", status=result.status)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Gives a function that raises KeyboardInterrupt if Ctrl-C was pressed and a library swallowed it.

    Some do while they are imported; the run then stops at its next stage.
    """
    asked = False

    def note(_number: int, _frame: object) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield check
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def safe_name(name: str) -> str:
    """A file name for a SPEC; a long one ends in its digest."""
    plain = "".join(char if char.isalnum() or char in "-._=" else "-" for char in name)
    return plain if len(plain) <= 80 else f"{plain[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _as_json(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=1)


def regenerate(path: Path) -> Path:
    """Write report.html anew from a run directory or a result.json alone. Raises InputError, StoreError."""
    from stillproof.runs.directory import read_result
    from stillproof.runs.report import write_report

    result = read_result(path)
    target = (path if path.is_dir() else path.parent) / REPORT
    write_report(result, target)
    return target
