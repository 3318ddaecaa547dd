"""Data as every plan takes it: the stage that reads a source, and the fixed parts that its images fall into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stillproof.core.images import ImageSet, stratified
from stillproof.core.plan import Context, Stage, job, stage
from stillproof.core.sources import Facts, Source, Split, open_source
from stillproof.core.store import Artefact
from stillproof.errors import InputError

TRAINING_SHARE, VALIDATION_SHARE, POOL_SHARE = 0.8, 0.1, 0.1


@dataclass(frozen=True, slots=True)
class Carving:
    """The fixed parts of a data source; no image is in two of them."""

    training: ImageSet
    """What a victim or teacher is trained on."""
    validation: ImageSet
    """Held out; nothing is trained on it."""
    pool: ImageSet
    """Where a thief draws queries from."""
    test: ImageSet
    """Looked at once."""


@dataclass(frozen=True, slots=True)
class PartSizes:
    """About how many images each part of the carving will have."""

    training: int
    validation: int
    pool: int
    test: int


PARTS = {"training": TRAINING_SHARE, "validation": VALIDATION_SHARE, "pool": POOL_SHARE}


def part_sizes(facts: Facts, limit: int | None) -> PartSizes:
    """The sizes of the parts, before anything is read (to within two images a class)."""
    train, test = (n if limit is None else min(n, limit) for n in (facts.train, facts.test))
    training, validation, pool = (round(share * train) for share in PARTS.values())
    return PartSizes(training, validation, pool, test)


@dataclass(frozen=True, slots=True)
class Data:
    """The stage that loads the data, and what is known of them before it runs."""

    stage: Stage
    sizes: PartSizes
    classes: int


def data_stage(spec: str, limit: int | None, *, fewest_classes: int = 2) -> Data:
    """The stage that loads what a data SPEC names. Raises InputError where there is nothing to tell apart."""
    source = open_source(spec)
    facts = source.facts()
    if facts.classes < fewest_classes:
        raise InputError(f"{spec} has one class alone: there is nothing to tell apart.", "Give images of several.")
    loading = stage(load_data, "load the data", source=source, limit=limit)
    return Data(loading, part_sizes(facts, limit), facts.classes)


@job(version=2)
def load_data(context: Context, *, source: Source, limit: int | None) -> Artefact:
    """Read a source and carve it. The carving's seed is not a setting: it is the same in every run.

    limit: keep about so many training and so many test images, of all classes alike. Each part is cut after the
    carving, so that what is a thief's in a small run was not the victim's in a large one. Images that no part
    needs are not decoded, and none stays in memory.
    """
    opened = source.open()
    train, test = opened.train, opened.test
    rows = stratified(train.labels, tuple(PARTS.values()), seed=0)
    carved = dict(zip(PARTS, rows, strict=True)) | {"test": torch.arange(len(test.labels))}
    kept: dict[str, Tensor] = {}
    for name, part in carved.items():
        labels = (test if name == "test" else train).labels
        share = 1.0 if limit is None else min(1.0, limit / len(labels))
        kept[name] = part if share == 1 else part[stratified(labels[part], (share, 1 - share), seed=0)[0]]
    tensors: dict[str, Tensor] = {}
    for name, part in kept.items():
        split = test if name == "test" else train
        tensors[f"{name}.images"] = context.allocate(f"{name}.images", (len(part), *split.shape))
        tensors[f"{name}.labels"] = split.labels[part]
    read = _Reading(context, sum(len(part) for part in kept.values()))
    read.into(train, {tensors[f"{name}.images"]: kept[name] for name in PARTS})
    read.into(test, {tensors["test.images"]: kept["test"]})
    values = {"name": opened.name, "classes": list(opened.classes), "notes": list(opened.notes)}
    return Artefact(values, tensors)


@dataclass
class _Reading:
    """Reads the images of a source once, each into the part that it belongs to."""

    context: Context
    images: int
    done: int = 0

    def into(self, split: Split, parts: Mapping[Tensor, Tensor]) -> None:
        """parts: rows of the split (ascending) by the tensor that takes their images."""
        everything = torch.cat(list(parts.values())).sort().values
        filled = dict.fromkeys(parts, 0)
        start = 0
        for chunk in split.read(everything):
            rows = everything[start : start + len(chunk)]
            for images, wanted in parts.items():
                here = chunk[torch.isin(rows, wanted)]
                images[filled[images] : filled[images] + len(here)] = here
                filled[images] += len(here)
            start += len(chunk)
            self.done += len(chunk)
            if self.context.advance is not None:
                self.context.advance(self.done, self.images, "images read")
        if start != len(everything):
            raise InputError(f"the source gave {start} images of {len(everything)}.", "Mend its read().")


def carve(data: Artefact) -> Carving:
    """The four parts."""
    classes, name = tuple(data.values["classes"]), data.values["name"]

    def part(of: str) -> ImageSet:
        return ImageSet(data.tensors[f"{of}.images"], data.tensors[f"{of}.labels"], classes, f"{name} ({of})")

    return Carving(part("training"), part("validation"), part("pool"), part("test"))
