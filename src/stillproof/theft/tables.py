"""The tables of a theft's report, made of its account. NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stillproof.core import measures
from stillproof.core.measurement import Measurement
from stillproof.findings import Table
from stillproof.theft import protection
from stillproof.theft.account import VICTIM, Account, Array, Student


def tables(account: Account) -> list[Table]:
    """What a reader looks up."""
    found = [_gains(account)] if account.defences else []
    found += [_utility(account)]
    found += [_reference(account, account.reference)] if account.reference is not None else []
    found += [_thieves(account, name) for name in account.served]
    return [*found, _reuse(account)] if account.reused else found


def _gains(account: Account) -> Table:
    undefended = account.theft(VICTIM)
    rows: list[list[Any]] = [[VICTIM, undefended.thief, undefended.gain, None]]
    for name in account.defences:
        defended = account.theft(name)
        rows.append([name, f"best: {defended.thief}", defended.gain, protection.protection(undefended, defended)])
        if account.fixed is not None:
            before, after = account.theft(VICTIM, account.fixed), account.theft(name, account.fixed)
            rows.append([name, after.thief, after.gain, protection.protection(before, after)])
    return Table(
        title="Net gain and protection",
        columns=["served", "thief", "net gain", "protection"],
        rows=rows,
        note="Protection counts against the best thief; that against a fixed one shows what it alone would claim.",
    )


def _utility(account: Account) -> Table:
    rows: list[list[Any]] = []
    for name, logits in account.served.items():
        pairs = list(zip(account.served[VICTIM], logits, strict=True))
        flipped = np.stack([a.argmax(axis=1) != b.argmax(axis=1) for a, b in pairs])
        rows.append(
            [
                name,
                measures.mean_share(account.right(logits)),
                measures.mean_share(flipped),
                _over_seeds([measures.expected_calibration_error(x, account.labels) for x in logits]),
                _mean([measures.nll_per_image(x, account.labels) for x in logits], "nats"),
                _mean([measures.kl_per_image(a, b) for a, b in pairs], "nats"),
                _mean([measures.l1_per_image(a, b) for a, b in pairs], "probability"),
            ]
        )
    columns = [
        "served",
        "test accuracy",
        "top-1 flips",
        "ECE",
        "NLL",
        "KL to the original",
        "L1 to the original",
    ]
    return Table(title="What a defence costs its users", columns=columns, rows=rows)


def _reference(account: Account, reference: Student) -> Table:
    return Table(
        title="Independent reference",
        columns=["chosen, seed by seed", "test accuracy"],
        rows=[[reference.settings, account.accuracy(reference)]],
        note="The thief's images, labels, architecture and compute, tuned as hard, without the victim.",
    )


def _thieves(account: Account, served: str) -> Table:
    columns = [
        "held-out score",
        "test accuracy",
        "net gain",
        *(["lost to the defence"] if served != VICTIM else []),
        "agreement with what is served",
        "agreement with the original",
        "agreement on its mistakes",
    ]
    rows: list[list[Any]] = []
    for key, student in account.thefts[served].items():
        gone = measures.unmeasured("its training diverged", n=len(student.logits))
        rows.append(
            [
                student.title,
                student.settings,
                *(len(columns) * [gone] if student.diverged else _measured(account, served, key)),
                student.knows + account.pretrained * "; has pretrained weights",
                student.queries,
                round(student.bits),
            ]
        )
    columns = ["thief", "chosen, seed by seed", *columns, "knows", "queries", "bits"]
    return Table(title=f"Thieves of {served}", columns=columns, rows=rows, note=account.apart(served))


def _measured(account: Account, served: str, thief: str) -> list[Measurement]:
    """What the table of thieves says of one copy: held-out score to agreement on mistakes."""
    student = account.thefts[served][thief]
    original = [logits.argmax(axis=1) for logits in account.served[VICTIM]]
    answers = [logits.argmax(axis=1) for logits in account.served[served]]
    told = list(zip(student.guesses, answers, strict=True))
    before, after = account.theft(VICTIM, thief), account.theft(served, thief)
    return [
        measures.over_seeds(student.score, within=(0, 1)),
        after.accuracy,
        after.gain,
        *([protection.lost_to_the_defence(before, after)] if served != VICTIM else []),
        measures.mean_share(np.stack([s == t for s, t in told])),
        measures.mean_share(np.stack([s == o for s, o in zip(student.guesses, original, strict=True)])),
        _over_seeds([measures.agreement_on_mistakes(s, t, account.labels) for s, t in told]),
    ]


def _reuse(account: Account) -> Table:
    def share(hits: Sequence[Array], right: Sequence[Array]) -> Measurement:
        counts = [(int(hit.sum()), int(known.sum())) for hit, known in zip(hits, right, strict=True)]
        return _over_seeds([measures.share(hit, known) for hit, known in counts])

    rows: list[list[Any]] = [
        [served, found.title, share(found.fell, found.right), share(found.lucky, found.right)]
        for served, copies in account.reused.items()
        for copy, found in copies.items()
        if not _diverged(account, served, copy)
    ]
    known = "Those of the reference, which never saw an answer, anybody could make: what stands above them is what "
    known += "the theft was worth to an evader."
    return Table(
        title="Adversarial examples of the copy",
        columns=["shown to", "made on the copy of", "fooled", "fooled by a random change"],
        rows=rows,
        note="Of the test images that it classifies rightly. " + (known if account.reference is not None else ""),
    )


def _diverged(account: Account, served: str, copy: str) -> bool:
    """Whether the training of a copy did: of a thief's, or of the reference's."""
    student = account.thefts[served].get(copy, account.reference)
    return student is not None and bool(student.diverged)


def _mean(per_image: Sequence[Array], unit: str) -> Measurement:
    """Mean over seeds and images, with an interval that covers both."""
    values = np.stack(per_image)
    return measures.difference(values, np.zeros_like(values), unit)


def _over_seeds(found: Sequence[Measurement]) -> Measurement:
    if len({m.value for m in found}) == 1:  # one seed, or one classifier in all: its own interval
        return found[0]
    within = (0.0, 1.0 if found[0].unit == "fraction" else math.inf)
    values = [m.value for m in found if m.value is not None]
    if len(values) < len(found):
        return measures.unmeasured("not measurable in every seed", n=len(found), unit=found[0].unit)
    return measures.over_seeds(values, found[0].unit, within=within)
