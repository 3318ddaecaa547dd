"""The curves of a theft: what each thief gets, at which temperature it reads the answers, and for how many queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from stillproof.core import measures
from stillproof.core.measurement import Measurement
from stillproof.findings import Curve, Series
from stillproof.theft.account import VICTIM, Account

Array = npt.NDArray[Any]


def curves(account: Account) -> list[Curve]:
    """What a reader sees at a glance: the second where a thief took part that tries temperatures."""
    return [_accuracies(account), *([_temperatures(account, account.tuned)] if account.tuned is not None else [])]


def over_budgets(accounts: Sequence[Account]) -> Curve:
    """What the best thief gets, by how many queries it asks. accounts: one of each budget, of the same cast."""
    ordered = sorted(accounts, key=lambda account: account.asked)
    queries = [float(account.asked) for account in ordered]

    first, floor = ordered[0], ordered[0].floor
    accuracies = {name: [account.theft(name).accuracy for account in ordered] for name in first.served}
    if first.reference is not None:
        accuracies["reference"] = [account.accuracy(account.reference) for account in ordered if account.reference]
    if floor is not None:
        accuracies["labels alone"] = [account.accuracy(account.thefts[VICTIM][floor]) for account in ordered]
    found = [_series(name, queries, measured) for name, measured in accuracies.items()]
    return Curve(
        title="The best thief, by its queries",
        kind="line",
        x_label="queries",
        y_label="test accuracy",
        series=found,
        levels={VICTIM: float(first.right(first.served[VICTIM]).mean())},
        note="The best by held-out queries, which may be another at each budget.",
    )


def _accuracies(account: Account) -> Curve:
    series = [
        _series(
            name,
            [student.title for student in account.thefts[name].values()],
            [account.accuracy(student) for student in account.thefts[name].values()],
        )
        for name in account.served
    ]
    lines = {VICTIM: measures.mean_share(account.right(account.served[VICTIM]))}
    if account.reference is not None:
        lines["reference"] = account.accuracy(account.reference)
    if account.floor is not None:
        lines["labels alone"] = account.accuracy(account.thefts[VICTIM][account.floor])
    return Curve(
        title="What each thief gets",
        kind="bars",
        x_label="thief",
        y_label="test accuracy",
        series=series,
        levels={name: measured.value for name, measured in lines.items() if measured.value is not None},
        note="What stands above the reference is what the answers were worth to the thief. Labels alone: what the "
        "victim's answers give to a thief who sees no scores, the floor of every defence that keeps them.",
    )


def _temperatures(account: Account, thief: str) -> Curve:
    """Held-out score against T, each T with the α that did best there."""
    series = []
    for name in account.served:
        student = account.thefts[name][thief]
        by_temperature: dict[float, list[int]] = {}
        for index, temperature in enumerate(student.temperatures):
            by_temperature.setdefault(temperature, []).append(index)
        found = [
            measures.over_seeds(list(student.scores[:, indices].max(axis=1)), within=(0, 1))
            for indices in by_temperature.values()
        ]
        series.append(_series(name, list(by_temperature), found))
    return Curve(
        title="The temperature at which a thief reads the answers",
        kind="line",
        x_label="temperature T",
        y_label="held-out score",
        series=series,
        note="By this score a thief picks its own T; a defence measured at one T is measured against no thief.",
    )


def _series(name: str, x: list[str] | list[float], found: Sequence[Measurement]) -> Series:
    return Series(name=name, x=x, y=[m.value for m in found], low=[m.low for m in found], high=[m.high for m in found])
