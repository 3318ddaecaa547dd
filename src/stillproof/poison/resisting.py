"""The jobs of distilling anyway: on what a scan leaves, with a consensus of views, and unlearning after it."""

from __future__ import annotations

import torch

from stillproof.core.carving import carve
from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import TEACHER, Objective
from stillproof.core.images import ImageSet, as_float
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive
from stillproof.core.plan import Context, job
from stillproof.core.stages import classifier_artefact, classifier_of, model_of, train_fresh, trained_artefact
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe, fit
from stillproof.errors import InputError
from stillproof.poison.resistant import Anchored, Unlearning, consensus, worst_change
from stillproof.poison.scanning import as_set, set_of

VIEWS = 4
"""Of the teacher's consensus, beside the plain image."""

FEWEST_LEFT = 0.2
"""Share of a transfer set that a scan must leave, or there is nothing to distil on."""


@job(version=1)
def assemble(_context: Context, data: Artefact, added: Artefact) -> Artefact:
    """The training part and what was added to it, as a transfer set that a scan reads."""
    training = carve(data).training
    more = ImageSet(added.tensors["images"], added.tensors["labels"], training.classes, training.name)
    return as_set(training.with_more(more))


@job(version=1)
def vouched(_context: Context, data: Artefact) -> Artefact:
    """The validation part, on which nothing was trained, as the trusted set."""
    return as_set(carve(data).validation)


@job(version=1)
def distil_on_the_rest(
    context: Context,
    teacher: Artefact,
    suspects: Artefact,
    scanned: Artefact | None = None,
    *,
    model: Model,
    objective: Objective,
    views: int,
    recipe: Recipe,
    seed: int,
) -> Artefact:
    """A student of what the scan does not flag, or of all. views: see `consensus`. Raises InputError."""
    images = set_of(suspects)
    if scanned is not None:
        kept = (~scanned.tensors["flagged"]).nonzero()[:, 0]
        if len(kept) < max(2, FEWEST_LEFT * len(images)):
            raise InputError(
                f"the scan flags all but {len(kept)} of {len(images)} images.", "Get another transfer set."
            )
        images = images.subset(kept)
    master = classifier_of(teacher, context)
    answers = consensus(master, images, views, runtime=context.runtime, seed=seed)
    student, trained = train_fresh(
        context, images, objective, model=model, recipe=recipe, seed=seed, columns={TEACHER: answers}
    )
    made = trained_artefact(student, trained, model, images)
    return Artefact(made.values, made.tensors, made.cost + Cost(forwards=(1 + views) * len(images)))


@job(version=1)
def answer_set(context: Context, classifier: Artefact, images: Artefact) -> Artefact:
    """What a classifier says about a set: `logits`, (N, K), and the `labels`."""
    shown = set_of(images)
    logits = predict(classifier_of(classifier, context), shown, context.runtime)
    return Artefact({}, {"logits": logits, "labels": shown.known_labels()}, Cost(forwards=len(shown)))


@job(version=1)
def unlearn(
    context: Context,
    teacher: Artefact,
    student: Artefact,
    trusted: Artefact,
    *,
    settings: Unlearning,
    recipe: Recipe,
    seed: int,
) -> Artefact:
    """The student, fine-tuned on trusted images: held to its teacher on them and on the worst changes of them.

    One fit a round, at the recipe's epochs; each round's change is added to those before.
    """
    images, runtime = set_of(trusted), context.runtime
    master, learner = classifier_of(teacher, context), classifier_of(student, context)
    columns = {TEACHER: predict(master, images, runtime)}
    pixels = as_float(images.images)
    changes: list[torch.Tensor] = []
    forwards = backwards = 0
    for number, size in enumerate(settings.sizes or (None,)):
        if size is not None:
            searching = derive(seed, "round", number)
            changes.append(worst_change(master, learner, pixels, size, settings, runtime=runtime, seed=searching))
            forwards += 2 * settings.steps * settings.batch_size
            backwards += settings.steps * settings.batch_size
        trained = fit(
            learner,
            Anchored(changes, settings.temperature),
            images,
            recipe=recipe,
            runtime=runtime,
            seed=derive(seed, "fit", number),
            columns=columns,
            advance=context.advance,
        )
        forwards, backwards = forwards + trained.forwards, backwards + trained.backwards * (1 + len(changes))
    cost = Cost(forwards=forwards + len(images), backwards=backwards)
    return classifier_artefact(learner, model_of(student, context), images, cost=cost)
