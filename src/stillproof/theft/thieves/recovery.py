"""The thief who guesses what a response does to an answer, and learns to undo it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import LEAST, TEACHER, Batch, CrossEntropy, Distillation
from stillproof.core.images import ImageSet
from stillproof.core.measurement import Cost
from stillproof.core.noise import Noise, derive, permutation
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.spec import Spec
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import InputError
from stillproof.serving.guard import guard
from stillproof.serving.oracle import Reveal, shown
from stillproof.serving.responses import Response
from stillproof.serving.responses.joined import parts_of, response_of
from stillproof.theft.asking import LearnsByKD, Situation, spread
from stillproof.theft.lesson import BUDGET, Lesson
from stillproof.theft.stages import HELD_OUT, SERVED, ask, images_of, tuned
from stillproof.theft.thieves import titled
from stillproof.theft.transfer import log_probabilities

SHADOWS = 2
"""Shadow students: each is trained on its part of the queries and answers about the rest."""

# how the map is learnt: Adam, its rate falling to 0 along a cosine
STEPS, BATCH, RATE = 1000, 256, 3e-3

COLDEST, HOTTEST = 0.25, 4.0
"""How sure of itself the victim is, is not known: shadow answers are taken at temperatures between these."""


def shadow_parts(images: ImageSet, kept: Tensor, held: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    """For each shadow student the rows that it learns, and those that it answers about: int64.

    kept, held: the rows that may be learnt, and the others. Each student learns its part of those, and answers about
    the rest of them. Where a part would have fewer than two images, too few to train on, one student learns them all
    and answers about those that are held out.
    """
    known, shares = images.subset(kept), (1 / SHADOWS,) * SHADOWS
    for each in (known, replace(known, labels=None)):  # with one image a class left, a part would have all of them
        parts = [kept[rows] for rows in each.split(shares, derive(seed, "shadow parts"))]
        if all(len(rows) > 1 for rows in parts):
            return [(rows, torch.cat(parts[:number] + parts[number + 1 :])) for number, rows in enumerate(parts)]
    return [(kept, held)]


def shadow_answers(answers: Tensor, many: int, seed: int) -> Tensor:
    """Answers that a victim might have: log-probabilities, (many, K).

    answers: of shadow students, logits, (n, K). Of the samples one half are these answers at temperatures drawn evenly
    in the logarithm, a quarter Dirichlet around them with concentration K, a quarter Dirichlet with concentration 1
    around the centre.
    """
    classes = answers.shape[1]
    noise = Noise(derive(seed, "shadow answers"), torch.arange(many), 0)
    rows = noise.integers(0, len(answers), stream="row")
    temperatures = COLDEST * (HOTTEST / COLDEST) ** noise.uniform((1,), stream="temperature")
    softened = (answers[rows] / temperatures).log_softmax(dim=1)
    half, quarter = many // 2, many // 4
    around = classes * answers[rows[half : half + quarter]].softmax(dim=1)
    centre = torch.full((many - half - quarter, classes), 1 / classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "Dirichlet"))
        drawn = torch.distributions.Dirichlet(torch.cat([around, centre]).clamp(min=LEAST)).sample()
    drawn = drawn.clamp(min=torch.finfo(torch.float32).tiny).log().log_softmax(dim=1)
    return torch.cat([softened[:half], drawn])


class Restorer(nn.Module):
    """p' -> p: log-probabilities to log-probabilities, (n, K), each row by itself.

    Two hidden layers read p' and log p' and add to log p', where a class of probability 0 counts as LEAST.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        width = min(max(64, 5 * classes), 1024)
        self.layers = nn.Sequential(
            nn.Linear(2 * classes, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
        )

    def forward(self, served: Tensor) -> Tensor:
        """The recovered answers."""
        logarithms = served.log_softmax(dim=1).clamp(min=math.log(LEAST))
        change: Tensor = self.layers(torch.cat([logarithms.exp(), logarithms / 10], dim=1))
        return (logarithms + change).log_softmax(dim=1)


def restorer(served: Tensor, original: Tensor, seed: int) -> Restorer:
    """Learns original answers from served ones, log-probabilities, (n, K), by soft cross-entropy.

    Not by `fit`: it is no classifier of images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "restorer"))
        made = Restorer(served.shape[1])
    optimiser = torch.optim.Adam(made.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    goals = original.exp()
    order = torch.empty(0, dtype=torch.int64)
    for step in range(STEPS):
        if len(order) < min(BATCH, len(served)):
            order = permutation(len(served), derive(seed, "restorer", step))
        rows, order = order[:BATCH], order[BATCH:]
        loss = F.cross_entropy(made(served[rows]), goals[rows])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return made.eval().requires_grad_(False)


def guessed(guess: str) -> Response:
    """The response that a guess names, several joined by `+` (which in a SPEC's value reads as a space).

    Raises InputError for none, and for one that answers alone do not determine.
    """
    response = response_of(Spec.parse_joined("+".join(guess.split())))
    for part in parts_of(response):
        needs = (
            "the images"
            if part.reads_images
            else "a network of the defender's"
            if part.needs_helper
            else "the memory of earlier queries"
            if part.remembers
            else ""
        )
        if needs:
            raise InputError(
                f"what {part.title} does to an answer depends on {needs}: a map from answer to answer cannot undo it.",
                "Guess another response: reverse-sigmoid, power, round, top, stingy, modelguard-w or label-only.",
            )
    return response


def answered(original: Tensor, response: Response, reveal: Reveal) -> Tensor:
    """What a thief would read had a victim with these answers the response: log-probabilities, (n, K)."""
    served = guard(nn.Identity(), response)(original)
    return log_probabilities(shown(served, reveal), reveal, original.shape[1])


@job(version=4)
def recover(
    context: Context,
    asked: Artefact,
    calibration: Artefact | None = None,
    *,
    guess: Response,
    reveal: Reveal,
    samples: int,
    model: Model,
    recipe: Recipe,
    seed: int,
) -> Artefact:
    """The transfer set with recovered answers; those that were served are kept as `served`.

    The shadow students learn the thief's labels (without any, the classes that the answers name) of the queries that
    are not held out. calibration: what the guessed response was tuned to, for a thief who knows that.
    """
    images, served = images_of(asked), asked.tensors[TEACHER]
    kept, held = images.split((1 - HELD_OUT, HELD_OUT), seed)  # as theft.stages.attempt does
    known = replace(images, labels=served.argmax(dim=1) if images.labels is None else images.labels)
    answers, cost = [], Cost()
    unwatched = Context(context.runtime, advance=context.advance)  # a checkpoint holds one student
    for number, (rows, others) in enumerate(shadow_parts(known, kept, held, seed)):
        lesson = Lesson(unwatched, known.subset(rows), {}, model, recipe, derive(seed, "shadow", number))
        student = lesson.student()
        trained = lesson.fit(student, CrossEntropy())
        answers.append(predict(student, known.subset(others), context.runtime))
        cost += Cost(forwards=trained.forwards + len(others), backwards=trained.backwards)
    original = shadow_answers(torch.cat(answers), samples, seed)
    restored = restorer(answered(original, tuned(guess, calibration), reveal), original, seed)(served)
    restored = restored.clamp(min=math.log(LEAST)).log_softmax(dim=1)  # below, nothing was told, and nothing learnt
    return Artefact(asked.values, {**asked.tensors, TEACHER: restored, SERVED: served}, cost)


@dataclass(frozen=True, kw_only=True)
class AsServed(Distillation):
    """KD of the answers as they were served, not as they were recovered."""

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        return super().__call__(student, replace(batch, columns={TEACHER: batch.columns[SERVED]}))

    def __str__(self) -> str:
        return f"{super().__str__()}, as served"


@dataclass(frozen=True, kw_only=True)
class Recovery(LearnsByKD):
    """Recovery (D-DAE, Chen et al. 2023), as ModelGuard's evaluation of it: learn p' -> p, recover, then KD.

    guess: SPEC of the response that the thief believes in. It is a level of knowledge: right, wrong, or right with
    another strength. calibrated: where that response stands before the victim, the thief knows the strength that it was
    tuned to (--response-l1). samples: shadow answers that are sent through it.

    As ModelGuard's code: shadow answers are Dirichlet around those of shadow students, the map has two hidden layers
    of its widths and learns by soft cross-entropy with Adam. Otherwise: two students of half the queries each instead
    of twenty of other data; also samples at several temperatures; the map reads logarithms too and begins near the
    answer itself; thousands of samples, not a million; 1000 steps; and half of what it tries are the answers as they
    were served, so that a wrong guess costs it no more than fewer tries.
    """

    guess: str = "reverse-sigmoid"
    calibrated: bool = False
    samples: int = 8000

    def __post_init__(self) -> None:
        if not 4 <= self.samples <= 1_000_000:
            raise InputError(f"samples={self.samples} is nothing to learn from.", "Give 4 to 1000000.")
        self._response()
        super().__post_init__()

    @property
    def knows(self) -> str:  # type: ignore[override]  # an option decides
        """What it believes: right, or wrong."""
        return f"which defence, or guesses it: {self._response().title}" + self.calibrated * ", and its strength"

    def _response(self) -> Response:
        return guessed(self.guess)

    def undoes(self, response: object) -> bool:
        """Whether this is the response that it guesses."""
        return self._response() == response

    @property
    def title(self) -> str:
        name = f"recovery from {self._response().title}" + self.calibrated * ", calibrated"
        return titled(name, {"T": self.temperature, "α": self.alpha})

    @property
    def substitutes(self) -> int:
        return SHADOWS

    def candidates(self) -> tuple[Distillation, ...]:
        """Of KD's tries as many as the budget has room for, each with the recovered and with the served answers."""
        recovered = spread(self.grid(), (BUDGET - SHADOWS) // 2)
        return (*recovered, *(AsServed(temperature=each.temperature, alpha=each.alpha) for each in recovered))

    def transfer(self, label: str, situation: Situation) -> Stage:
        """The stage that recovers what the shared questions were answered."""
        serving = situation.serving
        asked = stage(ask, label, passes=situation.queries, drawn=situation.drawn, **serving)
        knows_strength = self.calibrated and "calibration" in serving and self.undoes(serving["response"])
        return stage(
            recover,
            f"{label}, and recover",
            passes=3 * situation.queries * situation.recipe.epochs,
            asked=asked,
            guess=self._response(),
            reveal=serving["reveal"],
            samples=self.samples,
            **({"calibration": serving["calibration"]} if knows_strength else {}),
            **situation.training,
        )
