"""Who takes part in a theft: the defences, the thieves, and who of them can steal under these circumstances."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from stillproof.core.plugins import build, table
from stillproof.core.spec import Spec
from stillproof.errors import InputError
from stillproof.theft.asking import ChoosesQueries
from stillproof.theft.defences import Defence
from stillproof.theft.thieves import Demanding, Prospect, Thief
from stillproof.theft.thieves.recovery import Recovery, guessed

FIXED_KD = "kd?temperature=4&alpha=0.9"
"""The thief of the papers: what `all` reports beside the thieves who tune."""

K_CENTRE = "active?choose=k-centre"
"""Active learning by its other choice: `all` has both."""

LABEL_ONLY = "label-only"
"""The thief at the floor of every defence that keeps top-1; without labels, the one that gains are measured from."""

REFERENCE = "reference"
"""The student that never saw an answer, among those whose adversarial examples are shown to what is served."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Who takes part: the same in the plan and in the conclusion."""

    seeds: tuple[int, ...]
    defences: Mapping[str, Defence]
    thieves: Mapping[str, Thief]
    calibrated: bool = False
    """Whether responses are tuned to a distance."""

    def served(self) -> tuple[str, ...]:
        """The victim as it is, and under each defence."""
        return ("victim", *self.defences)

    def judged(self, *, labelled: bool) -> set[str]:
        """The thieves by whom a finding may be decided: with labels nobody who chose which of them it learns, since the
        reference, from which gains are measured, did not choose."""
        return {text for text, thief in self.thieves.items() if not (labelled and _chooses_labels(thief))}

    def knows(self, defence: str) -> bool:
        """Whether a thief takes part who knows the response of a defence, and its strength where that was tuned; of one
        without there is nothing to know."""
        response = self.defences[defence].response
        if response is None:
            return True
        tuned = self.calibrated and response.strength is not None
        return any(
            isinstance(thief, Recovery) and thief.undoes(response) and (thief.calibrated or not tuned)
            for thief in self.thieves.values()
        )

    def who_left(self, outputs: Collection[str]) -> Cast:
        """Those of whom a copy is among the outputs of a run. outputs: its names."""
        left = {text: thief for text, thief in self.thieves.items() if f"{self.seeds[0]}/victim/{text}" in outputs}
        return replace(self, thieves=left)

    def copies(self, *, labelled: bool) -> dict[str, str]:
        """Who makes a copy, with its title: the thieves and, where there are labels, the reference."""
        found = {text: thief.title for text, thief in self.thieves.items()}
        return found | ({REFERENCE: REFERENCE} if labelled else {})


def assembled(
    defences: Sequence[str],
    thieves: Sequence[str],
    *,
    labelled: bool,
    scores: bool,
    others: bool,
    calibrated: bool,
    seeds: tuple[int, ...],
    prospect: Prospect | None = None,
) -> Cast:
    """Thieves and defences by their SPECs; the thieves that are there for `all`.

    labelled: whether the thief knows true labels; scores: whether more than labels is revealed; others: whether there
    are other people's images; calibrated: whether responses are tuned to a distance; prospect: None where nothing is to
    be looked at, since a run has told already (`who_left`). Raises InputError for what does not exist or cannot work.
    """
    against = {text: Defence.parse(text) for text in defences}
    everyone = (
        [*table("thief"), FIXED_KD, K_CENTRE, *_informed(against.values(), calibrated=calibrated)]
        if "all" in thieves
        else []
    )
    found: dict[str, Thief] = {}
    for name in dict.fromkeys([*everyone, *(name for name in thieves if name != "all")]):
        thief: Thief = build("thief", Spec.parse(name))
        why_not = (
            "it needs the true labels, and --no-labels says that there are none"
            if thief.needs_labels and not labelled
            else "it reads scores, and the oracle reveals labels alone"
            if thief.reads == "scores" and not scores
            else "it asks about other people's images, and --query-data names none"
            if isinstance(thief, ChoosesQueries) and thief.wants_others and not others
            else thief.why_not(prospect)
            if isinstance(thief, Demanding) and prospect is not None
            else ""
        )
        if not why_not:
            found[name] = thief
        elif name in thieves:
            raise InputError(f"the thief {name!r} cannot steal here: {why_not}.", "Leave it out of --thief.")
    if not found:
        raise InputError("no thief takes part.", f"Name some with --thief: {', '.join(table('thief'))}, or all.")
    if not labelled:  # without labels there is no reference: the gain is measured from this thief
        found.setdefault(LABEL_ONLY, build("thief", Spec(LABEL_ONLY)))
    made = Cast(seeds, against, found, calibrated)
    if not made.judged(labelled=labelled):
        raise InputError(
            f"by {', '.join(found)} alone no theft can be judged: who chooses what is labelled gains by that as well.",
            "Name another thief beside it, kd say.",
        )
    return made


def _chooses_labels(thief: Thief) -> bool:
    return isinstance(thief, ChoosesQueries) and thief.chooses_labels


def _informed(defences: Iterable[Defence], *, calibrated: bool) -> list[str]:
    """Thieves who know the response that they are up against, where answers alone undo it: as it was written, or, where
    it is tuned to a distance, at the strength that came of that."""
    found: list[str] = []
    for defence in defences:
        written = " ".join(defence.text.split("+")[1 if defence.hardening_text else 0 :])
        try:
            response = guessed(written)
        except InputError:
            continue
        thief = Spec.parse("recovery").with_option("guess", written)
        if calibrated and response.strength is not None:
            found.append(str(thief.with_option("calibrated", "true")))
        elif written != Recovery().guess:  # that one takes part anyhow
            found.append(str(thief))
    return found
