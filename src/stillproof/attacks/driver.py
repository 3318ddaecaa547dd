"""The one loop of the attacks: batches, and the images that are still under attack.

An attack says where it looks next and what it ascends (`Search`); the driver asks the classifier, hands what it saw to
the record, which keeps the best, and lets images that are done leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor, nn

from stillproof.attacks.frozen import Classifier, Frozen, Slope, asked, frozen
from stillproof.attacks.record import AttackResult, Record, Task
from stillproof.attacks.threats import Ball
from stillproof.core.images import check_images
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError


@dataclass
class State:
    """What a search knows: every tensor has a row an image."""

    def take(self, rows: Tensor) -> None:
        """Forget the images that are not in `rows`."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Task | Ball):
                setattr(self, field.name, value[rows])


class Search(Protocol):
    """An attack at work on a batch."""

    @property
    def task(self) -> Task:
        """The images that are still under attack."""

    @property
    def current(self) -> Tensor:
        """The images to be looked at next, (n, C, H, W), inside [0, 1]."""

    def ascended(self, logits: Tensor) -> Tensor:
        """The loss, (n,), of which the gradient is taken."""

    def move(self, slope: Slope, adversarial: Tensor) -> Tensor | None:
        """Go on from `current`. Returns which images have nothing left to try, (n,) bool, or None: none."""

    def take(self, rows: Tensor) -> None:
        """Forget the images that are not in `rows`."""


def climb(
    model: Frozen,
    record: Record,
    search: Search,
    rows: Tensor,
    *,
    steps: int,
    samples: int = 1,
) -> None:
    """Let a search take up to `steps` steps from where it is; what it sees goes into the record.

    rows: which of the record's images the search is about, in its order. samples: passes a look (EOT). Where the record
    counts queries, there are no gradients, and it ends with the budget.
    """
    blind = record.queries is not None
    for _ in range(steps):
        if blind:
            slope = model.level(search.current, search.ascended)
        else:
            slope = model.slope(search.current, search.ascended, samples=samples)
        backwards = 0 if blind else samples
        seen = record.see(rows, search.task, search.current, slope.value, slope.logits, (samples, backwards))
        gone = search.move(slope, seen.adversarial)
        if seen.any_first and record.keep == "first":
            done = record.success[rows]
            gone = done if gone is None else gone | done
        if blind:
            gone = record.spent(rows) if gone is None else gone | record.spent(rows)
        if gone is not None and gone.any():
            stay = (~gone).nonzero()[:, 0]
            if not len(stay):
                return
            rows = rows[stay]
            search.take(stay)
    logits = model.answer(search.current)
    record.see(rows, search.task, search.current, search.ascended(logits), logits, (1, 0))


def in_batches(
    classifier: Classifier,
    task: Task,
    batch_size: int,
    runtime: Runtime,
    attack: Callable[[Frozen, Task], AttackResult],
    through: nn.Module | None = None,
) -> AttackResult:
    """Run an attack batch by batch; each is moved to the device, and its result back.

    classifier: a module, which is prepared (`frozen`), or anything that answers images; through: what is climbed in
    place of a module. Where memory runs out, a batch
    is tried again at half its size, down to one image; what it had asked by then is not counted. Raises InputError.
    """
    images = task.origin
    _check(task)
    if not len(images):
        return AttackResult.of(images)
    whole = AttackResult.of(images)
    with ExitStack() as prepared:
        if isinstance(classifier, nn.Module):
            model = prepared.enter_context(frozen(classifier, images, runtime))
            if through is not None:
                model = model.through(prepared.enter_context(frozen(through, images, runtime)))
        else:
            named = task.labels if task.target is None else torch.cat([task.labels, task.target])
            classes = int(named.max()) + 1
            model = asked(classifier, classes, runtime)
        start = 0
        while start < len(images):
            rows = slice(start, start + batch_size)
            try:
                found = attack(model, task[rows].to(runtime.device, runtime.memory_format))
            except RuntimeError as error:
                if not _is_out_of_memory(error) or batch_size == 1:
                    raise
                batch_size = max(1, min(batch_size, len(images) - start) // 2)
                continue
            for name in AttackResult.__slots__:
                getattr(whole, name)[rows] = getattr(found, name).cpu()
            start += batch_size
    return whole


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _check(task: Task) -> None:
    """Raise InputError for what is no batch of images with labels."""
    images = task.origin
    check_images(images, "the images to attack")
    for name, given in (("labels", task.labels), ("targets", task.target), ("ids", task.ids)):
        if given is not None and (given.shape != (len(images),) or given.dtype != torch.int64):
            raise InputError(
                f"{len(images)} images and {name} of shape {tuple(given.shape)}, {given.dtype}, do not fit.",
                "Give one each: int64, (N,).",
            )
    if task.target is not None and bool((task.target == task.labels).any()):
        raise InputError("a target is the image's own label.", "Give another class, or leave target out.")
    if task.uint8 and not torch.allclose((images * 255).round() / 255, images, atol=1e-6):
        raise InputError("the images are no multiples of 1/255.", "Give images of 8 bits, or leave uint8 out.")
