"""The thief who asks again, and averages whatever an oracle varies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.store import Artefact
from stillproof.errors import InputError
from stillproof.theft.asking import LearnsByKD, Questioning, Situation, portion
from stillproof.theft.thieves import titled


@job(version=3)
def ask_repeatedly(context: Context, drawn: Artefact, *, times: int, seed: int, **serving: Any) -> Artefact:
    """Ask about each image several times and keep the mean probabilities.

    The first image is asked about twice before anything else. If both answers are the same there is nothing to average,
    and the rest of the budget goes to other images, one query each. So it does where fewer than two images could be
    asked about so often: nobody learns from one.
    """
    work = Questioning(context, drawn, seed, **serving)
    if work.left < 2 * times:
        work.keep(work.rest, work.asked(work.rest))
        return work.artefact()
    first = work.rest.subset(torch.tensor([0]))
    once, again = work.asked(first), work.asked(first)
    others = work.rest.subset(torch.arange(1, len(work.rest)))
    if torch.equal(once, again):
        work.keep(first, once)
        asked = others.subset(torch.arange(work.left))
        work.keep(asked, work.asked(asked))
        return work.artefact()
    answers = [once, again, *(work.asked(first) for _ in range(times - 2))]
    work.keep(first, torch.stack(answers).exp().mean(dim=0).log())
    asked = others.subset(portion(others, work.left // times, seed))
    answers = [work.asked(asked) for _ in range(times)]
    work.keep(asked, torch.stack(answers).exp().mean(dim=0).log())
    return work.artefact()


@dataclass(frozen=True, kw_only=True)
class RepeatAveraging(LearnsByKD):
    """KD with labels from the mean of several answers about each of fewer images, within the same budget.

    Against an oracle that answers a question the same way each time it is KD with one image less.
    """

    times: int = 4

    knows: ClassVar[str] = "nothing; may ask about an image again"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.times <= 1000:
            raise InputError(f"times={self.times} is no repetition.", "Use 2 to 1000.")

    @property
    def title(self) -> str:
        return titled(f"repeat-averaging, {self.times} times", {"T": self.temperature, "α": self.alpha})

    def transfer(self, label: str, situation: Situation) -> Stage:
        """The stage that asks."""
        return stage(
            ask_repeatedly,
            label,
            passes=situation.queries,
            drawn=situation.drawn,
            times=self.times,
            seed=situation.seed,
            **situation.serving,
        )
