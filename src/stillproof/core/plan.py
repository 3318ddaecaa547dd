"""Stages and plans: what a verb will do, known whole before anything runs.

A stage is a pure function of its settings and its inputs. Its key is the hash of its name, its version, its
settings, the precision, and its inputs' keys, so a stage that two plans share is one stage, and a killed run
goes on by running what has no artefact yet.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from graphlib import TopologicalSorter
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from typing import Protocol, cast

import torch
from pydantic_core import PydanticSerializationError, to_jsonable_python
from torch import Tensor

from stillproof.core import faults
from stillproof.core.measurement import Cost
from stillproof.core.plugins import plugin_identity
from stillproof.core.runtime import Runtime
from stillproof.core.store import Artefact, Store
from stillproof.errors import InputError


def in_memory(_name: str, shape: tuple[int, ...]) -> Tensor:
    """Room for a large tensor where there is no store."""
    return torch.empty(shape, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Context:
    """What a running stage gets besides its settings and inputs. Of it, device and threads change the last bits."""

    runtime: Runtime
    checkpoint: Path | None = None
    checkpoint_seconds: float = 30.0
    advance: Callable[[int, int, str], None] | None = None
    allocate: Callable[[str, tuple[int, ...]], Tensor] = in_memory
    """(name, shape) -> a uint8 tensor of the artefact that may be larger than memory (core.store.Draft)."""
    code: frozenset[str] = frozenset()
    """SPECs that run code and that the user's own settings name; what an artefact names is not enough."""


@dataclass(frozen=True, slots=True)
class Job:
    """A function of (context, inputs and settings by name) -> Artefact, with a version.

    Raise the version whenever the function's results change: artefacts of the old one are then not used.
    """

    run: Callable[..., Artefact]
    version: int

    @property
    def name(self) -> str:
        """Where the function stands."""
        return f"{self.run.__module__}:{self.run.__qualname__}"


def job(*, version: int) -> Callable[[Callable[..., Artefact]], Job]:
    """Declare a function as what a stage does."""
    return lambda run: Job(run, version)


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """One node of a plan: a job, its settings, and the stages whose artefacts it reads."""

    job: Job
    label: str
    settings: Mapping[str, object]
    inputs: Mapping[str, Stage | tuple[Stage, ...]]
    passes: int = 0
    """Estimate of the work: images × passes, a backward pass counted twice."""

    def parents(self) -> tuple[Stage, ...]:
        """All stages this one reads."""
        found: list[Stage] = []
        for given in self.inputs.values():
            found += given if isinstance(given, tuple) else (given,)
        return tuple(found)


def stage(job: Job, label: str, *, passes: int = 0, **given: object) -> Stage:
    """A stage: of what is given, stages (and sequences of them) are its inputs, the rest its settings.

    label: what a person sees of it. Two stages of one plan may have the same label.
    """
    inputs: dict[str, Stage | tuple[Stage, ...]] = {}
    settings: dict[str, object] = {}
    for name, value in given.items():
        if isinstance(value, Stage):
            inputs[name] = value
        elif isinstance(value, Sequence) and value and all(isinstance(item, Stage) for item in value):
            inputs[name] = tuple(value)
        else:
            settings[name] = value
    return Stage(job, label, settings, inputs, passes)


def _cheapest_first(graph: Mapping[Stage, Collection[Stage]]) -> tuple[Stage, ...]:
    """The stages, each after what it reads; of those that can run, the least work first.

    A model that is refused when it is looked at has then cost no hour of training another.
    """
    sorter, order = TopologicalSorter(graph), list[Stage]()
    sorter.prepare()
    waiting: list[tuple[int, int, Stage]] = []
    begun = count()
    while sorter.is_active():
        for found in sorter.get_ready():
            heappush(waiting, (found.passes, next(begun), found))
        found = heappop(waiting)[-1]
        order.append(found)
        sorter.done(found)
    return tuple(order)


class Plan:
    """A graph of stages, and the names under which a conclusion finds their artefacts."""

    def __init__(self, outputs: Mapping[str, Stage], runtime: Runtime) -> None:
        self.outputs = dict(outputs)
        self.runtime = runtime
        graph: dict[Stage, tuple[Stage, ...]] = {}
        waiting = list(self.outputs.values())
        while waiting:
            found = waiting.pop()
            if found not in graph:
                graph[found] = found.parents()
                waiting += graph[found]
        self.order = _cheapest_first(graph)
        self._keys: dict[Stage, str] = {}
        for found in self.order:
            self._keys[found] = self._hash(found)

    def key(self, of: Stage) -> str:
        """The key of a stage: 32 hex digits."""
        return self._keys[of]

    @property
    def digest(self) -> str:
        """A hash of the whole plan."""
        together = json.dumps({name: self.key(found) for name, found in self.outputs.items()}, sort_keys=True)
        return hashlib.sha256(together.encode()).hexdigest()[:32]

    @property
    def code(self) -> frozenset[str]:
        """The SPECs among all settings that run code of the user's."""
        named = (getattr(value, "code", None) for found in self.order for value in found.settings.values())
        return frozenset(str(code) for code in named if code)

    def needed(self, store: Store) -> list[Stage]:
        """The stages that must still run, in order: those whose artefact is missing and wanted."""
        wanted: set[str] = set()
        waiting = list(self.outputs.values())
        while waiting:
            found = waiting.pop()
            if self.key(found) not in wanted and not store.has(self.key(found)):
                wanted.add(self.key(found))
                waiting += found.parents()
        todo: dict[str, Stage] = {}
        for found in self.order:
            if self.key(found) in wanted:
                todo.setdefault(self.key(found), found)
        return list(todo.values())

    def _hash(self, found: Stage) -> str:
        inputs = {
            name: [self.key(item) for item in given] if isinstance(given, tuple) else self.key(given)
            for name, given in found.inputs.items()
        }
        settings = {name: _described(value) for name, value in found.settings.items()}
        content = [found.job.name, found.job.version, self.runtime.precision, settings, inputs]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _described(value: object) -> object:
    """A setting as JSON. What has an `identity()` is that (a file: its content, not its path); a dataclass comes with
    its type's name, so that two with the same fields differ, and that of a plug-in with a digest of its code."""
    if hasattr(value, "identity"):
        known, code = to_jsonable_python(value.identity()), plugin_identity(cast(type, type(value)))
        return {"identity": known, **code} if code else known
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_described(item) for item in value]
    if is_dataclass(value):
        described = {item.name: _described(getattr(value, item.name)) for item in fields(value)}
        version = getattr(value, "version", 1)  # of what it does, as a job has one
        described |= {"version": version} if version != 1 else {}
        place = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"type": place, **described, **plugin_identity(cast(type, type(value)))}
    try:
        return to_jsonable_python(value)
    except PydanticSerializationError:
        raise InputError(
            f"a setting of type {type(value).__name__} cannot be part of a stage's key.",
            "Make it a frozen dataclass of plain values, or give it identity() that returns JSON.",
        ) from None


class Watcher(Protocol):
    """Who wants to know how a plan is getting on."""

    def started(self, number: int, of: int, found: Stage, key: str) -> None:
        """A stage begins: the `number`-th of `of` that must run."""

    def advanced(self, done: int, of: int, note: str) -> None:
        """The running stage has made some of its steps."""

    def finished(self, found: Stage, key: str, seconds: float) -> None:
        """The stage is done and its artefact kept."""


@dataclass
class Execution:
    """Runs a plan in this process, in topological order, keeping in memory what a later stage still reads."""

    plan: Plan
    store: Store
    watcher: Watcher
    checkpoint_seconds: float = 30.0
    _held: dict[str, Artefact] = field(default_factory=dict, init=False)

    def run(self) -> dict[str, Artefact]:
        """Run what has no artefact yet; return the outputs by name. Raises StillproofError."""
        plan, todo = self.plan, self.plan.needed(self.store)
        readers = Counter(plan.key(parent) for found in todo for parent in found.parents())
        for number, found in enumerate(todo, start=1):
            self._run_one(number, len(todo), found)
            for parent in found.parents():
                readers[plan.key(parent)] -= 1
                if not readers[plan.key(parent)]:
                    self._held.pop(plan.key(parent), None)
            if not readers[plan.key(found)]:
                self._held.pop(plan.key(found), None)
            faults.kill_point("stage")
        return {name: self._artefact(plan.key(found)) for name, found in plan.outputs.items()}

    def cost(self) -> Cost:
        """What all stages of the plan took, whenever they ran."""
        keys = {self.plan.key(found) for found in self.plan.order}
        return sum((self.store.cost(key) for key in sorted(keys) if self.store.has(key)), Cost())

    def _run_one(self, number: int, of: int, found: Stage) -> None:
        key = self.plan.key(found)
        self.watcher.started(number, of, found, key)
        checkpoint = self.store.checkpoint(key)
        inputs = {
            name: [self._artefact(self.plan.key(item)) for item in given]
            if isinstance(given, tuple)
            else self._artefact(self.plan.key(given))
            for name, given in found.inputs.items()
        }
        with self.store.draft(key) as draft:
            context = Context(
                self.plan.runtime,
                checkpoint,
                self.checkpoint_seconds,
                self.watcher.advanced,
                draft.allocate,
                self.plan.code,
            )
            started = time.monotonic()
            with torch.random.fork_rng(devices=[]):  # what a randomised classifier draws is the same in every run
                torch.manual_seed(int(key[:15], 16))
                made = found.job.run(context, **inputs, **found.settings)
            seconds = time.monotonic() - started
            made = replace(made, cost=made.cost.model_copy(update={"seconds": seconds, "peak_bytes": _peak_bytes()}))
            about = {"job": found.job.name, "version": found.job.version, "label": found.label}
            self.store.save(key, made, about, draft)
        if not draft.files:  # what was allocated is read back, so that no later stage can write to it
            self._held[key] = made
        with suppress(OSError):
            checkpoint.unlink(missing_ok=True)
        self.watcher.finished(found, key, seconds)

    def _artefact(self, key: str) -> Artefact:
        if key not in self._held:
            self._held[key] = self.store.load(key)
        return self._held[key]


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
