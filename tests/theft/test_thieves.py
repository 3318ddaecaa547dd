"""Every thief of the table: what it promises holds, and what it reads is all it reads."""

import math
from dataclasses import asdict, is_dataclass

import pytest
import torch

from stillproof.core.classifiers import Model
from stillproof.core.distillation import TEACHER, Batch, Distillation
from stillproof.core.images import ImageSet, as_float
from stillproof.core.noise import Noise
from stillproof.core.plan import Context
from stillproof.core.plugins import BUILT_IN, build
from stillproof.core.runtime import Runtime
from stillproof.core.spec import Spec
from stillproof.core.training import Recipe
from stillproof.errors import InputError
from stillproof.theft import reference
from stillproof.theft.asking import ChoosesQueries, spread
from stillproof.theft.lesson import BUDGET, Course, Lesson, trainings
from stillproof.theft.stages import SERVED
from stillproof.theft.thieves import TEMPERATURES, Thief
from stillproof.theft.transfer import Queries

THIEVES = sorted(BUILT_IN["thief"])


def thief(text: str) -> Thief:
    found: Thief = build("thief", Spec.parse(text))
    return found


def losses(name: str, *, labelled: bool, answers: torch.Tensor) -> list[float]:
    """The loss of each candidate on one batch; for a course, that of its last student after one epoch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    index = torch.arange(8)
    labels = index % 4 if labelled else None
    images = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    batch = Batch(as_float(images), labels, index, {TEACHER: answers, SERVED: answers}, Noise(0, index, 0))
    given = ImageSet(images, labels, ("a", "b", "c", "d"), "eight")
    lesson = Lesson(
        CONTEXT, given, {TEACHER: answers, SERVED: answers}, Model("zoo:cnn?width=4"), Recipe(epochs=1, batch_size=8), 0
    )
    return [
        candidate.train(lesson)[1].loss if isinstance(candidate, Course) else float(candidate(model, batch).detach())
        for candidate in thief(name).candidates()
    ]


CONTEXT = Context(Runtime.choose())
ANSWERS = torch.randn(8, 4, generator=torch.Generator().manual_seed(2)).log_softmax(1)


def spent(name: str) -> int:
    """Trainings that a thief spends before it settles."""
    found = thief(name)
    choosing = found.substitutes if isinstance(found, ChoosesQueries) else 0
    return choosing + sum(trainings(candidate) for candidate in found.candidates())


@pytest.mark.parametrize("name", THIEVES)
def test_a_thief_stays_within_the_budget(name: str) -> None:
    assert 1 <= spent(name) <= BUDGET


@pytest.mark.parametrize("name", THIEVES)
def test_what_a_thief_tries_can_be_part_of_a_key(name: str) -> None:
    for candidate in thief(name).candidates():
        assert is_dataclass(candidate)
        assert type(candidate).__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert candidate == type(candidate)(**asdict(candidate))  # type: ignore[call-overload]


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
@pytest.mark.parametrize("name", THIEVES)
def test_no_thief_stumbles_over_a_probability_of_zero(name: str, kept: int) -> None:
    """Labels are among the hidden classes as well."""
    smallest = ANSWERS.topk(kept, dim=1).values[:, -1:]
    hidden = ANSWERS.masked_fill(smallest > ANSWERS, -torch.inf).log_softmax(1)
    assert all(math.isfinite(loss) for loss in losses(name, labelled=True, answers=hidden))


@pytest.mark.parametrize("name", THIEVES)
def test_a_thief_without_need_of_labels_never_touches_them(name: str) -> None:
    if thief(name).needs_labels:
        with pytest.raises(InputError, match="needs labels"):
            losses(name, labelled=False, answers=ANSWERS)
    else:
        assert losses(name, labelled=False, answers=ANSWERS) == losses(name, labelled=True, answers=ANSWERS)


@pytest.mark.parametrize("name", THIEVES)
def test_a_thief_that_reads_the_label_reads_nothing_else(name: str) -> None:
    sharper = (ANSWERS * 3).log_softmax(1)  # another answer with the same argmax
    same = losses(name, labelled=True, answers=ANSWERS) == losses(name, labelled=True, answers=sharper)
    assert same == (thief(name).reads == "label")


@pytest.mark.parametrize("name", THIEVES)
def test_candidates_differ_and_say_so(name: str) -> None:
    said = [str(candidate) for candidate in thief(name).candidates()]
    assert len(set(said)) == len(said) >= 1
    assert thief(name).title


def test_what_a_budget_has_no_room_for_is_left_out_evenly() -> None:
    tries = [Distillation(temperature=t) for t in range(1, 11)]
    assert [each.temperature for each in spread(tries, 4)] == [2, 4, 7, 9]
    assert [each.temperature for each in spread(tries, 1)] == [6]
    assert spread(tries, 10) == spread(tries, 11) == tuple(tries)


@pytest.mark.parametrize("name", ["repeat-averaging", "jacobian", "active", "recovery"])
def test_who_asks_otherwise_tries_the_whole_span_of_temperatures(name: str) -> None:
    found = {candidate.temperature for candidate in thief(name).candidates()}  # type: ignore[attr-defined]
    assert (min(found), max(found)) == (min(TEMPERATURES), max(TEMPERATURES))


def test_a_fixed_thief_tries_one_thing_and_is_named_for_it() -> None:
    fixed = thief("kd?temperature=4&alpha=0.9")
    assert [str(candidate) for candidate in fixed.candidates()] == ["T = 4, α = 0.9"]
    assert fixed.title == "KD, fixed T = 4, α = 0.9"
    assert fixed.candidates()[0] in thief("kd").candidates()
    for bad in ("kd?temperature=0", "kd?alpha=2", "kd-unlabelled?temperature=-1"):
        with pytest.raises(InputError):
            thief(bad)


def test_t_one_is_among_what_every_soft_thief_tries() -> None:
    for name in ("kd", "kd-unlabelled", "top", "dkd", "logit-std", "scm", "skeptical", "markov-kd"):
        assert any(candidate.temperature == 1 for candidate in thief(name).candidates())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["kd", "kd-unlabelled", "top", "knockoff", "repeat-averaging", "active", "recovery"])
def test_a_power_of_the_answers_cannot_hide_from_a_thief_s_temperature(name: str) -> None:
    """What is served as p^½ is p again at T = ½."""
    served = (ANSWERS / 2).log_softmax(1)
    read = [(served / candidate.temperature).softmax(1) for candidate in thief(name).candidates()]  # type: ignore[attr-defined]
    assert min(float((each - ANSWERS.exp()).abs().max()) for each in read) < 1e-6


def test_the_reference_is_tuned_as_hard_as_the_thief_who_tunes_most() -> None:
    assert len(reference.candidates()) == max(spent(name) for name in THIEVES) == BUDGET
    assert reference.candidates()[0].label_smoothing == 0


def test_queries_are_drawn_as_asked(toy: ImageSet) -> None:
    assert Queries.parse(" 50 / class ") == Queries(50, per_class=True)
    assert Queries.parse("500").total(10) == 500
    drawn = Queries.parse("4/class").draw(toy, 0)
    assert drawn.known_labels().bincount().tolist() == [4, 4, 4]
    assert len(Queries.parse("17").draw(toy, 0)) == 17
    first, again, other = (Queries.parse("17").draw(toy, seed).fingerprint() for seed in (0, 0, 1))
    assert first == again != other
    for bad in ("0", "x", "5/image", "", "-3", "0/class"):
        with pytest.raises(InputError, match="no number of queries"):
            Queries.parse(bad)
    with pytest.raises(InputError, match="has 60 images"):
        Queries.parse("61").draw(toy, 0)
