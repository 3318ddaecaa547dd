"""The jobs that every verb's plan begins with, once there are data: classifiers trained, distilled or brought along."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from stillproof.core.adapters import FromProbabilities, inner
from stillproof.core.carving import carve
from stillproof.core.classifiers import Model, admit, predict
from stillproof.core.compression import CALIBRATED_ON, Compression, Quantised, calibration_of
from stillproof.core.distillation import TEACHER, CrossEntropy, Objective, OnlineTeacher
from stillproof.core.feature_distillation import FeatureObjective
from stillproof.core.images import ImageSet, as_float
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive, permutation
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.sources.source import Source
from stillproof.core.store import Artefact
from stillproof.core.training import Fit, Recipe, fit
from stillproof.core.weights import load_state, save_classifier
from stillproof.errors import InputError, StoreError

Part = Literal["test", "validation"]

STATE = "state."
"""What the names of a classifier's weights begin with in an artefact."""

CALIBRATION = "calibration"
"""Images, uint8, (n, C, H, W), of an artefact whose classifier is deployed in INT8: they set its ranges."""


@job(version=2)
def bring_classifier(context: Context, data: Artefact, *, model: Model, state: str | None = None) -> Artefact:  # noqa: ARG001
    """A classifier that brings its own weights, looked at before anything is built on it.

    state: in the stage's key alone (see `Model.state`).
    """
    validation = carve(data).validation
    made, facts = admit(model.build(validation.shape, len(validation.classes)), validation, model.text)
    accuracy = _accuracy(made, validation, context)
    return classifier_artefact(
        made,
        model,
        validation,
        differentiable=facts.differentiable,
        deterministic=facts.deterministic,
        validation_accuracy=accuracy,
        cost=Cost(forwards=len(validation) + 2 * min(len(validation), 64), backwards=min(len(validation), 64)),
    )


@job(version=1)
def train_classifier(
    context: Context,
    data: Artefact,
    *,
    model: Model,
    recipe: Recipe,
    seed: int,
    objective: Objective = CrossEntropy(),  # noqa: B008
) -> Artefact:
    """A classifier trained on the training part, from fresh weights: on its labels, or towards another objective."""
    parts = carve(data)
    student, trained = train_fresh(
        context,
        parts.training,
        objective,
        model=model,
        recipe=recipe,
        seed=seed,
        validation=parts.validation,
    )
    return trained_artefact(student, trained, model, parts.training)


def training_stage(
    what: str,
    *,
    data: Stage,
    model: Model,
    recipe: Recipe,
    seed: int,
    images: int,
    objective: Objective | None = None,
    passes: int = 3,
) -> Stage:
    """The stage that trains a classifier. images: how many it is trained on, for the estimate of work; objective: None
    is plain training on the labels; passes: that one image costs."""
    chosen = {} if objective is None else {"objective": objective}
    return stage(
        train_classifier,
        f"train {what}, seed {seed}",
        passes=passes * images * recipe.epochs,
        data=data,
        model=model,
        recipe=recipe,
        seed=seed,
        **chosen,
    )


def classifier_stage(
    what: str,
    *,
    data: Stage,
    model: Model,
    recipe: Recipe,
    seed: int,
    images: int,
    objective: Objective | None = None,
    passes: int = 3,
) -> Stage:
    """The stage that brings a classifier along if it has weights, and trains it if not. Raises InputError."""
    model.identity()  # a missing file is an error now, not after an hour of other stages
    if model.is_trained:
        return stage(bring_classifier, f"look at {what}", data=data, model=model, **brought(model, data))
    return training_stage(
        what, data=data, model=model, recipe=recipe, seed=seed, images=images, objective=objective, passes=passes
    )


def brought(model: Model, data: Stage) -> dict[str, Any]:
    """The setting `state` of a stage that brings a classifier along, where it has one. data: a stage that reads a
    source. Raises InputError."""
    source = data.settings["source"]
    state = model.state(source.open()) if isinstance(source, Source) else None
    return {} if state is None else {"state": state}


@job(version=2)
def distil(
    context: Context,
    teacher: Artefact,
    data: Artefact,
    added: Artefact | None = None,
    *,
    model: Model,
    objective: Objective | FeatureObjective,
    online: bool,
    recipe: Recipe,
    seed: int,
) -> Artefact:
    """A student distilled on the training part: from answers on the plain images, or (online) on each view.

    A teacher whose features are matched sees each view. added: `images` and `labels` that somebody put into the
    transfer set.
    """
    parts = carve(data)
    transfer = _with_added(parts.training, added)
    master = classifier_of(teacher, context)
    student = fresh_student(transfer, model, seed)
    columns: dict[str, Tensor] = {}
    with ExitStack() as attached:
        goal: Objective
        if isinstance(objective, FeatureObjective):
            joined = objective.attach(student, master, transfer, context.runtime, seed)
            goal = attached.enter_context(joined)
        elif online:
            goal = OnlineTeacher(master, objective, context.runtime)
        else:
            goal, columns = objective, {TEACHER: predict(master, transfer, context.runtime)}
        trained = train(
            context,
            student,
            transfer,
            goal,
            recipe=recipe,
            seed=seed,
            columns=columns,
            validation=parts.validation,
        )
    asked = trained.forwards if not columns else len(transfer)
    made = trained_artefact(student, trained, model, transfer)
    return replace(made, cost=made.cost + Cost(forwards=asked))


def _with_added(transfer: ImageSet, added: Artefact | None) -> ImageSet:
    if added is None:
        return transfer
    more = ImageSet(added.tensors["images"], added.tensors["labels"], transfer.classes, "the added images")
    return transfer.with_more(more)


@job(version=1)
def compress(
    context: Context,
    teacher: Artefact,
    data: Artefact,
    added: Artefact | None = None,
    *,
    compression: Compression,
    objective: Objective,
    recipe: Recipe,
    seed: int,
) -> Artefact:
    """The teacher made smaller, and tuned by distillation from the teacher on the transfer set, cached answers.

    added: as for `distil`. Where it is quantised, its artefact holds the tuned weights and the images that set the
    ranges, and `classifier_of` makes the same INT8 classifier of them every time.
    """
    parts = carve(data)
    transfer = _with_added(parts.training, added)
    master, student = classifier_of(teacher, context), classifier_of(teacher, context)
    _check_trainable(student, transfer, teacher.values["spec"])
    if compression.quantises:  # what cannot be quantised is refused before it is tuned
        Quantised(classifier_of(teacher, context), transfer.images[:2])
    compression.begin(student)
    answers = predict(master, transfer, context.runtime)
    trained = train(
        context,
        student,
        transfer,
        objective,
        recipe=recipe,
        seed=seed,
        columns={TEACHER: answers},
        validation=parts.validation,
    )
    compression.end(student)
    made = trained_artefact(student, trained, model_of(teacher, context), transfer, compression=compression.title)
    tensors = made.tensors
    if compression.quantises:
        some = permutation(len(transfer), derive(seed, "calibration"))[:CALIBRATED_ON]
        tensors = {**tensors, CALIBRATION: transfer.images[some]}
    return Artefact(made.values, tensors, made.cost + Cost(forwards=len(transfer)))


def train_fresh(
    context: Context,
    images: ImageSet,
    objective: Objective,
    *,
    model: Model,
    recipe: Recipe,
    seed: int,
    columns: Mapping[str, Tensor] | None = None,
    validation: ImageSet | None = None,
) -> tuple[nn.Module, Fit]:
    """Fresh weights of the model's architecture, trained towards an objective within a stage."""
    student = fresh_student(images, model, seed)
    trained = train(
        context,
        student,
        images,
        objective,
        recipe=recipe,
        seed=seed,
        columns=columns,
        validation=validation,
    )
    return student, trained


def fresh_student(images: ImageSet, model: Model, seed: int) -> nn.Module:
    """Fresh weights of the model's architecture, drawn from the seed. Raises InputError if they cannot be trained."""
    return _trainable(model.fresh(images.shape, len(images.classes), seed), images, model)


def begun_student(images: ImageSet, model: Model, seed: int) -> nn.Module:
    """The weights that the model brings, for these classes; fresh ones if it brings none. Raises InputError."""
    return _trainable(model.begun(images.shape, len(images.classes), seed), images, model)


def _trainable(student: nn.Module, images: ImageSet, model: Model) -> nn.Module:
    if model.code is not None:  # a user's model may return probabilities; objectives take logits
        student, _ = admit(student, images, model.text)
        _check_trainable(student, images, model.text)
    return student


def _check_trainable(student: nn.Module, images: ImageSet, who: str) -> None:
    if not student(as_float(images.images[:2])).requires_grad:
        raise InputError(f"{who} cannot be trained: its output has no gradient.", "Remove detach() or no_grad().")


def train(
    context: Context,
    student: nn.Module,
    images: ImageSet,
    objective: Objective,
    *,
    recipe: Recipe,
    seed: int,
    columns: Mapping[str, Tensor] | None = None,
    validation: ImageSet | None = None,
) -> Fit:
    """fit() as a stage runs it: with its runtime, its checkpoint and its watcher."""
    return fit(
        student,
        objective,
        images,
        recipe=recipe,
        runtime=context.runtime,
        seed=seed,
        columns=columns,
        validation=validation,
        checkpoint=context.checkpoint,
        checkpoint_seconds=context.checkpoint_seconds,
        advance=context.advance,
    )


def trained_artefact(student: nn.Module, trained: Fit, model: Model, images: ImageSet, **more: Any) -> Artefact:
    """The artefact of a classifier that was trained here."""
    return classifier_artefact(
        student,
        model.untrained,
        images,
        loss=trained.loss,
        validation_accuracy=trained.validation_accuracy,
        cost=Cost(forwards=trained.forwards, backwards=trained.backwards),
        **more,
    )


def classifier_artefact(classifier: nn.Module, model: Model, images: ImageSet, *, cost: Cost, **more: Any) -> Artefact:
    """What a later stage needs to have the classifier again: its SPEC, its weights, what it is for."""
    values = {
        "spec": str(model.architecture),
        "shape": list(images.shape),
        "classes": list(images.classes),
        "outputs": "probabilities" if isinstance(classifier, FromProbabilities) else "logits",
        **more,
    }
    state = inner(classifier).state_dict()
    other = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        raise InputError(
            f"{model.text} keeps something in its state that is no tensor ({other}), so it cannot be kept as weights.",
            "Modules that torch quantised itself do: give the float model, or ask it alone (audit --black-box).",
        )
    tensors = {STATE + name: value for name, value in state.items()}
    calibration = calibration_of(classifier)
    if calibration is not None:
        tensors[CALIBRATION] = calibration
    return Artefact(values, tensors, cost)


def model_of(artefact: Artefact, context: Context) -> Model:
    """The model SPEC that an artefact names. Raises StoreError if it runs code that the settings do not name."""
    model = Model(str(artefact.values["spec"]))
    if model.has_weights or (model.code is not None and model.code not in context.code):
        raise StoreError(
            f"an artefact names {model.text!r}, which is not what this run was asked for.",
            "The store was tampered with, or belongs to something else: use another (--store).",
        )
    return model


def classifier_of(artefact: Artefact, context: Context) -> nn.Module:
    """The classifier of an artefact, in eval mode; it returns logits whatever the user's model returns.

    Raises StoreError as `model_of` does.
    """
    values = artefact.values
    channels, height, width = values["shape"]
    model = model_of(artefact, context).build((channels, height, width), len(values["classes"]))
    load_state(inner(model), weights_of(artefact), values["spec"])
    if CALIBRATION in artefact.tensors:
        model = Quantised(model, artefact.tensors[CALIBRATION]).eval()
    return FromProbabilities(model).eval() if values["outputs"] == "probabilities" else model


def weights_of(artefact: Artefact) -> dict[str, Tensor]:
    """The state dict of a classifier's artefact."""
    return {name.removeprefix(STATE): value for name, value in artefact.tensors.items() if name.startswith(STATE)}


def save_artefact(path: Path, artefact: Artefact) -> None:
    """Write a classifier's artefact as a .safetensors, which of a zoo model is a model SPEC. Raises StoreError."""
    values = artefact.values
    save_classifier(
        path,
        weights_of(artefact),
        spec=values["spec"],
        shape=values["shape"],
        classes=values["classes"],
        calibration=artefact.tensors.get(CALIBRATION),
    )


@job(version=2)
def answer_part(context: Context, classifier: Artefact, data: Artefact, *, part: Part) -> Artefact:
    """What a classifier says about the images of a part: `logits`, (N, K), and the `labels`."""
    parts = carve(data)
    images = parts.test if part == "test" else parts.validation
    logits = predict(classifier_of(classifier, context), images, context.runtime)
    return Artefact({}, {"logits": logits, "labels": images.known_labels()}, Cost(forwards=len(images)))


def _accuracy(model: nn.Module, images: ImageSet, context: Context) -> float:
    guesses = predict(model, images, context.runtime).argmax(dim=1)
    return float((guesses == images.known_labels()).double().mean())
