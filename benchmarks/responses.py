"""What a response adds to the time of an answer, over the bare forward pass.

`python benchmarks/responses.py`; zoo:resnet18?width=16 (fresh weights), 32 × 32 pixels, ten classes, fp32, one thread,
batches of 1 and 128. The guard is timed around answers that are known already, in turn with the bare pass of the
classifier, each going first every second time; the ratio is of the medians of one run, in processor time, which other
programs on the machine disturb less. What reads images or remembers is stated beside what is a function of the logits.
Half a minute.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle

import torch
from torch import Tensor, nn

from shared.record import record
from stillproof.core.classifiers import Model
from stillproof.core.noise import Noise
from stillproof.core.plugins import build, table
from stillproof.core.spec import Spec
from stillproof.serving.guard import guard
from stillproof.serving.responses import Response

MODEL, SHAPE, CLASSES = "zoo:resnet18?width=16", (3, 32, 32), 10
ROUNDS = {1: 200, 128: 3}
"""How often each is timed, by batch size."""

DEAREST = 0.05
"""What a function of the logits may add, as a share of the bare pass, at each batch size."""

SPREAD = 8.0
"""Standard deviation of the logits: their largest probability is .87 on average, about that of a trained victim."""


class Known(nn.Module):
    """Answers that are known already, others at each call."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        super().__init__()
        self.waiting = cycle(batches)

    def forward(self, _images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        return next(self.waiting)


def taken(passes: Callable[[], object]) -> float:
    """Seconds of processor time of one pass."""
    began = time.process_time()
    passes()
    return time.process_time() - began


def added(response: Response, batch: int) -> tuple[float, float]:
    """The share of the bare pass that a response adds, and the median of the bare pass in seconds."""
    model = Model(MODEL).build(SHAPE, CLASSES)
    helpers = [Model(MODEL).build(SHAPE, CLASSES)] if response.needs_helper else []
    ids = torch.arange(batch)
    images = Noise(0, ids, 0).uniform(SHAPE)
    answers = [SPREAD * Noise(0, ids, number).normal((CLASSES,)) for number in range(ROUNDS[batch])]
    guarded = guard(Known(answers), response, helpers)
    passes: list[Callable[[], object]] = [lambda: model(images), lambda: guarded(images)]
    times: list[list[float]] = [[], []]
    for number in range(ROUNDS[batch] + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            seconds = taken(passes[which])
            if number:  # the first warms up
                times[which].append(seconds)
    bare, behind = (statistics.median(found) for found in times)
    return behind / bare, bare


@torch.inference_mode()
def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, object]] = {}
    dear: list[str] = []
    for name in table("response"):
        response: Response = build("response", Spec(name))
        kind = "reads images" if response.reads_images else "remembers" if response.remembers else "logits"
        found[name] = {"kind": kind}
        for batch in ROUNDS:
            share, bare = added(response, batch)
            found[name][f"batch {batch}"] = round(share, 4)
            dear += [f"{name} {share:.1%} of a batch of {batch}"] if kind == "logits" and share > DEAREST else []
            print(f"{name:>24} ({kind}), batch {batch}: {share:+.1%} of {1000 * bare:.2f} ms", file=sys.stderr)
    record("responses", model=MODEL, added_over_bare_forward=found)
    if dear:
        sys.exit(f"functions of the logits that add more than {DEAREST:.0%}: {', '.join(dear)}")


if __name__ == "__main__":
    main()
