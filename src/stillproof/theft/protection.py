"""From measured numbers to findings: net gain, protection, utility, and whether a defence took.

"right" arrays are bool, (seeds, images): which test images a classifier gets right, seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stillproof.core import measures
from stillproof.core.measurement import Measurement
from stillproof.core.measures import unmeasured
from stillproof.findings import Finding, Status, judge, worst

Array = npt.NDArray[Any]

NEGLIGIBLE = 0.02
"""A net gain that is surely below this is none."""

SIGNAL_TEMPERATURE = 4.0
"""Where the teacher's signal is compared: the temperature at which the papers' thieves read it."""

ONE_SEED = "One seed: training randomness alone can do this, so nothing is concluded."

SAME_SIGNAL = 1e-6
"""Mean KL, in nats, up to which two served answers are the same to float32."""


@dataclass(frozen=True, slots=True)
class Theft:
    """What the best thief got out of one served classifier."""

    thief: str
    right: Array
    """The thief's, (seeds, images)."""
    baseline_right: Array
    """The independent reference's; without labels, the label-only thief's."""
    baseline: str
    is_baseline: bool = False
    """Whether thief and baseline are one: then there is no gain to speak of."""
    thief_diverged: bool = False
    """Whether its training did: there is then no copy."""
    baseline_diverged: bool = False

    @property
    def gain(self) -> Measurement:
        """Net gain: thief − baseline, never clipped. Without a value where the training of one of them diverged."""
        if self.thief_diverged or self.baseline_diverged:
            who = self.thief if self.thief_diverged else self.baseline
            return unmeasured(f"not measurable: the training of the {who} diverged", n=len(self.right))
        return measures.difference(self.right, self.baseline_right)

    @property
    def accuracy(self) -> Measurement:
        """Of the copy, on the test images."""
        return copy_accuracy(self.right, diverged=self.thief_diverged)


def copy_accuracy(right: Array, *, diverged: bool) -> Measurement:
    """Share of the test images that a copy gets right, (seeds, N). Without a value where its training diverged."""
    if diverged:
        return unmeasured("its training diverged", n=len(right))
    return measures.mean_share(right)


def best(scores: Mapping[str, tuple[Array, Array]]) -> str:
    """The thief with the best candidate on held-out queries; the test set has no say.

    scores: for each thief the held-out scores and losses of its candidates, both (seeds, candidates). They are
    averaged over seeds before the best is taken, so that many candidates are less of an advantage by chance;
    among equals the smaller loss decides.
    """

    def rank(name: str) -> tuple[float, float]:
        means, losses = (array.mean(axis=0) for array in scores[name])
        return max(zip(means.tolist(), (-losses).tolist(), strict=True))

    return max(scores, key=rank)


def lost_to_the_defence(undefended: Theft, defended: Theft) -> Measurement:
    """Accuracy of a thief's copy of the victim − that of its copy of what the defence serves, seed by seed."""
    for found in (undefended, defended):
        if found.thief_diverged:
            return found.accuracy
    return measures.difference(undefended.right, defended.right)


def protection(undefended: Theft, defended: Theft) -> Measurement:
    """1 − gain_defended / gain_undefended; unmeasured where there is no gain to protect from, or none is known."""
    for found in (undefended.gain, defended.gain):
        if found.value is None:
            return unmeasured(found.method, n=len(defended.right))
    if not (undefended.gain.low or 0) > 0:
        return unmeasured("undefined: the gain from the undefended victim is inside the noise", n=len(defended.right))
    left = measures.ratio(_gains(defended), _gains(undefended))
    if left.value is None or left.low is None or left.high is None:
        return left
    return left.model_copy(update={"value": 1 - left.value, "low": 1 - left.high, "high": 1 - left.low})


def protection_by_bootstrap(undefended: Theft, defended: Theft) -> tuple[float, float]:
    """The same by a paired bootstrap over seeds and images (too narrow for few seeds: docs/decisions/0004)."""
    paired = np.stack([_gains(defended), _gains(undefended)], axis=2)

    def value(means: Array) -> float:
        defended_gain, undefended_gain = means.mean(axis=0)
        return 1 - float(defended_gain / undefended_gain) if undefended_gain > 0 else float("nan")

    return measures.paired_bootstrap(value, paired)


def _gains(theft: Theft) -> Array:
    return theft.right.astype(np.float64) - theft.baseline_right


def gain_finding(subject: str, theft: Theft, evidence: Sequence[str], others: Sequence[Theft] = ()) -> Finding:
    """SP-T1: a thief gains.

    others: what the other thieves got; SP-T1 passes only where the gain of each is surely below NEGLIGIBLE.
    """
    gain, n = theft.gain, len(theft.right)
    said = [*evidence, "The best thief was chosen on its own held-out queries, not on the test images."]
    if gain.value is None:
        said.append(f"The gain is {gain.method}.")
    if theft.is_baseline:
        status: Status = "inconclusive"
        gain = unmeasured("the best thief is the baseline itself", n=n)
        said.append("What its copy is worth cannot be told without labels: there is nothing to compare it with.")
    elif gain.low is not None and gain.low > 0:
        status = "fail"
    elif _none_gains((theft, *others)):
        status = "pass"
    else:
        status = "inconclusive"
    if n == 1 and status != "inconclusive":
        status = "inconclusive"
        said.append(ONE_SEED)
    title = {
        "fail": "A thief gains from the answers",
        "pass": f"No thief gains {100 * NEGLIGIBLE:g} points from the answers",
        "inconclusive": "Whether a thief gains is not settled",
        "error": "",
    }[status]
    advice = {
        "fail": "Serve less (--reveal label shows the floor), limit queries, or harden: stillproof harden.",
        "inconclusive": "More seeds and more test images narrow the interval.",
    }
    return Finding(
        rule="SP-T1",
        subject=subject,
        title=f"{title}: {theft.thief} against the {theft.baseline}",
        status=status,
        severity="high",
        measurements={"net gain": gain, "test accuracy of the copy": theft.accuracy},
        evidence=said,
        advice=advice.get(status, ""),
    )


def _none_gains(thefts: Sequence[Theft]) -> bool:
    """Whether each gain is surely negligible."""
    return all(found.gain.high is not None and found.gain.high <= NEGLIGIBLE for found in thefts)


def _doubts(undefended: Theft, defended: Theft, promised: float, others: Sequence[Theft]) -> list[str]:
    """Why the protection from the best thief is not the whole truth."""
    said = []
    if defended.is_baseline and not _none_gains(others):
        what = f"the {defended.baseline}, from which gains are measured, and that no other thief gains"
        said.append(f"With it the best thief is {what} {100 * NEGLIGIBLE:g} points is not shown.")
    for found in others:
        if judge(protection(undefended, found), promised, good="above") == "fail":
            what = "was not the best by held-out queries, and surely keeps more than the promise leaves"
            said.append(f"{found.thief} {what}.")
    return said


def protection_finding(
    subject: str,
    undefended: Theft,
    defended: Theft,
    promised: float,
    took: Status,
    *,
    known: bool = True,
    others: Sequence[Theft] = (),
) -> Finding:
    """SP-T2: the defence protects less than promised against the best thief.

    known: whether a thief took part who knows the defence's response. others: what thieves got in spite of it. It does
    not pass where one of them surely kept more than the promise leaves, or where the best one is the baseline itself,
    whose gain is 0 whatever happened, and that no other gains is not shown.
    """
    measured = protection(undefended, defended)
    status = judge(measured, promised, good="above")
    evidence = [
        f"Best thief without the defence: {undefended.thief}; with it: {defended.thief}.",
        "A defence that keeps top-1 on the queries cannot push the best thief below the label-only thief.",
    ]
    if not known:
        evidence.append("No thief who knows this defence took part.")
    if measured.value is None:
        evidence.append(f"Protection is {measured.method}.")
    else:
        low, high = protection_by_bootstrap(undefended, defended)
        evidence.append(f"Paired bootstrap over seeds and images: [{low:.3f}, {high:.3f}].")
    if status != "fail" and len(defended.right) > 1:
        doubts = _doubts(undefended, defended, promised, others)
        evidence += doubts
        status = "inconclusive" if doubts else status
    if took != "pass":
        how = "did not take" if took == "fail" else "may not have taken"
        evidence.insert(0, f"The defence {how} (SP-T4), so no protection is claimed for it.")
    if len(defended.right) == 1:
        evidence.append(ONE_SEED)
    if (status == "pass" and took != "pass") or took == "fail" or len(defended.right) == 1:
        status = "inconclusive"
    return Finding(
        rule="SP-T2",
        subject=subject,
        title=f"Protection against the best thief, promised {promised:.0%}",
        status=status,
        severity="high",
        measurements={
            "protection": measured,
            "net gain, undefended": undefended.gain,
            "net gain, defended": defended.gain,
        },
        evidence=evidence,
        advice="Judge a defence by the thief who adapts to it, not by one with a fixed temperature."
        if status == "fail"
        else "",
    )


def utility_finding(
    subject: str, victim_right: Array, defended_right: Array, budget: float, evidence: Sequence[str] = ()
) -> Finding:
    """SP-T3: the defence costs more utility than the budget."""
    drop = measures.difference(victim_right, defended_right)
    return Finding(
        rule="SP-T3",
        subject=subject,
        title=f"Accuracy lost to the defence, budget {budget:.1%}",
        status=judge(drop, budget, good="below"),
        severity="medium",
        measurements={"accuracy lost": drop},
        evidence=[_flips(victim_right, defended_right), *evidence],
        advice="",
    )


def _flips(victim_right: Array, defended_right: Array) -> str:
    values = [measures.mcnemar(a, b) for a, b in zip(victim_right, defended_right, strict=True)]
    return f"McNemar's test, seed by seed: p = {', '.join(f'{value:.2g}' for value in values)}."


def took_finding(
    subject: str,
    *,
    victim: Sequence[Array],
    defended: Sequence[Array],
    retrained: Sequence[Array] | None,
    utility: Status,
    diverged: Sequence[str] = (),
    deterministic: bool = True,
) -> Finding:
    """SP-T4: did the defence take? Its answers must differ from the victim's by more than a retraining does.

    victim, defended: logits on the same images, (n, K), one array a seed. retrained: those of another honest
    victim for each seed; with one seed, of as many as there are; None where nothing was trained (a response before the
    victim itself): then every change of the answers is the defence's, if the victim is deterministic. diverged: how its
    training did, where it did; the answers are then those of a network that was not trained.
    """
    T = SIGNAL_TEMPERATURE
    change = np.stack([measures.kl_per_image(a, b, T) for a, b in zip(victim, defended, strict=True)])
    shown = {
        "KL to the original answers": measures.difference(change, np.zeros_like(change), "nats"),
        "entropy, original": _entropy(victim),
        "entropy, defended": _entropy(defended),
        "top-1 agreement": measures.mean_share(
            np.stack([a.argmax(axis=1) == b.argmax(axis=1) for a, b in zip(victim, defended, strict=True)])
        ),
    }
    evidence = [f"Answers read at T = {T:g}, on the thief's queries or on images that nothing was trained on."]
    if float(change.mean()) <= SAME_SIGNAL:
        signal: Status = "fail"
        title = "The defence did not take: its answers are the victim's own"
    elif retrained is None and not deterministic:
        signal = "inconclusive"
        title = "Whether the defence took cannot be told from the victim's own randomness"
        evidence.append("The victim answers the same image differently each time, whatever the response does.")
    elif retrained is None:
        signal = "pass"
        title = "The defence took: its answers are not the victim's own"
        evidence.append("Nothing was trained, so all of the difference is the response's.")
    else:
        signal, beyond = _beyond_a_retraining(victim, change, retrained)
        shown["KL beyond that of a retraining"] = beyond
        title = {
            "pass": "The defence took: its answers differ by more than a retraining's",
            "fail": "The defence did not take: a mere retraining changes the answers as much",
            "inconclusive": "Whether the defence took cannot be told from a retraining",
            "error": "",
        }[signal]
    if utility == "fail":
        evidence.append("Its accuracy is outside the budget (SP-T3): a classifier that broke has not been hardened.")
        title = "The defence did not take: it broke the classifier" if signal != "fail" else title
    if diverged:
        title = "The defence did not take: its training diverged"
        evidence += [f"{how[0].upper()}{how[1:]} Measured is the network that training began with." for how in diverged]
    broke = utility == "fail" or bool(diverged)
    return Finding(
        rule="SP-T4",
        subject=subject,
        title=title,
        status=worst([signal, "fail" if broke else "pass"]),
        severity="high",
        measurements=shown,
        evidence=evidence,
        advice="Lower the defence's weight; then look here again."
        if broke
        else "Train longer, or raise the defence's weight; then look here again."
        if signal != "pass"
        else "",
    )


def _entropy(answers: Sequence[Array]) -> Measurement:
    """Mean over seeds and images, in nats."""
    found = np.stack([measures.entropy_per_image(logits, SIGNAL_TEMPERATURE) for logits in answers])
    return measures.difference(found, np.zeros_like(found), "nats")


def _beyond_a_retraining(
    victim: Sequence[Array], change: Array, retrained: Sequence[Array]
) -> tuple[Status, Measurement]:
    """Is the defence's change of the answers, (seeds, n), more than that of honest retrainings?

    Several seeds: seed by seed, each with its own retraining. One seed and several retrainings: against where
    another retraining would fall (a prediction interval). One and one: it cannot be told.
    """
    T = SIGNAL_TEMPERATURE
    if len(victim) > 1:
        usual = np.stack([measures.kl_per_image(a, b, T) for a, b in zip(victim, retrained, strict=True)])
        beyond = measures.difference(change, usual, "nats")
        return judge(beyond, 0.0, good="above"), beyond
    means = [float(measures.kl_per_image(victim[0], other, T).mean()) for other in retrained]
    beyond = measures.beyond(float(change.mean()), means, "nats")
    return ("inconclusive" if len(means) < 2 else judge(beyond, 0.0, good="above")), beyond
