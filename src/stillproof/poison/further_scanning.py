"""The jobs of the scanners beside the two that decide: views of the teacher, a probe, and what they and the baselines
find."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import TEACHER
from stillproof.core.features import Watched
from stillproof.core.images import ImageSet, as_float, batches
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive
from stillproof.core.plan import Context, job
from stillproof.core.stages import classifier_of, fresh_student, train_fresh, trained_artefact
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import InputError, nearest
from stillproof.poison.scan_set.activation_clustering import activation_clustering
from stillproof.poison.scan_set.early_loss import early_loss
from stillproof.poison.scan_set.probe import Learned, Watching
from stillproof.poison.scan_set.sight import Scores
from stillproof.poison.scan_set.spectral import spectral_signatures, whitened_spectrum
from stillproof.poison.scan_set.stability import VIEWS, fragility, movements, stability
from stillproof.poison.scan_set.strip import OVERLAYS, sureness
from stillproof.poison.scan_set.two_groups import two_groups
from stillproof.poison.scanning import PARTS, set_of

OF_VIEWS = ("stability", "fragility")
"""Read how the teacher's answers move."""

OF_FEATURES: Mapping[str, Callable[[Learned], Scores]] = {
    "two groups": two_groups,
    "whitened spectrum": whitened_spectrum,
    "early loss": early_loss,
    "spectral signatures": spectral_signatures,
    "activation clustering": activation_clustering,
}

OF_A_PROBE = (*OF_FEATURES, "STRIP")
"""Read a probe, which is trained on the suspect set."""

FURTHER = (*OF_VIEWS, *OF_A_PROBE)


def further_named(names: Sequence[str]) -> tuple[str, ...]:
    """Scanners by their names on a command line, with hyphens; `all` are all. Raises InputError."""
    known = {name.lower().replace(" ", "-"): name for name in FURTHER}
    for name in names:
        if name not in known and name != "all":
            raise InputError(f"there is no further scanner {name!r}.", nearest(name, [*known, "all"]))
    return FURTHER if "all" in names else tuple(dict.fromkeys(known[name] for name in names))


@job(version=1)
def view(context: Context, teacher: Artefact, suspects: Artefact, trusted: Artefact, *, seed: int) -> Artefact:
    """How far views of every image move the teacher's answer."""
    master, tensors, passes = classifier_of(teacher, context), {}, 0
    for part, loaded in zip(PARTS, (suspects, trusted), strict=True):
        images = set_of(loaded)
        plain = predict(master, images, context.runtime)
        tensors[part] = movements(master, images, plain, runtime=context.runtime, seed=derive(seed, part))
        passes += (1 + len(VIEWS)) * len(images)
    return Artefact({}, tensors, Cost(forwards=passes))


@job(version=1)
def train_probe(
    context: Context,
    teacher: Artefact,
    suspects: Artefact,
    trusted: Artefact,
    *,
    model: Model,
    recipe: Recipe,
    seed: int,
) -> Artefact:
    """A student of suspect and trusted images together, with its features, and its loss of each image by epoch.

    Raises InputError where the model's features cannot be read.
    """
    runtime, first = context.runtime, set_of(suspects)
    images = _unlabelled(first).with_more(_unlabelled(set_of(trusted)))
    _features(fresh_student(images, model, seed), images.subset(torch.arange(2)), model.text)  # before it is trained
    answers = predict(classifier_of(teacher, context), images, runtime)
    watching = Watching(len(images), recipe.epochs)
    student, trained = train_fresh(
        context, images, watching, model=model, recipe=recipe, seed=seed, columns={TEACHER: answers}
    )
    made = trained_artefact(student, trained, model, images)
    tensors = {
        "features": _features(student, images, model.text),
        "losses": watching.losses,
        "guessed": answers.argmax(dim=1),
    }
    cost = made.cost + Cost(forwards=2 * len(images))
    return Artefact({**made.values, "suspects": len(first)}, {**made.tensors, **tensors}, cost)


def _unlabelled(images: ImageSet) -> ImageSet:
    return ImageSet(images.images, None, images.classes, images.name)


def _features(student: torch.nn.Module, images: ImageSet, who: str) -> Tensor:
    """What its last linear layer reads of every image, float32, (N, D)."""
    student.eval()
    found: list[Tensor] = []
    try:
        layer = Watched(student, "", "vector", as_float(images.images[:2]), who)
    except InputError as error:
        raise InputError(
            f"{who} has no linear layer last, by whose input its images could be compared.",
            "Give another --reference, or leave the scanners that read a probe out of --also (stability needs none).",
        ) from error
    with torch.no_grad(), layer:
        for rows in batches(len(images), 256):
            student(as_float(images.images[rows]))
            found.append(layer.take())
    return torch.cat(found)


@job(version=1)
def scan_further(
    context: Context,
    suspects: Artefact,
    trusted: Artefact,
    views: Artefact | None = None,
    probe: Artefact | None = None,
    *,
    names: Sequence[str],
    seed: int,
) -> Artefact:
    """Scores of further scanners, in the form in which `scan_set` leaves those of its own."""
    images, known = set_of(suspects).images, set_of(trusted).images
    found: dict[str, Scores] = {}
    passes = 0
    if views is not None:
        moved = [views.tensors[part] for part in PARTS]
        found |= {
            "stability": stability(moved[0], moved[1], seed=derive(seed, "halves")),
            "fragility": fragility(*moved),
        }
    if probe is not None:
        tensors = probe.tensors
        learned = Learned(tensors["features"], tensors["losses"], tensors["guessed"], probe.values["suspects"])
        found |= {name: scan(learned) for name, scan in OF_FEATURES.items() if name in names}
        if "STRIP" in names:
            student = classifier_of(probe, context)
            sure = [
                sureness(student, some, known, runtime=context.runtime, seed=derive(seed, "overlays", part))
                for part, some in zip(PARTS, (images, known), strict=True)
            ]
            found["STRIP"] = Scores(sure[0], sure[1])
            passes += OVERLAYS * (len(images) + len(known))
    chosen = [name for name in names if name in found]
    scores = {f"{name}.{part}": torch.from_numpy(getattr(found[name], part)) for name in chosen for part in PARTS}
    return Artefact({"scanners": chosen}, scores, Cost(forwards=passes))
