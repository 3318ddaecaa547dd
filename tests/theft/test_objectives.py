"""What each adaptive thief's loss promises, against an independent computation."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.adapters import logits_of
from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import (
    TEACHER,
    Batch,
    Distillation,
    StandardisedDistillation,
    completed,
    kd_divergence,
    standardised,
)
from stillproof.core.features import Watched, feature_maps
from stillproof.core.images import ImageSet
from stillproof.core.noise import Noise
from stillproof.core.plan import Context
from stillproof.core.plugins import build
from stillproof.core.runtime import Runtime
from stillproof.core.sources import DataSource
from stillproof.core.spec import Spec
from stillproof.core.training import Fit, Recipe
from stillproof.errors import InputError
from stillproof.serving.oracle import Answer, Reveal, shown
from stillproof.theft.lesson import BUDGET, Candidate, Lesson, taught, trainings
from stillproof.theft.thieves.htc import Composition, composed
from stillproof.theft.thieves.markov_kd import MarkovDistillation, MarkovTeacher
from stillproof.theft.thieves.recovery import answered, guessed
from stillproof.theft.thieves.scm import SCM, Sequence, contrast
from stillproof.theft.thieves.skeptical import Doubt, SkepticalDistillation, shelf
from stillproof.theft.thieves.top import RevealedDistillation, revealed, revealed_divergence
from stillproof.theft.transfer import log_probabilities

N, K = 6, 5
LABELS = torch.arange(N) % K


def logits(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


class Given(nn.Module):
    """A student that answers what it holds."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, _images: Tensor) -> Tensor:
        return self.values


def batch(answers: Tensor) -> Batch:
    index = torch.arange(N)
    return Batch(torch.zeros(N, 1, 8, 8), LABELS, index, {TEACHER: answers}, Noise(0, index, 0))


def lesson(images: ImageSet, answers: Tensor, epochs: int = 1, model: str = "zoo:cnn?width=4") -> Lesson:
    recipe = Recipe(epochs=epochs, batch_size=20, learning_rate=0.1)
    return Lesson(Context(Runtime.choose()), images, {TEACHER: answers}, Model(model), recipe, 3)


# a probability of 0


def test_a_probability_of_zero_adds_nothing_to_the_divergence() -> None:
    answers, output = logits(0), logits(1)
    answers[:, 2] = -torch.inf
    p, q = answers.softmax(1).double(), (output / 4).softmax(1).double()
    soft = (answers / 4).softmax(1).double()
    assert (p[:, 2] == 0).all()
    terms = torch.where(soft > 0, soft * (soft.clamp(min=1e-300).log() - q.log()), 0.0)
    assert float(kd_divergence(output, answers, 4.0)) == pytest.approx(16 * float(terms.sum()) / N, rel=1e-5)


def read(probabilities: Tensor, reveal: str = "probabilities") -> Tensor:
    """What a thief reads of such answers, (N, K)."""
    kind = Reveal.parse(reveal)
    return log_probabilities(shown(probabilities.log(), kind), kind, probabilities.shape[1])


@pytest.mark.parametrize("reveal", ["probabilities", "logits"])
def test_a_class_served_as_zero_counts_as_the_least_that_z_scores_can_bear(reveal: str) -> None:
    served = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.9, 0.1 - 1e-12, 1e-12, 0.0], [0.6, 0.2, 0.1, 0.1]])
    answers = read(served, reveal)
    assert torch.equal(answers == -torch.inf, served == 0)
    expected = served.clone()
    expected[0, 2:], expected[1, 3] = 1e-8, 1e-12
    assert torch.allclose(completed(answers).exp(), expected, rtol=1e-4, atol=0)
    # what is left of an answer behind top-2 is not flattened: were 0 counted as 1e-38, the two would be alike
    top_two = standardised(completed(answers))[0]
    assert float(top_two[0] - top_two[1]) > 0.2


def test_a_classifier_that_returns_probabilities_serves_a_zero_as_well() -> None:
    served = torch.tensor([[0.9, 0.1, 0.0, 1e-30]])
    kind = Reveal.parse("probabilities")
    answers = log_probabilities(shown(logits_of(served), kind), kind, 4)
    assert (answers == -torch.inf).tolist() == [[False, False, True, False]]


def test_what_is_served_as_nan_is_no_answer() -> None:
    with pytest.raises(InputError, match="NaN"):
        read(torch.full((1, 4), torch.nan))


@pytest.mark.parametrize("response", ["round?decimals=0", "round?decimals=1", "top?k=1", "label-only"])
@pytest.mark.parametrize("classes", [4, 100])
def test_no_response_that_makes_zeros_makes_nan_of_kd(response: str, classes: int) -> None:
    """Nor does one that rounds everything to nothing."""
    for scale in (0.01, 8.0):
        made = scale * torch.randn(N, classes, generator=torch.Generator().manual_seed(0))
        answers = answered(made, guessed(response), Reveal.parse("probabilities"))
        for temperature in (1.0, 20.0):
            output = torch.zeros(N, classes).requires_grad_()
            kd_divergence(output, answers, temperature).backward()
            assert output.grad is not None
            assert output.grad.isfinite().all()


# top


def test_ties_at_the_bottom_are_hidden_and_nothing_else() -> None:
    full = logits(0).log_softmax(1)
    assert revealed(full).all()
    assert revealed(torch.zeros(1, K).log_softmax(1)).all()
    top = full.exp().topk(2, dim=1)
    partial = log_probabilities(Answer(top.indices, top.values), Reveal("top", 2), K)
    assert revealed(partial).sum(1).tolist() == [2] * N
    assert revealed(partial).gather(1, top.indices).all()
    rounded = torch.tensor([[0.7, 0.3, 0.0, 0.0, 0.0], [1.0, 0, 0, 0, 0]]).log()
    assert revealed(rounded).sum(1).tolist() == [2, 1]
    assert revealed(torch.tensor([[0.7, 0.3, 0.0]]).log()).tolist() == [[True, True, False]]


def test_the_top_thief_reads_the_revealed_classes_alone() -> None:
    answers = logits(0).log_softmax(1)
    hidden = answers.clone()
    hidden[:, 2:] = -torch.inf
    other = answers.clone()
    other[:, 2:] = -40.0
    output = logits(1)
    probe = output.clone().requires_grad_()
    loss = revealed_divergence(probe, hidden, 2.0)
    (gradient,) = torch.autograd.grad(loss, probe)
    assert loss.item() == revealed_divergence(output, other, 2.0).item()
    assert gradient[:, 2:].abs().max() == 0 < gradient[:, :2].abs().min()
    assert loss.item() == pytest.approx(float(kd_divergence(output[:, :2], answers[:, :2], 2.0)), rel=1e-5)
    assert float(revealed_divergence(output, answers, 2.0)) == pytest.approx(
        float(kd_divergence(output, answers, 2.0)), rel=1e-5
    )


def test_the_top_thief_takes_the_rest_from_the_labels() -> None:
    answers = F.one_hot(LABELS, K).float().log()
    loss = RevealedDistillation(temperature=2, alpha=0.9)(Given(logits(1)), batch(answers))
    assert float(loss.detach()) == pytest.approx(0.1 * float(F.cross_entropy(logits(1), LABELS)), rel=1e-5)


# dkd


def test_dkd_without_beta_is_its_formula_and_reads_the_label_s_probability_alone() -> None:
    (objective,) = build("thief", Spec.parse("dkd?temperature=4&beta=0")).candidates()
    answers, output = logits(0), logits(1)

    def two(values: Tensor) -> Tensor:
        mine = (values / 4).softmax(1).gather(1, LABELS[:, None])
        return torch.cat([mine, 1 - mine], dim=1)

    p, q = two(answers), two(output)
    expected = F.cross_entropy(output, LABELS) + 16 * (p * (p / q).log()).sum(1).mean()
    assert float(objective(Given(output), batch(answers)).detach()) == pytest.approx(float(expected), rel=1e-4)
    swapped = answers.clone()
    for row, label in enumerate(LABELS.tolist()):
        rest = [column for column in range(K) if column != label]
        swapped[row, rest] = answers[row, rest[::-1]]
    assert float(objective(Given(output), batch(swapped)).detach()) == pytest.approx(
        float(objective(Given(output), batch(answers)).detach()), rel=1e-5
    )


# logit-std


def test_logit_std_ignores_the_scale_and_the_shift_of_answers() -> None:
    for objective in build("thief", Spec.parse("logit-std")).candidates():
        assert isinstance(objective, StandardisedDistillation)
        answers, student = logits(0), Given(logits(1))
        one, other = (float(objective(student, batch(a)).detach()) for a in (answers, 0.3 * answers - 7))
        assert one == pytest.approx(other, rel=1e-4)


# htc


def test_the_composition_is_a_mixture_and_its_limits_are_the_label_and_the_answer() -> None:
    answers = logits(0)
    answers[:, 0] = -torch.inf
    mixed = composed(answers, LABELS, 20.0, 0.6)
    assert torch.allclose(mixed.sum(1), torch.ones(N))
    assert torch.allclose(mixed, 0.4 * F.one_hot(LABELS, K) + 0.6 * (answers / 20).softmax(1))
    student = Given(logits(1))
    label_alone = Composition(temperature=20, weight=0)(student, batch(answers))
    assert float(label_alone.detach()) == pytest.approx(float(F.cross_entropy(logits(1), LABELS)), rel=1e-5)


# scm


def test_contrast_by_hand_and_its_negatives_have_other_labels() -> None:
    student, master = logits(1), logits(0)

    def z(values: Tensor) -> Tensor:
        values = (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True)
        return values / values.norm(dim=1, keepdim=True)

    a, b = z(student), z(master)
    total = 0.0
    for i in range(N):
        against = [j for j in range(N) if j == i or LABELS[j] != LABELS[i]]
        scores = torch.stack([a[i] @ b[j] / 0.1 for j in against])
        total += float(scores.logsumexp(0) - a[i] @ b[i] / 0.1)
    assert float(contrast(student, master, LABELS)) == pytest.approx(total / N, rel=1e-4)
    assert contrast(master, master, LABELS) < contrast(student, master, LABELS)


def test_a_sequence_trains_as_many_students_as_it_counts_and_stays_in_the_budget(toy: ImageSet) -> None:
    answers = torch.randn(len(toy), 3, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    fits = {n: Sequence(temperature=4, weight=0.1, length=n).train(lesson(toy, answers))[1] for n in (1, 2, 3)}
    assert [fits[n].backwards for n in (1, 2, 3)] == [60, 120, 180]
    assert [fits[n].forwards for n in (1, 2, 3)] == [60, 60 + 120, 60 + 240]
    for length in (1, 2, 3, 7, 10):
        found = SCM(length=length).candidates()
        assert 1 <= sum(trainings(candidate) for candidate in found) <= BUDGET
    with pytest.raises(InputError, match="no sequence"):
        SCM(length=11)


def test_the_master_of_a_later_student_is_the_victim_and_the_student_before_it(toy: ImageSet) -> None:
    seen: list[Tensor] = []
    made: list[Tensor] = []

    class Spied(Lesson):
        def fit(self, student, objective, columns=None, *, last=True):  # type: ignore[no-untyped-def]
            seen.append(columns[TEACHER])
            trained = super().fit(student, objective, columns, last=last)
            made.append(predict(student, self.images, self.context.runtime))
            return trained

    answers = torch.randn(len(toy), 3, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    answers[0, 1] = -torch.inf
    plain = lesson(toy, answers)
    spied = Spied(plain.context, plain.images, plain.answers, plain.model, plain.recipe, plain.seed)
    Sequence(temperature=4, weight=0.1, length=3).train(spied)
    assert seen[0] is answers
    for master, before in zip(seen[1:], made[:2], strict=True):
        mean = (answers.softmax(1) + before.softmax(1)) / 2
        assert torch.allclose(master.exp(), mean, atol=1e-6)


def test_plain_kd_is_among_what_scm_tries() -> None:
    found = SCM().candidates()
    assert sum(trainings(candidate) for candidate in found) == BUDGET
    assert {c.temperature for c in found if (c.weight, c.length) == (0, 1)} == {1, 4, 8}
    assert any(c.weight > 0 and c.length == 2 for c in found)
    (alone,) = SCM(temperature=4, weight=0, length=1).candidates()
    answers, student = logits(0), Given(logits(1))
    spied: list[Tensor] = []

    class Heard(Lesson):
        def fit(self, _student, objective, columns=None, *, last=True):  # type: ignore[no-untyped-def]  # noqa: ARG002
            spied.append(objective(student, batch(answers)).detach())
            return Fit(0.0, 0, 0, None)

    images = ImageSet(torch.zeros(N, 1, 8, 8, dtype=torch.uint8), LABELS, tuple("abcde"), "six")
    plain = lesson(images, answers)
    alone.train(Heard(plain.context, images, plain.answers, plain.model, plain.recipe, plain.seed))
    kd = Distillation(temperature=4, alpha=0.5)(student, batch(answers))
    assert float(spied[0]) == pytest.approx(float(kd.detach()), rel=1e-5)


# skeptical


def test_the_skeptic_s_loss_is_the_reference_code_s(toy: ImageSet) -> None:
    student = Model("zoo:cnn?width=4").fresh(toy.shape, 3, 0).train()
    probe = toy.images[:6].float() / 255
    with Watched(student, "2", "map", probe, "test") as seen:
        doubt = Doubt(seen, 3, temperature=4.0, alpha=0.9)
        doubt.eval(), student.eval()
        answers, labels = torch.randn(6, 3), torch.arange(6) % 3
        index = torch.arange(6)
        loss = doubt(student, Batch(probe, labels, index, {TEACHER: answers}, Noise(0, index, 0)))
        deep = student(probe)
        shallow = doubt.head(seen.take())
    kl = nn.KLDivLoss(reduction="batchmean")
    expected = (
        kl(F.log_softmax(shallow / 4, 1), F.softmax(answers / 4, 1)) * 0.9 * 16
        + F.cross_entropy(shallow, labels) * 0.1
        + 0.3 * kl(F.log_softmax(shallow / 4, 1), F.softmax(deep / 4, 1))
        + 0.7 * F.cross_entropy(shallow, labels)
        + F.cross_entropy(deep, labels)
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


@pytest.mark.parametrize("model", ["zoo:cnn?width=4", "zoo:resnet18?width=4", "zoo:vit?width=12&depth=3"])
def test_the_auxiliary_head_is_no_part_of_the_student(model: str, toy: ImageSet) -> None:
    answers = torch.randn(len(toy), 3, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    given = lesson(toy, answers, model=model)
    student, _ = SkepticalDistillation(temperature=4, alpha=0.9, depth=0.34).train(given)
    fresh = given.student()
    assert {name: value.shape for name, value in student.state_dict().items()} == {
        name: value.shape for name, value in fresh.state_dict().items()
    }
    assert not any(part._forward_hooks for part in student.modules())


def test_the_head_sits_where_it_is_asked_to() -> None:
    maps = feature_maps(Model("zoo:resnet18?width=4").fresh((3, 32, 32), 10, 0), torch.rand(2, 3, 32, 32))
    sizes = {layer: found.shape[2] for layer, found in maps.items()}
    assert [sizes[shelf(maps, depth)] for depth in (0.0, 0.34, 0.67, 0.9)] == [32, 16, 8, 4]


def test_a_student_without_feature_maps_cannot_be_skeptical(toy: ImageSet) -> None:
    given = lesson(toy, torch.zeros(len(toy), 3), model="tests.victims:linear")
    with pytest.raises(InputError, match="leave skeptical out"):
        SkepticalDistillation(temperature=4, alpha=0.9, depth=0.34).train(given)


# markov


def test_markov_matrices_begin_near_the_identity_and_stay_stochastic(toy: ImageSet) -> None:
    teacher = MarkovTeacher(3, 1.0, 0.5, 10.0)
    answers = torch.randn(len(toy), 3, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    begun = teacher.matrices().detach()
    assert torch.allclose(begun, 0.05 + 0.85 * torch.eye(3).expand(3, 3, 3), atol=1e-4)
    given = lesson(toy, answers, epochs=20)
    given.fit(given.student(), teacher)
    learnt = teacher.matrices().detach()
    assert float((learnt - begun).abs().max()) > 0.01  # they are trained too
    assert float(learnt.min()) >= 0
    assert torch.allclose(learnt.sum(2), torch.ones(3, 3), atol=1e-6)


def test_markov_matrices_undo_a_planted_garbling(digits: DataSource) -> None:
    """The victim gives most of each label's probability to the third class after it."""
    images = digits.train.subset(digits.train.per_class(6, 0))
    labels = images.known_labels()
    answers = torch.full((len(images), 10), 0.02)
    answers.scatter_(1, labels[:, None], 0.3).scatter_(1, (labels[:, None] + 3) % 10, 0.54)
    teacher = MarkovTeacher(10, 1.0, 0.5, 10.0)
    given = lesson(images, answers.log(), epochs=40, model="zoo:cnn?width=8")
    given.fit(given.student(), teacher)
    undone = teacher.transformed(answers.log(), labels).detach()
    assert (answers.argmax(1) == labels).float().mean() == 0
    assert (undone.argmax(1) == labels).float().mean() == 1


def test_each_label_has_its_own_matrix_until_there_are_too_many() -> None:
    teacher = MarkovTeacher(3, 2.0, 0.5, 1.0)
    with torch.no_grad():
        teacher.deviations[1] = 50 * torch.eye(3).roll(1, dims=1)  # label 1: each class becomes the next
    answers = torch.tensor([[3.0, 1.0, -torch.inf]]).expand(2, -1).log_softmax(1)
    plain, turned = teacher.transformed(answers, torch.tensor([0, 1])).detach()
    softened = (answers[0] / 2).softmax(0)
    assert torch.allclose(plain, softened @ (0.05 + 0.85 * torch.eye(3)), atol=1e-4)
    assert torch.allclose(turned, softened.roll(1), atol=1e-4)
    assert MarkovTeacher(200, 1.0, 0.5, 1.0).matrices().shape == (1, 200, 200)
    many = MarkovTeacher(200, 1.0, 0.5, 1.0).transformed(
        torch.randn(4, 200).log_softmax(1), torch.tensor([0, 1, 2, 199])
    )
    assert torch.allclose(many.sum(1), torch.ones(4), atol=1e-5)


def test_a_course_does_not_depend_on_what_ran_before_it(toy: ImageSet) -> None:
    answers = torch.randn(len(toy), 3, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    for candidate in (
        MarkovDistillation(temperature=1, alpha=0.5, pace=10),
        SkepticalDistillation(temperature=4, alpha=0.9, depth=0.34),
        Sequence(temperature=4, weight=0.1, length=2),
    ):
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            student, _ = taught(lesson(toy, answers), candidate)
            found.append(predict(student, toy, Runtime.choose()))
        assert torch.equal(*found)


class KilledError(Exception):
    """What stands for the end of the process."""


@pytest.mark.parametrize(
    "candidate",
    [
        MarkovDistillation(temperature=1, alpha=0.5, pace=10),
        SkepticalDistillation(temperature=4, alpha=0.9, depth=0.34),
        Sequence(temperature=4, weight=0.1, length=2),
    ],
)
def test_a_killed_course_goes_on_to_the_same_student(candidate: Candidate, toy: ImageSet, tmp_path: Path) -> None:
    answers = torch.randn(len(toy), 3, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    whole, _ = taught(lesson(toy, answers, epochs=4), candidate)
    steps: list[int] = []

    def kill(_done: int, _of: int, _note: str) -> None:
        steps.append(1)
        if len(steps) == 4 * trainings(candidate) - 1:  # in the last epoch but one of the last student
            raise KilledError

    plain = lesson(toy, answers, epochs=4)
    checkpoint = tmp_path / "course.ckpt"
    dying = Context(plain.context.runtime, checkpoint, checkpoint_seconds=0, advance=kill)
    with pytest.raises(KilledError):
        taught(replace(plain, context=dying), candidate)
    assert checkpoint.exists()
    resumed = Context(plain.context.runtime, checkpoint, checkpoint_seconds=0)
    student, _ = taught(replace(plain, context=resumed), candidate)
    assert torch.equal(predict(student, toy, plain.context.runtime), predict(whole, toy, plain.context.runtime))
