"""Adversarial examples of a copy, shown to what is served."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stillproof.core.carving import data_stage
from stillproof.core.classifiers import Model
from stillproof.core.plan import Context
from stillproof.core.runtime import Runtime
from stillproof.core.store import Artefact
from stillproof.theft import reuse
from stillproof.theft.reuse import mislead

FP32 = Runtime(precision="fp32", threads=1)


class Brittle(nn.Module):
    """Right about the images that it knows, and wrong about everything else; asked: how often."""

    def __init__(self, known: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.known, self.labels, self.asked = known.flatten(1), labels, 0

    def forward(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        same = torch.cdist((images * 255).round().flatten(1), self.known) < 0.5
        found = torch.where(same.any(1), self.labels[same.int().argmax(1)], 0)
        return 5 * nn.functional.one_hot(found, 10).float()


def test_a_random_change_is_shown_and_every_question_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    source = data_stage("digits", 100)
    data = source.stage.job.run(Context(FP32), **source.stage.settings)
    test, labels = data.tensors["test.images"], data.tensors["test.labels"]
    chosen = (labels != 0).nonzero()[:, 0][:60]  # what it does not know it takes for a 0
    data = Artefact(data.values, {**data.tensors, "test.images": test[chosen], "test.labels": labels[chosen]})
    victim = Brittle(test[chosen].float(), labels[chosen])
    copy = Model("zoo:cnn?width=4").fresh((1, 8, 8), 10, 0).eval()
    made = {"victim": victim, "copy": copy}
    monkeypatch.setattr(reuse, "answering", lambda *_: victim)
    monkeypatch.setattr(reuse, "classifier_of", lambda name, _context: made[name])
    found = mislead.run(Context(FP32), "copy", "victim", data, threat="linf:0.1", seed=0)
    assert bool(found.tensors["right"].all())
    assert torch.equal(found.tensors["lucky"], found.tensors["right"])  # any change at all fools this one
    assert torch.equal(found.tensors["fell"], found.tensors["right"])
    assert found.cost.queries == victim.asked == 7 * 60  # before, and by either: as it is, changed, rounded
