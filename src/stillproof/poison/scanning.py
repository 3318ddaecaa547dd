"""The jobs of a scan: read a set as it is, train references on what is trusted, look at every image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from stillproof.core.classifiers import Model, admit, predict
from stillproof.core.distillation import TEACHER, Distillation
from stillproof.core.images import ImageSet
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive, permutation
from stillproof.core.plan import Context, job
from stillproof.core.sources import Opened, Source, Split
from stillproof.core.stages import classifier_artefact, classifier_of, train_fresh, trained_artefact
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import InputError
from stillproof.poison.scan_set.agreement import agreement
from stillproof.poison.scan_set.combined import combined
from stillproof.poison.scan_set.copies import near_copies
from stillproof.poison.scan_set.shared_pattern import SharedPattern
from stillproof.poison.scan_set.sight import Scores, Sight, folds, p_values
from stillproof.poison.scan_set.verdict import Scanned
from stillproof.poison.scan_set.wandering_pattern import WanderingPattern

REFERENCES = 4
"""References, each trained on all trusted images but a quarter, which it then judges."""

FEWEST_TRUSTED = 100
"""Trusted images, for a false alarm rate of a hundredth."""

COMBINED = "combined"

PATTERNS = {"shared pattern": SharedPattern, "wandering pattern": WanderingPattern}
"""The scanners that say as well what suspicious images of a class share."""

SUSPICIOUS = 0.05
"""p-value of the agreement up to which a report calls an image suspicious."""

Part = Literal["training", "test"]


@job(version=2)
def load_set(context: Context, *, source: Source, part: Part, limit: int | None) -> Artefact:
    """`images` and `labels` of a part of a source, the `rows` of the source's files that they are, and `of` how many.

    Where a source has no test images of its own, its training part is all that it has. Raises InputError.
    """
    opened = source.open()
    splits = _splits(opened, part)
    total = sum(len(split.labels) for split in splits)
    wanted = torch.arange(total)
    if limit is not None and limit < total:
        wanted = permutation(total, derive(0, "limit"))[:limit].sort().values
    order = _places(opened, part, splits)
    images = context.allocate("images", (len(wanted), *opened.train.shape))
    labels = torch.cat([split.labels for split in splits])[wanted]
    done = start = 0
    for split in splits:
        rows = wanted[(wanted >= start) & (wanted < start + len(split.labels))] - start
        for chunk in split.read(rows):
            images[done : done + len(chunk)] = chunk
            done += len(chunk)
            if context.advance is not None:
                context.advance(done, len(wanted), "images read")
        start += len(split.labels)
    if done != len(wanted):
        raise InputError(f"the source gave {done} images of {len(wanted)}.", "Mend its read().")
    values = {"name": opened.name, "classes": list(opened.classes), "notes": list(opened.notes), "of": total}
    return Artefact(values, {"images": images, "labels": labels, "rows": order[wanted]})


def _places(opened: Opened, part: Part, splits: list[Split]) -> Tensor:
    """Where each image of these splits stands in the source: int64, (N,)."""
    total = sum(len(split.labels) for split in splits)
    if opened.has_own_test or opened.rows is None or part == "test":
        return torch.arange(total)
    return torch.cat(opened.rows)


def _splits(opened: Opened, part: Part) -> list[Split]:
    if part == "training":
        return [opened.train] if opened.has_own_test else [opened.train, opened.test]
    if not opened.has_own_test:
        raise InputError(
            f"{opened.name!r} has no test images of its own to trust.",
            "Name images that you vouch for: --trusted SPEC.",
        )
    return [opened.test]


def set_of(loaded: Artefact) -> ImageSet:
    """What `load_set` read."""
    tensors, values = loaded.tensors, loaded.values
    return ImageSet(tensors["images"], tensors["labels"], tuple(values["classes"]), values["name"])


def as_set(images: ImageSet) -> Artefact:
    """Images as `set_of` reads them."""
    values = {"name": images.name, "classes": list(images.classes), "notes": []}
    tensors = {"images": images.images, "labels": images.known_labels(), "rows": torch.arange(len(images))}
    return Artefact(values, tensors)


@job(version=1)
def check_trusted(_context: Context, trusted: Artefact) -> Artefact:
    """Nothing, where there are enough trusted images, of which copies count once; raises InputError where not."""
    check_enough(len(torch.unique(trusted_folds(set_of(trusted))[1])))
    return Artefact()


@job(version=1)
def bring_for(
    context: Context,
    trusted: Artefact,
    *,
    model: Model,
    state: str | None = None,  # noqa: ARG001
) -> Artefact:
    """A classifier that brings its own weights, for these images. Raises InputError if it is none of theirs.

    state: in the stage's key alone (see `Model.state`).
    """
    some = set_of(trusted)
    made, facts = admit(model.build(some.shape, len(some.classes)), some, model.text)
    accuracy = float((predict(made, some, context.runtime).argmax(1) == some.known_labels()).double().mean())
    return classifier_artefact(
        made, model, some, deterministic=facts.deterministic, accuracy=accuracy, cost=Cost(forwards=len(some))
    )


@job(version=1)
def train_reference(
    context: Context, teacher: Artefact, trusted: Artefact, *, model: Model, fold: int, recipe: Recipe, seed: int
) -> Artefact:
    """A reference: distilled from the teacher on the trusted images of all folds but one. It needs no labels."""
    images = set_of(trusted)
    some = images.subset((trusted_folds(images)[0] != fold).nonzero()[:, 0])
    answers = predict(classifier_of(teacher, context), some, context.runtime)
    student, trained = train_fresh(
        context, some, Distillation(alpha=1.0), model=model, recipe=recipe, seed=seed, columns={TEACHER: answers}
    )
    made = trained_artefact(student, trained, model, some)
    return Artefact(made.values, made.tensors, made.cost + Cost(forwards=len(some)))


def held_out(trusted: ImageSet, fold: int) -> ImageSet:
    """What the reference of this fold was not trained on, nor on a copy of; of copies, near ones too, the first."""
    fold_of, like = trusted_folds(trusted)
    return trusted.subset(((fold_of == fold) & (like == torch.arange(len(trusted)))).nonzero()[:, 0])


def trusted_folds(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Which reference was not trained on each trusted image, and the first that each is nearly a copy of.

    Copies are in one fold: a reference that learnt an image knows its copy, which then looks usual as no other does.
    """
    like = near_copies(images.images, derive(0, "trusted copies"))
    return folds(len(images), REFERENCES, derive(0, "trusted folds"))[like], like


@job(version=8)
def scan_set(
    context: Context,
    teacher: Artefact,
    suspects: Artefact,
    trusted: Artefact,
    references: Sequence[Artefact],
    *,
    false_alarms: float,
) -> Artefact:
    """Scores of every scanner, and which images are flagged at this rate of false alarms.

    Of images that are the same, byte by byte, one is looked at, and near copies are in one half: in both they would be
    their own evidence. Of trusted images that are copies of each other, nearly or wholly, one says what is usual.
    Raises InputError where those are too few for this rate.
    """
    given, vouched = set_of(suspects), set_of(trusted)
    own, likes = trusted_folds(vouched)
    once = torch.unique(likes)
    known, own = vouched.subset(once), own[once]
    check_rate(false_alarms, len(known))
    original, place = _originals(given)
    images = given.subset(original)
    master = classifier_of(teacher, context)
    judges = [classifier_of(one, context) for one in references]
    # whoever writes a part of the set cannot foresee which half and fold an image falls into
    digest = images.fingerprint()
    fold, shared = _folds_of(images, known, own, derive(0, "suspect folds", digest))
    like = near_copies(images.images, derive(0, "near copies", digest))
    chosen = _one_of_each(like, derive(0, "one of each", digest))
    seen = replace(_sight(context, master, judges, images, fold), like=like)
    usual = _sight(context, master, judges, known, own)
    doubts = agreement(seen, usual)
    halves = derive(0, "halves", digest)
    patterns = {name: kind(seed=halves).look(seen, usual, doubts) for name, kind in PATTERNS.items()}
    found = {"agreement": doubts} | {name: one.scores for name, one in patterns.items()}
    found[COMBINED] = combined(found)
    p = p_values(found[COMBINED])
    everyone = {name: Scores(scores.suspects[place], scores.trusted) for name, scores in found.items()}
    tensors = {
        f"{name}.{part}": torch.from_numpy(getattr(scores, part)) for name, scores in everyone.items() for part in PARTS
    }
    tensors |= {f"{name}.{index}": shown for name, one in patterns.items() for index, shown in one.shown.items()}
    tensors |= {
        "p": torch.from_numpy(p)[place],
        "flagged": torch.from_numpy(p <= false_alarms)[place],
        "original": torch.zeros(len(given), dtype=torch.bool).index_fill_(0, original[chosen], value=True),
        "usual_p": torch.from_numpy(p_values(Scores(found[COMBINED].trusted, found[COMBINED].trusted))),
        "guessed": seen.guessed[place],
        "usual": usual.guessed,
        "suspicious": torch.from_numpy(p_values(doubts) <= SUSPICIOUS)[place],
    }
    values = {
        "scanners": list(found),
        "classes": list(images.classes),
        "patterns": {name: sorted(one.shown) for name, one in patterns.items()},
        "alike": float((usual.guessed == usual.reference.argmax(1)).double().mean()),
        "shared": shared,
        "copies": len(given) - len(original),
        "near copies": len(like) - len(torch.unique(like)),
    }
    return Artefact(values, tensors, Cost(forwards=2 * (len(images) + len(known))))


PARTS = ("suspects", "trusted")


def pattern_of(scanned: Artefact, name: str, index: int) -> Tensor | None:
    """What a scanner, by its name, found that suspicious images of a class share: (C, H, W), signed; None: nothing."""
    return scanned.tensors[f"{name}.{index}"] if index in scanned.values["patterns"][name] else None


def _one_of_each(like: Tensor, seed: int) -> Tensor:
    """A random row of each group of near copies: the first would be the one that whoever poisons them puts there."""
    order = permutation(len(like), seed)
    _, place = torch.unique(like[order], return_inverse=True)
    first = torch.full((int(place.max()) + 1,), len(like)).scatter_reduce(0, place, torch.arange(len(like)), "amin")
    return order[first].sort().values


def _originals(images: ImageSet) -> tuple[Tensor, Tensor]:
    """The rows of the first of all images that are the same, and for each image which of those it is like."""
    known: dict[bytes, int] = {}
    rows: list[int] = []
    place = torch.empty(len(images), dtype=torch.int64)
    for row, image in enumerate(images.images):
        digest = hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
        if digest not in known:
            known[digest] = len(rows)
            rows.append(row)
        place[row] = known[digest]
    return torch.tensor(rows, dtype=torch.int64), place


def scores_of(scanned: Artefact) -> dict[str, Scores]:
    """The scores of each scanner, and of all together."""
    return {
        name: Scores(scanned.tensors[f"{name}.suspects"].numpy(), scanned.tensors[f"{name}.trusted"].numpy())
        for name in scanned.values["scanners"]
    }


def _sight(
    context: Context, teacher: torch.nn.Module, references: Sequence[torch.nn.Module], images: ImageSet, fold: Tensor
) -> Sight:
    """Each image is shown to the teacher, and to the reference of its fold."""
    said = predict(teacher, images, context.runtime)
    answers = torch.empty_like(said)
    for number, reference in enumerate(references):
        rows = (fold == number).nonzero()[:, 0]
        if len(rows):
            answers[rows] = predict(reference, images.subset(rows), context.runtime)
    return Sight(images.images, said, answers, fold)


def scanned_set(scanned: Artefact, false_alarms: float) -> Scanned:
    """What `scan_set` left, for a verdict at a rate of false alarms."""
    arrays = {name: scanned.tensors[name].numpy() for name in ("p", "guessed", "original", "usual_p", "usual")}
    values = scanned.values
    return Scanned(
        **arrays,
        disagreement=p_values(scores_of(scanned)["agreement"]),
        classes=tuple(values["classes"]),
        false_alarms=false_alarms,
        alike=values["alike"],
        shared=values["shared"],
    )


def _folds_of(images: ImageSet, known: ImageSet, own: Tensor, seed: int) -> tuple[Tensor, int]:
    """Which reference judges each suspect, and how many suspects are trusted images, or nearly.

    It is drawn at random, but for an image that is trusted as well: then it is the one that was not trained on it.
    """
    found = folds(len(images), REFERENCES, seed)
    # trusted images come first, and so lead the groups that they are in
    leader = near_copies(torch.cat([known.images, images.images]), derive(seed, "trusted ones"))[len(known) :]
    twins = leader < len(known)
    found[twins] = own[leader[twins]]
    return found, int(twins.sum())


def check_rate(false_alarms: float, trusted: int) -> None:
    """Raise InputError where so many trusted images cannot set a threshold for a rate of false alarms."""
    if false_alarms * (trusted + 1) < 1:
        raise InputError(
            f"{trusted} trusted images cannot set a threshold for {false_alarms:.2g} of false alarms.",
            f"Give --false-alarms of {1 / (trusted + 1):.2g} or more, or more trusted images (copies count once).",
        )


def check_enough(trusted: int) -> None:
    """Raise InputError where so many trusted images, copies counted once, are too few."""
    if trusted < FEWEST_TRUSTED:
        raise InputError(
            f"{trusted} trusted images are too few to say what is usual.",
            f"Give {FEWEST_TRUSTED} or more (copies count once).",
        )


def check_kinds(suspects: Opened, trusted: Opened) -> None:
    """Raise InputError where a transfer set and a trusted one are not images of one kind."""
    shapes = suspects.train.shape, trusted.train.shape
    if shapes[0] != shapes[1] or len(suspects.classes) != len(trusted.classes):
        raise InputError(
            f"the transfer set {suspects.name!r} is {shapes[0]} of {len(suspects.classes)} classes, the trusted one "
            f"{shapes[1]} of {len(trusted.classes)}.",
            "Both must be images of one kind; name all classes in one order.",
        )
    for index, (name, other) in enumerate(zip(suspects.classes, trusted.classes, strict=True)):
        if name != other:
            raise InputError(
                f"class {index} is {name!r} in the transfer set {suspects.name!r} and {other!r} in the trusted one.",
                "Name the classes alike, in one order.",
            )
