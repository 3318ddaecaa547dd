"""One file a verb: its settings, and its job as plan(settings) -> Plan and conclude(settings, values) -> Result."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from stillproof.errors import InputError, nearest
from stillproof.findings import Result
from stillproof.runs.options import RunOptions

VERBS: Mapping[str, str] = {
    "steal": "stillproof.verbs.steal:STEAL",
    "harden": "stillproof.verbs.harden:HARDEN",
    "distill": "stillproof.verbs.distill:DISTILL",
    "audit": "stillproof.verbs.audit:AUDIT",
    "poison": "stillproof.verbs.poison:POISON_A_PIPELINE",
    "scan": "stillproof.verbs.scan:SCAN",
    "demo": "stillproof.verbs.demo:DEMO",
}


def _none(*_given: object) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Verb:
    """What the roof needs of a verb. Neither settings nor this record imports torch; `plan` does."""

    name: str
    settings: type[Any]
    """A VerbSettings."""
    plan: Callable[..., Any]
    """(settings, runtime) -> Plan. Looks and refuses; trains nothing."""
    conclude: Callable[..., Result]
    """(settings, values) -> Result. Touches no model."""
    models: Callable[..., Mapping[str, Any]]
    """(settings, values) -> the artefacts of the classifiers that the run leaves behind, by file name."""
    sets: Callable[..., Mapping[str, Any]] = _none
    """(settings, values) -> the sets of images that it leaves behind, by file name (runs.image_sets.WrittenSet)."""


def run(verb: str, options: RunOptions | None = None, **settings: Any) -> Result:
    """Run a verb as the command line does, with its settings by name; the result, and a run directory.

    `run("steal", data="digits", victim="zoo:cnn", queries="10/class", defence=("ast",))`.
    Raises StillproofError.
    """
    from stillproof.runs.execution import Run

    found = verb_named(verb)
    if options is not None and not isinstance(options, RunOptions):
        raise InputError(f"options is a {type(options).__name__}.", "Give stillproof.RunOptions(runs=…, store=…).")
    try:
        given = found.settings(**settings).resolved()
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = found.settings.model_fields
        hint = f"See stillproof {verb} --help." if name in known else nearest(name, known)
        raise InputError(f"{name}: {first['msg']}.", hint) from None
    _, result = Run(found, given, options or RunOptions()).perform()
    return result


def verb_named(name: str) -> Verb:
    """The verb of this name. Raises InputError."""
    if name not in VERBS:
        raise InputError(f"there is no verb {name!r}.", nearest(name, VERBS))
    module, _, attribute = VERBS[name].partition(":")
    found: Verb = getattr(importlib.import_module(module), attribute)
    return found
