"""What a person reads on stdout: the verdicts and tables of a result, or a plan that was not run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from stillproof.findings import Result, Status
from stillproof.runs.report import in_order
from stillproof.runs.wording import count, in_words

if TYPE_CHECKING:
    from stillproof.core.plan import Plan
    from stillproof.core.store import Store

_STYLES: dict[Status, str] = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "error": "bold red"}


def stdout_console() -> Console:
    """Where results go; honours NO_COLOR. A pipe gets lines that are never wrapped short."""
    console = Console(file=sys.stdout, highlight=False)
    return console if console.is_terminal else Console(file=sys.stdout, highlight=False, width=160)


def show(result: Result, console: Console) -> None:
    """Verdicts first, then the tables."""
    for finding in in_order(result.findings):
        line = Text(f"{finding.status.upper():<13}", _STYLES[finding.status])
        line.append(f"{finding.rule}  {finding.subject}: {finding.title}", "default")
        for name, measured in finding.measurements.items():
            line.append(f"\n{'':<13}{name} {in_words(measured)}", "dim")
        console.print(line)
    for note in result.notes:
        console.print(Text(f"{'NOTE':<13}{note}"))
    for table in result.tables:
        shown = RichTable(title=table.title, title_justify="left", title_style="bold")
        for column in table.columns:
            shown.add_column(Text(column), overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(in_words(cell)) for cell in row))
        console.print()
        console.print(shown)


def show_plan(plan: Plan, store: Store, console: Console) -> None:
    """The stages of a plan, what each costs, and whether its artefact is already there."""
    todo = {plan.key(found) for found in plan.needed(store)}
    shown = RichTable(title="Plan", title_justify="left", title_style="bold")
    for column in ("stage", "key", "image passes", ""):
        shown.add_column(column, justify="right" if column == "image passes" else "left", overflow="fold")
    seen: set[str] = set()
    for found in plan.order:
        key = plan.key(found)
        if key not in seen:
            seen.add(key)
            state = "to run" if key in todo else "there" if store.has(key) else "not needed"
            shown.add_row(Text(found.label), key[:8], count(found.passes), state)
    console.print(shown)
    passes = sum(found.passes for found in plan.needed(store))
    console.print(f"{len(todo)} of {len(seen)} stages to run, about {passes / 1e6:.2f} million image passes.")


def plan_as_json(plan: Plan, store: Store) -> dict[str, object]:
    """The same for machines."""
    todo = {plan.key(found) for found in plan.needed(store)}
    stages = {
        plan.key(found): {
            "stage": found.label,
            "passes": found.passes,
            "to_run": plan.key(found) in todo,
            "inputs": [plan.key(parent) for parent in found.parents()],
        }
        for found in plan.order
    }
    return {"digest": plan.digest, "stages": stages}
