"""The thief who undoes a response: nearer to the truth where it can be undone, and harmless to itself where not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from stillproof.core.classifiers import Model
from stillproof.core.distillation import TEACHER, Distillation
from stillproof.core.noise import Noise
from stillproof.core.plan import Context
from stillproof.core.plugins import build
from stillproof.core.runtime import Runtime
from stillproof.core.spec import Spec
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import InputError
from stillproof.serving.oracle import Reveal
from stillproof.theft.lesson import BUDGET, Lesson
from stillproof.theft.stages import HELD_OUT, SERVED, attempt, images_of
from stillproof.theft.thieves.recovery import (
    SHADOWS,
    AsServed,
    Recovery,
    Restorer,
    answered,
    guessed,
    recover,
    restorer,
    shadow_answers,
    shadow_parts,
)

CONTEXT = Context(Runtime.choose())
TRAINING: dict[str, Any] = {"model": Model("zoo:cnn?width=4"), "recipe": Recipe(epochs=1, batch_size=8), "seed": 5}
PROBABILITIES = Reveal("probabilities")


def victim_s(many: int, seed: int, sure: float = 1.5) -> Tensor:
    """Answers of a victim: logits, (many, 5), with one class ahead."""
    noise = Noise(seed, torch.arange(many), 0)
    return sure * noise.normal((5,)) + 3 * torch.nn.functional.one_hot(noise.integers(0, 5, stream="class"), 5)


def distance(first: Tensor, second: Tensor) -> float:
    return float((first.exp() - second.exp()).abs().sum(dim=1).mean())


@cache
def learnt_map(guess: str, reveal: Reveal) -> Restorer:
    """By a thief whose shadow answers are of another victim, less sure of itself."""
    original = shadow_answers(victim_s(100, 1, sure=1.0), 3000, 7)
    return restorer(answered(original, guessed(guess), reveal), original, 7)


def recovered(guess: str, served: Tensor, reveal: Reveal = PROBABILITIES) -> Tensor:
    """The answers that it recovers."""
    found: Tensor = learnt_map(guess, reveal)(served)
    return found


@pytest.mark.parametrize(
    ("guess", "left"), [("power", 0.05), ("reverse-sigmoid", 0.7), ("reverse-sigmoid?beta=0.1", 0.6)]
)
def test_what_can_be_undone_is(guess: str, left: float) -> None:
    """A reverse sigmoid sends several small probabilities to one: some of its distance stays."""
    truth = victim_s(300, 2).log_softmax(1)
    served = answered(truth, guessed(guess), PROBABILITIES)
    assert distance(served, truth) > 0.02
    assert distance(recovered(guess, served), truth) < left * distance(served, truth)


def test_p_to_a_third_is_undone_class_by_class() -> None:
    truth = victim_s(300, 2).log_softmax(1)
    found = recovered("power", (truth / 3).log_softmax(1)).exp()
    assert float((found - truth.exp()).abs().amax(dim=1).mean()) < 0.02
    assert float((found.argmax(1) == truth.argmax(1)).float().mean()) > 0.97


@pytest.mark.parametrize("guess", ["reverse-sigmoid", "label-only", "top?k=2", "round?decimals=0", "modelguard-w"])
@pytest.mark.parametrize("reveal", ["probabilities", "logits", "top-2"])
def test_no_guess_makes_an_answer_that_is_none(guess: str, reveal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillproof.theft.thieves.recovery.STEPS", 20)
    original = shadow_answers(victim_s(100, 1), 400, 7)
    learnt = restorer(answered(original, guessed(guess), Reveal.parse(reveal)), original, 7)
    for served in ("label-only", "round?decimals=1", "power"):
        found = learnt(answered(victim_s(50, 3), guessed(served), Reveal.parse(reveal)))
        assert bool(found.isfinite().all())
        assert torch.allclose(found.exp().sum(1), torch.ones(50), atol=1e-5)


def test_an_answer_is_recovered_by_itself() -> None:
    served = answered(victim_s(40, 3), guessed("power"), PROBABILITIES)
    order = torch.arange(39, -1, -1)
    whole = recovered("power", served)
    assert torch.allclose(recovered("power", served[order])[order], whole, atol=1e-5)
    assert torch.allclose(recovered("power", served[:3]), whole[:3], atol=1e-5)


def test_shadow_answers_are_answers_and_depend_on_the_seed_alone() -> None:
    logits = victim_s(30, 4)
    torch.manual_seed(0)
    one = shadow_answers(logits, 400, 7)
    torch.manual_seed(1)
    assert torch.equal(one, shadow_answers(logits, 400, 7))
    assert not torch.equal(one, shadow_answers(logits, 400, 8))
    assert one.shape == (400, 5)
    assert bool(one.isfinite().all())
    assert torch.allclose(one.exp().sum(1), torch.ones(400), atol=1e-5)
    # the quarter around the answers of the shadow students has their mean: E Dirichlet(c·m) = m
    many = shadow_answers(logits, 40000, 7)
    assert torch.allclose(many[20000:30000].exp().mean(0), logits.softmax(1).mean(0), atol=0.02)
    assert torch.allclose(many[30000:].exp().mean(0), torch.full((5,), 0.2), atol=0.02)


def asked(*, labelled: bool) -> Artefact:
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = {"labels": torch.arange(40) % 5} if labelled else {}
    served = answered(victim_s(40, 6), guessed("reverse-sigmoid"), PROBABILITIES)
    values = {"classes": list("abcde"), "name": "forty", "queries": 40, "bits": 6400.0}
    return Artefact(values, {"images": pixels, **labels, TEACHER: served})


def recovery(given: Artefact, monkeypatch: pytest.MonkeyPatch) -> Artefact:
    """With a map that has hardly learnt: what it says does not matter to a test of the stage around it."""
    monkeypatch.setattr("stillproof.theft.thieves.recovery.STEPS", 20)
    return recover.run(CONTEXT, given, guess=guessed("reverse-sigmoid"), reveal=PROBABILITIES, samples=400, **TRAINING)


@pytest.mark.parametrize("labelled", [True, False])
def test_images_labels_and_counts_of_the_questions_stay(labelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = asked(labelled=labelled)
    made = recovery(given, monkeypatch)
    assert made.values == given.values
    assert (images_of(made).labels is None) == (not labelled)
    assert torch.equal(made.tensors["images"], given.tensors["images"])
    assert torch.equal(made.tensors[SERVED], given.tensors[TEACHER])
    assert not torch.equal(made.tensors[TEACHER], given.tensors[TEACHER])
    # two students, each trained once on its half of what is not held out, each asked about the other half
    kept, _ = images_of(given).split((1 - HELD_OUT, HELD_OUT), 5)
    assert (made.cost.queries, made.cost.forwards, made.cost.backwards) == (0, 2 * len(kept), len(kept))


def test_what_the_response_was_tuned_to_is_what_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    guesses: list[object] = []
    monkeypatch.setattr("stillproof.theft.thieves.recovery.STEPS", 1)
    monkeypatch.setattr(
        "stillproof.theft.thieves.recovery.answered",
        lambda original, response, reveal: guesses.append(response) or answered(original, response, reveal),
    )
    common: dict[str, Any] = {"guess": guessed("power"), "reveal": PROBABILITIES, "samples": 40, **TRAINING}
    recover.run(CONTEXT, asked(labelled=True), Artefact({"option": "exponent", "value": 0.1}), **common)
    recover.run(CONTEXT, asked(labelled=True), **common)
    assert guesses == [guessed("power?exponent=0.1"), guessed("power")]


def test_the_shadow_students_learn_half_each_of_what_is_not_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[list[bytes]] = []
    original = Lesson.student

    def student(lesson: Lesson, what: str = "") -> torch.nn.Module:
        learnt.append([image.numpy().tobytes() for image in lesson.images.images])
        return original(lesson, what)

    monkeypatch.setattr(Lesson, "student", student)
    given = asked(labelled=True)
    recovery(given, monkeypatch)
    kept, _ = images_of(given).split((1 - HELD_OUT, HELD_OUT), 5)
    known = sorted(image.numpy().tobytes() for image in given.tensors["images"][kept])
    assert sorted(learnt[0] + learnt[1]) == known
    assert abs(len(learnt[0]) - len(learnt[1])) <= 5


@pytest.mark.parametrize("many", [2, 3, 4, 5, 12])
def test_no_shadow_student_learns_fewer_than_two_images_or_answers_about_its_own(many: int) -> None:
    images = images_of(asked(labelled=True)).subset(torch.arange(many + 2))
    kept, held = torch.arange(many), torch.arange(many, many + 2)
    parts = shadow_parts(images, kept, held, 5)
    assert len(parts) == (2 if many >= 4 else 1)
    for rows, others in parts:
        assert len(rows) >= 2 <= len(others)
        assert not set(rows.tolist()) & set(others.tolist())
        assert set(rows.tolist()) <= set(kept.tolist())


def test_without_labels_it_is_scored_by_the_classes_that_were_served() -> None:
    """Else a recovery that names one class for everything would be a perfect thief."""
    given = asked(labelled=False)
    one_class = torch.full((40, 5), -9.0).index_fill(1, torch.tensor([2]), 0.0)
    tensors = {**given.tensors, TEACHER: one_class, SERVED: given.tensors[TEACHER]}
    objective = Recovery(alpha=1, temperature=1).candidates()[0]
    common = {"objective": objective, **TRAINING, "recipe": Recipe(epochs=20, batch_size=8)}
    score = attempt.run(CONTEXT, replace(given, tensors=tensors), **common).values["score"]
    _, held = images_of(given).split((1 - HELD_OUT, HELD_OUT), 5)
    share = float((given.tensors[TEACHER][held].argmax(1) == 2).double().mean())
    assert score == pytest.approx(share)
    assert share < 1


def test_plain_kd_is_among_what_is_tried() -> None:
    """So that a wrong guess leaves the thief no worse than one who guesses nothing."""
    found = Recovery().candidates()
    served = [each for each in found if isinstance(each, AsServed)]
    assert len(found) == 2 * len(served) == BUDGET - SHADOWS
    assert {(each.temperature, each.alpha) for each in served} == {(each.temperature, each.alpha) for each in found}
    given = asked(labelled=True)
    recovered = {**given.tensors, TEACHER: given.tensors[TEACHER].flip(1), SERVED: given.tensors[TEACHER]}
    one = attempt.run(CONTEXT, replace(given, tensors=recovered), objective=served[0], **TRAINING)
    plain = Distillation(temperature=served[0].temperature, alpha=served[0].alpha)
    assert one.values == attempt.run(CONTEXT, given, objective=plain, **TRAINING).values
    assert one.values != attempt.run(CONTEXT, replace(given, tensors=recovered), objective=plain, **TRAINING).values


def test_nothing_is_recovered_below_what_was_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    sure = torch.full((40, 5), -60.0).index_fill(1, torch.tensor([0]), 0.0)
    monkeypatch.setattr("stillproof.theft.thieves.recovery.restorer", lambda *_: lambda _: sure)
    found = recovery(asked(labelled=True), monkeypatch).tensors[TEACHER]
    assert float(found.exp().min()) == pytest.approx(1e-8, rel=1e-3)
    assert torch.allclose(found.exp().sum(1), torch.ones(40), atol=1e-5)


def test_a_guess_is_a_spec_and_what_answers_do_not_determine_is_refused() -> None:
    def thief(text: str) -> Recovery:
        found: Recovery = build("thief", Spec.parse(text))
        return found

    assert thief("recovery?guess=round?decimals=1").title == "recovery from rounded to 1 decimals"
    assert thief("recovery?guess=top?k=3+round?decimals=1").title == "recovery from top-3, then rounded to 1 decimals"
    assert thief("recovery").title.startswith("recovery from reverse sigmoid")
    for guess, why in (("mad", "images"), ("adaptive-misinformation", "images"), ("modelguard-s", "memory")):
        with pytest.raises(InputError, match=why):
            thief(f"recovery?guess={guess}")
        with pytest.raises(InputError, match=why):
            thief(f"recovery?guess=round+{guess}")
    with pytest.raises(InputError, match="Did you mean 'round'"):
        thief("recovery?guess=rond")
    with pytest.raises(InputError, match="nothing to learn from"):
        thief("recovery?samples=1")
