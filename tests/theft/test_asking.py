"""Thieves who choose what they ask: exact counts, and the images that they say they ask about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.carving import carve, load_data
from stillproof.core.classifiers import Model
from stillproof.core.distillation import TEACHER, Distillation
from stillproof.core.images import ImageSet, as_float
from stillproof.core.measurement import Cost
from stillproof.core.plan import Context
from stillproof.core.runtime import Runtime
from stillproof.core.sources.digits import Digits
from stillproof.core.stages import classifier_artefact
from stillproof.core.store import Artefact
from stillproof.core.training import Fit, Recipe
from stillproof.errors import TrainingDiverged
from stillproof.serving.oracle import Oracle, Reveal
from stillproof.theft.asking import portion, shares
from stillproof.theft.lesson import Lesson
from stillproof.theft.outcome import DIVERGED, divergence_of
from stillproof.theft.stages import HELD, attempt, draw, images_of, settle
from stillproof.theft.thieves.active import ask_actively, farthest_first, most_uncertain
from stillproof.theft.thieves.jacobian import ask_augmented, augmented
from stillproof.theft.thieves.knockoff import ask_about_others, fitted
from stillproof.theft.thieves.repeat_averaging import ask_repeatedly
from stillproof.theft.transfer import Queries

VICTIM = Model("zoo:cnn?width=4")
CODE = "tests.victims:wavering"
CONTEXT = Context(Runtime.choose(), code=frozenset({CODE}))
TRAINING: dict[str, Any] = {"model": VICTIM, "recipe": Recipe(epochs=2, batch_size=50, learning_rate=0.1), "seed": 5}
REVEAL = Reveal("probabilities")


@pytest.fixture(scope="module")
def data() -> Artefact:
    return load_data.run(CONTEXT, source=Digits(), limit=None)


@pytest.fixture(scope="module")
def drawn(data: Artefact) -> Artefact:
    return draw.run(CONTEXT, data, queries=Queries.parse("6/class"), origin="outside", labelled=True, seed=1)


def served(drawn: Artefact, model: Model = VICTIM) -> Artefact:
    images = images_of(drawn)
    made = model.fresh(images.shape, 10, 0) if model is VICTIM else model.build(images.shape, 10)
    return classifier_artefact(made, model, images, cost=Cost())


class Counted:
    """Counts each image that any oracle is asked about."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[bytes] = []
        original = Oracle.ask

        def ask(oracle: Oracle, images: ImageSet) -> Any:
            self.seen += [image.numpy().tobytes() for image in images.images]
            return original(oracle, images)

        monkeypatch.setattr(Oracle, "ask", ask)


def rows(images: ImageSet) -> list[bytes]:
    return [image.numpy().tobytes() for image in images.images]


def asked_by(name: str, drawn: Artefact, data: Artefact, victim: Artefact) -> Artefact:
    serving: dict[str, Any] = {"served": victim, "reveal": REVEAL}
    jobs: dict[str, Callable[[], Artefact]] = {
        "repeat": lambda: ask_repeatedly.run(CONTEXT, drawn, times=4, seed=5, **serving),
        "jacobian": lambda: ask_augmented.run(CONTEXT, drawn, rounds=3, epsilon=0.1, views=0.4, **TRAINING, **serving),
        "entropy": lambda: ask_actively.run(
            CONTEXT, drawn, data, choose="entropy", rounds=3, origin="outside", **TRAINING, **serving
        ),
        "k-centre": lambda: ask_actively.run(
            CONTEXT, drawn, data, choose="k-centre", rounds=3, origin="outside", **TRAINING, **serving
        ),
        "knockoff": lambda: ask_about_others.run(CONTEXT, drawn, data, seed=5, **serving),
    }
    return jobs[name]()


EVERYONE = ["repeat", "jacobian", "entropy", "k-centre", "knockoff"]


@pytest.mark.parametrize("name", EVERYONE)
def test_each_query_is_counted_and_none_is_beyond_the_budget(
    name: str, drawn: Artefact, data: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    made = asked_by(name, drawn, data, served(drawn))
    assert made.values["queries"] == len(counted.seen) == 60
    assert made.values["bits"] == 60 * 320
    kept = images_of(made)
    assert set(rows(kept)) <= set(counted.seen)
    assert len(kept) == len(made.tensors[TEACHER]) == (59 if name == "repeat" else 60)


@pytest.mark.parametrize("name", EVERYONE)
def test_all_thieves_choose_by_the_same_images(name: str, drawn: Artefact, data: Artefact) -> None:
    made = asked_by(name, drawn, data, served(drawn))
    images = images_of(drawn)
    _, held = images.split((0.8, 0.2), 5)
    marked = made.tensors[HELD]
    assert rows(images_of(made).subset(marked.nonzero().flatten())) == rows(images.subset(held))
    assert not set(rows(images_of(made).subset((~marked).nonzero().flatten()))) & set(rows(images.subset(held)))


@pytest.mark.parametrize("name", EVERYONE)
def test_without_labels_the_same_images_are_asked_about(name: str, drawn: Artefact, data: Artefact) -> None:
    unlabelled = Artefact(drawn.values, {"images": drawn.tensors["images"]})
    made = asked_by(name, unlabelled, data, served(drawn))
    assert images_of(made).labels is None
    assert made.values["queries"] == 60


def test_an_attempt_scores_by_what_is_held_out(drawn: Artefact, data: Artefact) -> None:
    made = asked_by("entropy", drawn, data, served(drawn))
    objective = Distillation(temperature=1.0, alpha=0.5)
    found = attempt.run(CONTEXT, made, objective=objective, **TRAINING)
    held = int(made.tensors[HELD].sum())
    assert found.cost.forwards == 2 * (60 - held) + held
    assert (found.values["score"] * held) % 1 == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", EVERYONE)
def test_asking_twice_gives_the_same(name: str, drawn: Artefact, data: Artefact) -> None:
    torch.manual_seed(1)
    one = asked_by(name, drawn, data, served(drawn))
    torch.manual_seed(2)
    other = asked_by(name, drawn, data, served(drawn))
    assert all(torch.equal(value, other.tensors[key]) for key, value in one.tensors.items())


def test_a_wavering_oracle_is_asked_again_and_its_answers_averaged(
    drawn: Artefact, data: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    made = asked_by("repeat", drawn, data, served(drawn, Model(CODE)))
    held = int(made.tensors[HELD].sum())
    again = (60 - held) // 4
    assert len(images_of(made)) == held + again
    assert made.values["queries"] == len(counted.seen) == held + 4 * again
    for image in rows(images_of(made))[held:]:
        assert counted.seen.count(image) == 4
    assert torch.allclose(made.tensors[TEACHER].exp().sum(1), torch.ones(held + again), atol=1e-5)


# Jacobian


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight


def test_a_view_moves_along_the_sign_of_the_thief_s_own_gradient() -> None:
    pixels = torch.randint(100, 150, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([0, 1, 2, 1, 0])
    made = augmented(Linear(), ImageSet(pixels, classes, ("a", "b", "c"), "five"), classes, 0.1)
    expected = pixels + (0.1 * 255 * Linear().weight.T[classes].sign()).view(5, 1, 8, 8)
    assert float((made.images - expected).abs().max()) <= 0.51
    assert torch.equal(made.known_labels(), classes)
    said = [Linear()(as_float(images)).gather(1, classes[:, None]) for images in (pixels, made.images)]
    assert (said[1] > said[0]).all()


def test_views_stay_images(drawn: Artefact, data: Artefact) -> None:
    made = asked_by("jacobian", drawn, data, served(drawn))
    known = set(rows(images_of(drawn)))
    views = [image not in known for image in rows(images_of(made))]
    held = int(made.tensors[HELD].sum())
    assert sum(views) == int(0.4 * (60 - held))


# active learning


def test_the_most_uncertain_and_the_farthest() -> None:
    said = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.9, 0.1], [0.6, 0.4]])
    assert most_uncertain(said, 2).tolist() == [1, 3]
    line = torch.tensor([[0.0], [1.0], [2.0], [9.0], [10.0]])
    assert farthest_first(line, torch.tensor([[0.0]]), 3).tolist() == [4, 2, 1]
    assert sorted(farthest_first(torch.zeros(3, 2), torch.zeros(1, 2), 3).tolist()) == [0, 1, 2]


def test_active_thieves_ask_about_the_pool_and_never_twice(drawn: Artefact, data: Artefact) -> None:
    for name in ("entropy", "k-centre"):
        made = images_of(asked_by(name, drawn, data, served(drawn)))
        labels = dict(zip(rows(carve(data).pool), carve(data).pool.known_labels().tolist(), strict=True))
        assert len(set(rows(made))) == 60
        assert [labels[image] for image in rows(made)] == made.known_labels().tolist()
        assert set(rows(made)) - set(rows(images_of(drawn)))


def test_where_all_others_are_copies_of_what_was_asked_an_active_thief_asks_no_more(
    drawn: Artefact, data: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = images_of(drawn)
    parts = replace(carve(data), pool=asked.subset(torch.arange(len(asked)).repeat(2)))
    monkeypatch.setattr("stillproof.theft.thieves.active.carve", lambda _: parts)
    made = asked_by("entropy", drawn, data, served(drawn))
    assert set(rows(images_of(made))) <= set(rows(asked))
    assert made.values["queries"] <= 60


# other people's images


def test_other_images_are_brought_into_the_victim_s_shape() -> None:
    grey = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(fitted(grey, (1, 8, 8)), grey)
    assert torch.equal(fitted(grey, (3, 8, 8)), grey.repeat(1, 3, 1, 1))
    colours = torch.tensor([10, 20, 60], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    assert torch.equal(fitted(colours, (1, 8, 8)), torch.full((1, 1, 8, 8), 30, dtype=torch.uint8))
    larger = fitted(grey, (3, 32, 32))
    assert larger.shape == (3, 3, 32, 32)
    assert float((F.avg_pool2d(larger[:, :1].float(), 4).mean() - grey.float().mean()).abs()) < 5


def test_other_images_need_no_labels_of_their_own(drawn: Artefact, data: Artefact) -> None:
    unlabelled = Artefact(drawn.values, {"images": drawn.tensors["images"]})
    assert images_of(asked_by("knockoff", unlabelled, data, served(drawn))).labels is None
    made = asked_by("knockoff", drawn, data, served(drawn))
    other = ~made.tensors[HELD]
    assert torch.equal(images_of(made).known_labels()[other], made.tensors[TEACHER].argmax(1)[other])


@pytest.mark.parametrize("name", ["knockoff", "jacobian"])
def test_a_student_of_other_images_learns_none_of_the_victim_s_kind(
    name: str, drawn: Artefact, data: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other students learn in the end what they were chosen by."""
    learnt: list[bytes] = []
    original = Lesson.student

    def student(lesson: Lesson, what: str = "") -> nn.Module:
        learnt[:] = rows(lesson.images)
        return original(lesson, what)

    monkeypatch.setattr(Lesson, "student", student)
    transfer = asked_by(name, drawn, data, served(drawn))
    tried = [Artefact({"score": 0.5, "loss": 1.0})]
    objectives = [Distillation(temperature=1.0, alpha=1.0)]
    settle.run(CONTEXT, transfer, tried, data, objectives=objectives, **TRAINING)
    held = set(rows(images_of(transfer).subset(transfer.tensors[HELD].nonzero().flatten())))
    assert len(learnt) == (60 - len(held) if name == "knockoff" else 60)
    assert bool(set(learnt) & held) == (name != "knockoff")


# where training diverges


def settled(drawn: Artefact, data: Artefact, diverging: set[float], monkeypatch: pytest.MonkeyPatch) -> Artefact:
    """Of three candidates, at T = 1, 2 and 3, the last of which diverged when it was tried; these diverge now."""
    transfer = asked_by("repeat", drawn, data, served(drawn))
    original = Lesson.fit

    def fit(lesson: Lesson, student: nn.Module, objective: Any, *given: Any, **more: Any) -> Fit:
        if objective.temperature in diverging:
            raise TrainingDiverged(f"the loss at T = {objective.temperature:g} became nan.")
        return original(lesson, student, objective, *given, **more)

    monkeypatch.setattr(Lesson, "fit", fit)
    tried = [Artefact({"score": 0.5, "loss": 1.0}), Artefact({"score": 0.6, "loss": 1.0})]
    tried.append(Artefact({"score": 0.0, "loss": 1e9, DIVERGED: "the loss became nan."}))
    objectives = [Distillation(temperature=t, alpha=1.0) for t in (1.0, 2.0, 3.0)]
    return settle.run(CONTEXT, transfer, tried, data, objectives=objectives, **TRAINING)


def test_where_the_best_candidate_diverges_the_next_is_trained(
    drawn: Artefact, data: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settled(drawn, data, set(), monkeypatch).values["chosen"] == 1
    found = settled(drawn, data, {2.0}, monkeypatch)
    assert (found.values["chosen"], divergence_of(found)) == (0, None)


def test_where_all_diverge_the_thief_has_no_copy_and_the_run_goes_on(
    drawn: Artefact, data: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = settled(drawn, data, {1.0, 2.0}, monkeypatch)
    assert (found.values["chosen"], divergence_of(found)) == (None, "the loss at T = 1 became nan.")
    assert found.values["scores"] == [0.5, 0.6, 0.0]
    assert len(found.tensors["logits"]) == len(found.tensors["labels"])


# parts


def test_portions_and_shares_are_exact() -> None:
    assert [sum(shares(total, 3)) for total in range(12)] == list(range(12))
    images = ImageSet(torch.zeros(30, 1, 8, 8, dtype=torch.uint8), torch.arange(30) % 3, ("a", "b", "c"), "thirty")
    for many in range(31):
        rows_of = portion(images, many, 4)
        assert len(set(rows_of.tolist())) == many
    assert (torch.arange(30) % 3)[portion(images, 15, 4)].bincount().tolist() == [5, 5, 5]
