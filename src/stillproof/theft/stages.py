"""The jobs of a theft: ask the oracle, try what the thief would try, settle, and be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.carving import carve
from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import TEACHER
from stillproof.core.images import ImageSet, as_float
from stillproof.core.measurement import Cost
from stillproof.core.plan import Context, job
from stillproof.core.stages import classifier_artefact, classifier_of, trained_artefact
from stillproof.core.store import Artefact
from stillproof.core.training import Fit, Recipe
from stillproof.errors import InputError, TrainingDiverged
from stillproof.serving.calibration import nearest_to
from stillproof.serving.guard import finite, guard
from stillproof.serving.oracle import Oracle, Reveal
from stillproof.serving.responses import Response
from stillproof.theft.lesson import Candidate, Lesson, taught
from stillproof.theft.outcome import DIVERGED, divergence_of
from stillproof.theft.transfer import Queries, log_probabilities

Origin = Literal["outside", "inside"]
"""Where queries come from: images that the victim was not trained on, or those that it was."""

HELD_OUT = 0.2
"""Share of a thief's queries by which it chooses among its candidates."""

HELD = "held"
"""The tensor that marks, bool, (n,), by which images of a transfer set to choose; without it a fifth is drawn."""

SERVED = "served"
"""The tensor of the answers as they were served, log-probabilities, (n, K), where TEACHER holds others."""

CHOOSES_ONLY = "chooses_only"
"""The value that says whether what is held out only chooses, and the student that is kept does not learn it."""

WORST = 1e9
"""The loss of a candidate that diverged."""


@job(version=2)
def draw(_context: Context, data: Artefact, *, queries: Queries, origin: Origin, labelled: bool, seed: int) -> Artefact:
    """The thief's images, the same for every thief and every defence of one seed, and its labels if it has them.

    They are of all classes alike where so many a class are asked for, labels or not.
    """
    parts = carve(data)
    images = queries.draw(parts.pool if origin == "outside" else parts.training, seed)
    tensors = {"images": images.images} | ({"labels": images.known_labels()} if labelled else {})
    return Artefact({"classes": list(images.classes), "name": images.name}, tensors)


@job(version=3)
def ask(
    context: Context,
    served: Artefact,
    drawn: Artefact,
    helpers: Sequence[Artefact] = (),
    calibration: Artefact | None = None,
    *,
    reveal: Reveal,
    response: Response | None = None,
) -> Artefact:
    """Query the served classifier: the thief's images with the answers."""
    images = images_of(drawn)
    oracle = opened(
        context,
        len(images),
        served=served,
        helpers=helpers,
        calibration=calibration,
        reveal=reveal,
        response=response,
    )
    answers = log_probabilities(oracle.ask(images), reveal, len(images.classes))
    values = {**drawn.values, "queries": oracle.queries, "bits": oracle.bits}
    cost = Cost(queries=oracle.queries, forwards=oracle.queries * (1 + len(helpers)))
    return Artefact(values, {**drawn.tensors, TEACHER: answers}, cost)


def opened(
    context: Context,
    budget: int,
    *,
    served: Artefact,
    reveal: Reveal,
    response: Response | None = None,
    helpers: Sequence[Artefact] = (),
    calibration: Artefact | None = None,
) -> Oracle:
    """The oracle of a served classifier, behind its response if it has one."""
    return Oracle(
        classifier_of(served, context),
        reveal,
        context.runtime,
        budget=budget,
        response=None if response is None else tuned(response, calibration),
        helpers=[classifier_of(helper, context) for helper in helpers],
    )


@job(version=2)
def signal(
    context: Context,
    classifier: Artefact,
    drawn: Artefact,
    helpers: Sequence[Artefact] = (),
    calibration: Artefact | None = None,
    *,
    response: Response | None = None,
) -> Artefact:
    """Logits on the thief's images, all classes: what the gates compare. With a response, what it serves."""
    logits = finite(
        predict(answering(context, classifier, response, helpers, calibration), images_of(drawn), context.runtime)
    )
    return Artefact({}, {"logits": logits})


@job(version=1)
def answer_test(
    context: Context,
    classifier: Artefact,
    data: Artefact,
    helpers: Sequence[Artefact] = (),
    calibration: Artefact | None = None,
    *,
    response: Response,
) -> Artefact:
    """What is served about the test images through a response: `logits`, (N, K), and the `labels`.

    A response that remembers begins afresh: its users' queries and the thief's are not mixed.
    """
    test = carve(data).test
    served = answering(context, classifier, response, helpers, calibration)
    logits = finite(predict(served, test, context.runtime))
    cost = Cost(forwards=len(test) * (1 + len(helpers)))
    return Artefact({}, {"logits": logits, "labels": test.known_labels()}, cost)


@job(version=2)
def calibrate(
    context: Context,
    classifier: Artefact,
    drawn: Artefact,
    helpers: Sequence[Artefact] = (),
    *,
    response: Response,
    l1: float,
) -> Artefact:
    """The strength at which a response changes a classifier's answers to the thief's queries by `l1` on average.

    Where it cannot, the nearest; `l1` says what that is, and `misses` that it is another.
    """
    images = images_of(drawn)
    found = nearest_to(
        response,
        predict(classifier_of(classifier, context), images, context.runtime),
        l1,
        images=as_float(images.images) if response.reads_images else None,
        helpers=[classifier_of(helper, context) for helper in helpers],
    )
    option = found.response.strength.option if found.response.strength is not None else ""
    values = {"option": option, "value": getattr(found.response, option), "l1": found.l1, "misses": found.misses(l1)}
    return Artefact(values, {}, Cost(forwards=len(images) * (1 + len(helpers))))


def tuned(response: Response, calibration: Artefact | None) -> Response:
    """A response with the strength that its calibration found, if there is one."""
    if calibration is None:
        return response
    found: Response = replace(response, **{calibration.values["option"]: calibration.values["value"]})  # type: ignore[type-var]
    return found


def answering(
    context: Context,
    classifier: Artefact,
    response: Response | None,
    helpers: Sequence[Artefact],
    calibration: Artefact | None,
) -> nn.Module:
    """What answers: the classifier, behind its response if it has one. What a response remembers begins afresh."""
    model = classifier_of(classifier, context)
    if response is None:
        return model
    return guard(model, tuned(response, calibration), [classifier_of(helper, context) for helper in helpers])


@job(version=3)
def attempt(
    context: Context, transfer: Artefact, *, objective: Candidate, model: Model, recipe: Recipe, seed: int
) -> Artefact:
    """One candidate, trained on four fifths of the queries and scored on the others. One that diverges scores 0."""
    images = images_of(transfer)
    if HELD in transfer.tensors:
        held, kept = (rows.nonzero().flatten() for rows in (transfer.tensors[HELD], ~transfer.tensors[HELD]))
    else:
        kept, held = images.split((1 - HELD_OUT, HELD_OUT), seed)
    if not len(held):
        raise InputError(f"{len(images)} queries leave none to choose by.", "Ask for at least 2 of each class.")
    try:
        student, trained = taught(
            Lesson(context, images.subset(kept), _answers(transfer, kept), model, recipe, seed), objective
        )
    except TrainingDiverged as error:
        return Artefact({"score": 0.0, "loss": WORST, DIVERGED: error.what})
    logits = predict(student, images.subset(held), context.runtime)
    told = SERVED if SERVED in transfer.tensors else TEACHER
    goal = transfer.tensors[told][held].argmax(dim=1) if images.labels is None else images.labels[held]
    values = {
        "score": float((logits.argmax(dim=1) == goal).double().mean()),
        "loss": float(F.cross_entropy(logits, goal)),
    }
    return Artefact(values, {}, Cost(forwards=trained.forwards + len(held), backwards=trained.backwards))


@job(version=5)
def settle(
    context: Context,
    transfer: Artefact,
    attempts: Sequence[Artefact],
    data: Artefact,
    *,
    objectives: Sequence[Candidate],
    model: Model,
    recipe: Recipe,
    seed: int,
) -> Artefact:
    """The candidate that scored best, trained on all queries, and what it says about the test images.

    Where those that are held out only choose, it is trained on the others. Best: most held-out images right; among
    equals the smaller loss; where training that one diverges now, the next. If none is left the artefact holds the
    network that training began with, and how it diverged (theft.outcome).
    """
    images, test = images_of(transfer), carve(data).test
    learnt = ~transfer.tensors[HELD] if transfer.values.get(CHOOSES_ONLY) else torch.ones(len(images), dtype=torch.bool)
    rows = learnt.nonzero().flatten()
    lesson = Lesson(context, images.subset(rows), _answers(transfer, rows), model, recipe, seed)
    noted = {
        "scores": [tried.values["score"] for tried in attempts],
        "losses": [tried.values["loss"] for tried in attempts],
        "queries": transfer.values.get("queries", 0),
        "bits": transfer.values.get("bits", 0.0),
    }
    found = _best_that_trains(lesson, attempts, objectives)
    if isinstance(found, str):
        student = lesson.student().eval()
        noted |= {"chosen": None, DIVERGED: found}
        made = classifier_artefact(student, model.untrained, images, cost=Cost(), **noted)
    else:
        chosen, student, trained = found
        made = trained_artefact(student, trained, model, images, chosen=chosen, **noted)
    logits = predict(student, test, context.runtime)
    return Artefact(made.values, {**made.tensors, "logits": logits, "labels": test.known_labels()}, made.cost)


def _best_that_trains(
    lesson: Lesson, attempts: Sequence[Artefact], objectives: Sequence[Candidate]
) -> tuple[int, nn.Module, Fit] | str:
    """Which candidate it is, its student, and what training it took; or how the last one diverged."""
    able = [number for number, tried in enumerate(attempts) if divergence_of(tried) is None]
    how = str(divergence_of(attempts[-1]))
    for number in sorted(able, key=lambda each: (-attempts[each].values["score"], attempts[each].values["loss"])):
        try:
            return number, *taught(lesson, objectives[number])
        except TrainingDiverged as error:
            how = error.what
            lesson = replace(lesson, context=replace(lesson.context, checkpoint=None))  # it holds what diverged
    return how


def _answers(transfer: Artefact, rows: Tensor) -> dict[str, Tensor]:
    """The columns of answers, also as they were served where they were changed since; the reference has none."""
    return {name: transfer.tensors[name][rows] for name in (TEACHER, SERVED) if name in transfer.tensors}


def images_of(transfer: Artefact) -> ImageSet:
    """The thief's images, with its labels if it has them."""
    tensors, values = transfer.tensors, transfer.values
    return ImageSet(tensors["images"], tensors.get("labels"), tuple(values["classes"]), values["name"])
