"""The command line: parses, calls one verb, prints, exits. torch is not imported before a verb is planned."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import pydantic
from cyclopts import App, Parameter
from cyclopts.config import Dict, Env

from stillproof.errors import InputError, StillproofError
from stillproof.findings import Result, at_or_over
from stillproof.runs.config import read_config, refuse_code
from stillproof.runs.options import RunOptions
from stillproof.verbs import VERBS, verb_named
from stillproof.verbs.audit import AuditSettings
from stillproof.verbs.demo import DemoSettings
from stillproof.verbs.distill import DistillSettings
from stillproof.verbs.harden import HardenSettings
from stillproof.verbs.poison import PoisonSettings
from stillproof.verbs.scan import ScanSettings
from stillproof.verbs.steal import StealSettings

OK, FOUND, USAGE, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130

Flags = Parameter(name="*")
AsJson = Annotated[bool, Parameter(name="--json", negative="")]

app = App(
    name="stillproof",
    help="A security test bench for knowledge distillation: theft, evasion, poison.",
    help_epilogue="Exit codes: 0 nothing found; 1 a failed finding; 2 usage; 3 inconclusive; 130 interrupted.",
    version=lambda: version("stillproof"),
    result_action="return_value",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)


@app.command
def steal(*, settings: Annotated[StealSettings, Flags], options: Annotated[RunOptions, Flags] = RunOptions()) -> int:
    """How much of a classifier can be distilled out of its answers, with and without defences."""
    return _run("steal", settings, options)


@app.command
def harden(*, settings: Annotated[HardenSettings, Flags], options: Annotated[RunOptions, Flags] = RunOptions()) -> int:
    """Harden a classifier, and check that the defence took."""
    return _run("harden", settings, options)


@app.command
def audit(*, settings: Annotated[AuditSettings, Flags], options: Annotated[RunOptions, Flags] = RunOptions()) -> int:
    """Whether a classifier is robust, or only hides its gradients."""
    return _run("audit", settings, options)


@app.command
def distill(
    *, settings: Annotated[DistillSettings, Flags], options: Annotated[RunOptions, Flags] = RunOptions()
) -> int:
    """Distil a teacher into a student."""
    return _run("distill", settings, options)


@app.command
def poison(*, settings: Annotated[PoisonSettings, Flags], options: Annotated[RunOptions, Flags] = RunOptions()) -> int:
    """Whether a poisoned transfer set puts a backdoor into the student of a clean teacher."""
    return _run("poison", settings, options)


@app.command
def scan(*, settings: Annotated[ScanSettings, Flags], options: Annotated[RunOptions, Flags] = RunOptions()) -> int:
    """Whether a transfer set holds images that do not belong."""
    return _run("scan", settings, options)


@app.command
def demo(
    *,
    settings: Annotated[DemoSettings, Flags] = DemoSettings(),
    options: Annotated[RunOptions, Flags] = RunOptions(),
) -> int:
    """Steal, harden, steal again; unmask a distilled classifier; poison a transfer set and scan it. Exits 0."""
    code = _run("demo", settings, options)
    return OK if code in (FOUND, INCOMPLETE) else code


@app.command
def resume(run: Path | None = None, /, *, options: Annotated[RunOptions, Flags] = RunOptions()) -> int:
    """Finish a run that was stopped: the one named, or the latest that is unfinished."""
    from stillproof.runs.directory import RunDirectory, latest_unfinished

    directory = RunDirectory.open(run) if run is not None else latest_unfinished(options.runs)
    name, saved, how = directory.settings()
    settings_type = verb_named(name).settings
    refuse_code(saved, f"{directory.path}/settings.yaml", allowed=options.allow_code)
    try:
        settings = settings_type.model_validate(saved)
    except pydantic.ValidationError as error:
        raise InputError(f"{directory.path}/settings.yaml: {_reason(error)}", "Start the run anew.") from None
    refuse_code(settings.model_dump(), f"{directory.path}/settings.yaml", allowed=options.allow_code)
    kept = how.model_dump(exclude_none=True, exclude=options.model_fields_set)
    code = _perform(name, settings, options.model_copy(update=kept), directory)
    return OK if name == "demo" and code in (FOUND, INCOMPLETE) else code


@app.command
def report(run: Path, /) -> int:
    """Write report.html anew from a run directory or a result.json."""
    from stillproof.runs.execution import regenerate

    with _reader_may_leave():
        print(regenerate(run))
    return OK


@app.command(name="list")
def list_runs(*, runs: Path = Path("runs"), as_json: AsJson = False) -> int:
    """The runs in a folder, oldest first."""
    from stillproof.runs.listing import listed, show_list

    found = listed(runs)
    with _reader_may_leave():
        show_list(found, as_json=as_json)
    return OK


@app.command
def doctor(*, as_json: AsJson = False) -> int:
    """What this machine has, and what Stillproof makes of it."""
    from stillproof.runs.doctor import examine

    is_well = True
    with _reader_may_leave():
        is_well = examine(as_json=as_json)
    return OK if is_well else INCOMPLETE


def main() -> None:
    """The entry point of the command `stillproof`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # α on a terminal that has none
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code. Prints one message for whatever is wrong, never a traceback."""
    only_prints = bool({"--help", "-h", "--version"} & set(arguments))
    try:
        with _reader_may_leave() if only_prints else nullcontext():
            return int(app.meta(list(arguments), exit_on_error=False, print_error=False) or OK)
        return OK
    except StillproofError as error:
        return _complain(type(error).__name__, str(error), USAGE)
    except cyclopts.CycloptsError as error:
        return _complain("UsageError", _usage(error), USAGE)
    except KeyboardInterrupt:
        return _complain(
            "Interrupted", "nothing that was finished is lost.\n  Go on with: stillproof resume", INTERRUPTED
        )
    except SystemExit as error:
        return _complain("InputError", f"the code that was called ended the program (exit {error.code}).", USAGE)
    except Exception as error:
        if os.environ.get("STILLPROOF_DEBUG"):
            raise
        what = f"{type(error).__name__}: {error}\n  This is a fault of Stillproof. STILLPROOF_DEBUG=1 shows where."
        return _complain("InternalError", what, INCOMPLETE)


app.meta.suppress_keyboard_interrupt = False  # an interrupted run has something to say


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(help="YAML file with settings, below flags and environment.")] = None,
) -> int:
    layers: list[Any] = [_of_the_resumed() if tokens[:1] == ("resume",) else Env("STILLPROOF_", command=False)]
    if config is not None and set(VERBS) & set(tokens):  # list, report and the like have no such settings
        values = read_config(config, _known_settings(tokens), allow_code="--allow-code" in tokens)
        layers.append(Dict(values, source=str(config), use_commands_as_keys=False))
    app.config = layers
    return int(app(tokens, exit_on_error=False, print_error=False) or OK)


def _of_the_resumed() -> Dict:
    """What variables may say of a run that is resumed: not what it was begun with, which is kept."""
    from stillproof.runs.directory import How

    names = set(RunOptions.model_fields) - set(How.model_fields) - {"allow_code"}
    given = {
        name: os.environ[f"STILLPROOF_{name.upper()}"] for name in names if f"STILLPROOF_{name.upper()}" in os.environ
    }
    return Dict(given, source="the environment", use_commands_as_keys=False)


def _known_settings(arguments: Sequence[str]) -> list[str]:
    verb = next(argument for argument in arguments if argument in VERBS)
    options = {"json" if name == "as_json" else name for name in RunOptions.model_fields} - {"allow_code"}
    return [*verb_named(verb).settings.model_fields, *options]


def _run(name: str, settings: Any, options: RunOptions) -> int:
    return _perform(name, settings.resolved(), options, None)


def _perform(name: str, settings: Any, options: RunOptions, directory: Any) -> int:
    from stillproof.runs.console import plan_as_json, show, show_plan, stdout_console
    from stillproof.runs.execution import Run

    with redirect_stdout(sys.stderr):  # what the user's code prints is no part of the result
        planned = Run(verb_named(name), settings, options)
    console = stdout_console()
    if options.dry_run:
        with _reader_may_leave():
            if options.as_json:
                print(json.dumps(plan_as_json(planned.plan, planned.store), indent=1))
            else:
                show_plan(planned.plan, planned.store, console)
        return OK
    with redirect_stdout(sys.stderr):
        directory, result = planned.perform(directory)
    with _reader_may_leave():
        if options.as_json:
            print(result.model_dump_json(indent=1))
        else:
            show(result, console)
    print(f"Report: {directory.path / 'report.html'}", file=sys.stderr)
    return exit_code(result, options)


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Whoever reads stdout may close it early: that changes nothing about the result."""
    try:
        yield
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # rich turns the first into the second
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_code(result: Result, options: RunOptions) -> int:
    """1 for a failed finding at or over --fail-on, 3 for what is left open or went wrong, else 0."""
    if options.fail_on != "never" and at_or_over(result.findings, options.fail_on):
        return FOUND
    is_open = result.status == "error" or any(f.status in ("error", "inconclusive") for f in result.findings)
    return INCOMPLETE if is_open else OK


def _usage(error: cyclopts.CycloptsError) -> str:
    cause = error.__cause__ or error.__context__
    if isinstance(cause, pydantic.ValidationError):
        return _reason(cause)
    return f"{error}\n  See: stillproof --help, stillproof VERB --help."


def _reason(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    setting = "--" + ".".join(str(part) for part in first["loc"]).replace("_", "-")
    given = f" (given: {first['input']!r})" if first["type"] != "missing" else ""
    return f"{setting}: {first['msg']}{given}.\n  See: stillproof VERB --help."


def _complain(kind: str, what: str, code: int) -> int:
    with suppress(OSError, ValueError, AttributeError):  # a closed stream takes no complaint
        sys.stdout.flush()
    with suppress(OSError, ValueError, AttributeError):
        print(f"{kind}: {what}", file=sys.stderr)
    return code
