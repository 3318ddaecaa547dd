"""Objectives beyond plain KD: their equations against independent ones, and that a student learns from each."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stillproof.core.adapters import Answered
from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import (
    DKD,
    TEACHER,
    Batch,
    CrossEntropy,
    Distillation,
    StandardisedDistillation,
    dkd_divergences,
    kd_divergence,
    standardised,
)
from stillproof.core.feature_distillation import (
    CRD,
    RKD,
    AttentionTransfer,
    FeatureObjective,
    FitNets,
    angles,
    attention_maps,
    attention_transfer,
    contrast,
    distances,
    relational,
)
from stillproof.core.features import Watched
from stillproof.core.images import ImageSet, as_float
from stillproof.core.noise import Noise
from stillproof.core.plugins import BUILT_IN, build
from stillproof.core.runtime import Runtime
from stillproof.core.spec import Spec
from stillproof.core.training import Recipe, fit
from stillproof.errors import InputError

logits = st.integers(2, 7).flatmap(
    lambda k: st.tuples(*(st.lists(st.floats(-9, 9), min_size=3 * k, max_size=3 * k) for _ in range(2)))
)


@settings(max_examples=50, deadline=None)
@given(logits, st.floats(0.5, 20), st.integers(0, 99))
def test_kd_is_the_decoupled_parts_weighted_by_the_teachers_doubt(
    both: tuple[list[float], list[float]], temperature: float, seed: int
) -> None:
    """Zhao et al. 2022, eq. 6: KL = TCKD + (1 − p_t)·NCKD, image by image."""
    student, teacher = (torch.tensor(values, dtype=torch.float64).view(3, -1) for values in both)
    for row in range(3):
        pair = student[row : row + 1], teacher[row : row + 1]
        label = torch.tensor([seed % student.shape[1]])
        binary, among = dkd_divergences(*pair, label, temperature)
        doubt = 1 - (pair[1] / temperature).softmax(1)[0, label]
        whole = kd_divergence(*pair, temperature)
        assert torch.allclose(binary + doubt * among, whole, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(logits, st.floats(0.1, 9), st.floats(-5, 5))
def test_standardised_logits_forget_scale_and_shift(
    both: tuple[list[float], list[float]], scale: float, shift: float
) -> None:
    values = torch.tensor(both[0], dtype=torch.float64).view(3, -1)
    values = values + torch.arange(values.shape[1])  # no row without spread
    if (values.std(dim=1) * min(scale, 1) < 0.02).any():
        return
    assert torch.allclose(standardised(values * scale + shift), standardised(values), atol=1e-3)


def test_attention_transfer_sees_places_and_not_channels() -> None:
    features = torch.rand(4, 6, 8, 8)
    assert attention_maps(features).norm(dim=1).allclose(torch.ones(4))
    assert attention_transfer(features, 3 * features.flip(1)) < 1e-12
    assert attention_transfer(features, features.flip(2)) > 1e-5
    assert attention_transfer(torch.rand(4, 2, 4, 4), features).isfinite()


def test_relations_do_not_change_when_the_space_is_turned_and_scaled() -> None:
    features = torch.randn(6, 5, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert relational(7 * features @ turn + 3, features, 25, 50) < 1e-9
    assert relational(torch.randn(6, 9, dtype=torch.float64), features, 25, 50) > 0.1
    by_hand = torch.cdist(features, features)
    assert distances(features).allclose(by_hand / by_hand[by_hand > 0].mean(), atol=1e-6)
    first, second = features[1] - features[0], features[2] - features[0]
    assert angles(features)[0, 1, 2].allclose(F.cosine_similarity(first, second, dim=0))


def test_contrast_is_least_where_positives_score_high_and_negatives_low() -> None:
    """At scores of 1 / n, positive and negatives are as likely noise as not: each decision costs what chance does."""
    n, negatives = 100, 10
    chance = torch.full((2, 1 + negatives), 1 / n).log()
    a_priori = torch.tensor([1 / (1 + negatives), negatives / (1 + negatives)]).log()
    expected = -(a_priori[0] + negatives * a_priori[1])
    assert contrast(chance, n).allclose(expected, atol=1e-4)
    better = chance + torch.tensor([7.0] + [-7.0] * negatives)
    assert contrast(better, n) < 0.1 * expected
    assert contrast(1000 * better, n).isfinite()


FEATURES = [FitNets(), AttentionTransfer(), RKD(), CRD(negatives=64)]


@pytest.mark.parametrize("objective", FEATURES, ids=lambda made: type(made).__name__)
@pytest.mark.parametrize("student", ["zoo:cnn?width=4", "zoo:vit?width=12&depth=1&patch=2"])
def test_a_student_learns_from_features_and_nothing_stays_attached(
    objective: FeatureObjective, student: str, digits: tuple[ImageSet, ImageSet], runtime: Runtime
) -> None:
    train = digits[0].subset(torch.arange(300))
    teacher = Model("zoo:resnet18?width=4").fresh(train.shape, 10, 0)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    pupil = Model(student).fresh(train.shape, 10, 1)
    losses = []
    for _ in range(2):
        with objective.attach(pupil, teacher, train, runtime, seed=0) as goal:
            index = torch.arange(64)
            batch = Batch(train.images[index] / 255, train.known_labels()[index], index, {}, Noise(0, index, 0))
            pupil.train()
            losses.append(float(goal(pupil, batch).detach()))
            fit(pupil, goal, train, recipe=Recipe(epochs=5, learning_rate=0.01), runtime=runtime, seed=0)
    assert losses[1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(part._forward_hooks for model in (pupil, teacher) for part in model.modules())


def test_matching_features_of_a_twin_is_free(digits: tuple[ImageSet, ImageSet]) -> None:
    train = digits[0].subset(torch.arange(100))
    model = Model("zoo:cnn?width=4").fresh(train.shape, 10, 0)
    twin = Model("zoo:cnn?width=4").fresh(train.shape, 10, 0)
    index = torch.arange(50)
    batch = Batch(train.images[index] / 255, train.known_labels()[index], index, {}, Noise(0, index, 0))
    for objective in (AttentionTransfer(), RKD()):
        with objective.attach(model, twin, train, Runtime(), seed=0) as goal, torch.no_grad():
            model.eval()
            honest = F.cross_entropy(model(batch.images), batch.known_labels())
            assert goal(model, batch).allclose(honest, atol=1e-5)


def test_an_unknown_layer_is_answered_with_those_there_are(toy: ImageSet, runtime: Runtime) -> None:
    student, teacher = (Model(f"zoo:cnn?width={width}").fresh(toy.shape, 3, 0) for width in (2, 4))
    with (
        pytest.raises(InputError, match=r"student_layer=nine(.|\n)*feature map(.|\n)*\n\s*1: 2×8×8\n\s*2: 2×8×8"),
        FitNets(student_layer="nine", teacher_layer="5").attach(student, teacher, toy, runtime, 0),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"teacher_layer=1(.|\n)*one vector an image(.|\n)*13: 16"),
        RKD(student_layer="16", teacher_layer="1").attach(student, teacher, toy, runtime, 0),
    ):
        pass
    with pytest.raises(InputError, match="each layer of the student has one of the teacher"):
        FitNets(student_layer="1,2", teacher_layer="1")


def test_several_layers_add_up(toy: ImageSet, runtime: Runtime) -> None:
    student, teacher = (Model(f"zoo:cnn?width={width}").fresh(toy.shape, 3, 0).eval() for width in (2, 4))
    index = torch.arange(20)
    batch = Batch(toy.images[index] / 255, toy.known_labels()[index], index, {}, Noise(0, index, 0))
    found = {}
    for layers in ("1", "5", "1,5"):
        objective = AttentionTransfer(student_layer=layers, teacher_layer=layers)
        with objective.attach(student, teacher, toy, runtime, 0) as goal, torch.no_grad():
            found[layers] = goal(student, batch) - F.cross_entropy(student(batch.images), batch.known_labels())
    assert found["1,5"].allclose(found["1"] + found["5"], rtol=1e-3)


def test_a_stopped_contrastive_training_goes_on_to_the_same_weights(
    toy: ImageSet, runtime: Runtime, tmp_path: Path
) -> None:
    class Stopped(Exception):  # noqa: N818
        pass

    def run(checkpoint: Path | None, stop_at: int | None) -> dict[str, torch.Tensor]:
        teacher, student = (Model("zoo:cnn?width=2").fresh(toy.shape, 3, seed) for seed in (0, 1))

        def advance(done: int, _of: int, _note: str) -> None:
            if done == stop_at:
                raise Stopped

        with CRD(negatives=8, width=4).attach(student, teacher, toy, runtime, 0) as goal:
            fit(
                student,
                goal,
                toy,
                recipe=Recipe(epochs=3, batch_size=30),
                runtime=runtime,
                seed=0,
                checkpoint=checkpoint,
                checkpoint_seconds=0,
                advance=advance,
            )
        return student.state_dict()

    with pytest.raises(Stopped):
        run(tmp_path / "c", stop_at=6)
    resumed, straight = run(tmp_path / "c", None), run(None, None)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


LOGITS = [Distillation(), DKD(), StandardisedDistillation()]


@pytest.mark.parametrize("objective", LOGITS, ids=lambda made: type(made).__name__)
def test_a_student_of_logits_comes_close_to_its_teacher(
    objective: Distillation, digits: tuple[ImageSet, ImageSet], runtime: Runtime
) -> None:
    train, test = digits
    teacher = Model("zoo:cnn?width=8").fresh(train.shape, 10, 0)
    recipe = Recipe(epochs=25, batch_size=50, learning_rate=0.1)
    fit(teacher, CrossEntropy(), train, recipe=recipe, runtime=runtime, seed=0)
    student = Model("zoo:cnn?width=4").fresh(train.shape, 10, 1)
    columns = {TEACHER: predict(teacher, train, runtime)}
    gentle = replace(recipe, learning_rate=0.03)  # the weight of DKD, 8, makes a step of .1 a coin toss
    fit(student, objective, train, recipe=gentle, runtime=runtime, seed=0, columns=columns)
    agreed = predict(student, test, runtime).argmax(1) == predict(teacher, test, runtime).argmax(1)
    assert agreed.double().mean() > 0.9


def test_every_named_objective_can_be_built_and_says_what_it_is() -> None:
    for name in BUILT_IN["objective"]:
        assert str(build("objective", Spec(name)))
    with pytest.raises(InputError, match="Did you mean 'dkd'"):
        build("objective", Spec("dkdd"))
    for bad in ("dkd?temperature=0", "logit-std?weight=-1", "crd?momentum=1", "rkd?weight=-1"):
        with pytest.raises(InputError):
            build("objective", Spec.parse(bad))


def test_coinciding_rows_do_not_make_the_relations_explode() -> None:
    features = torch.randn(8, 5)
    features[3] = features[2]
    features.requires_grad_()
    relational(features, torch.randn(8, 7), 25, 50).backward()
    assert features.grad is not None
    assert features.grad.norm() < 100
    same = torch.ones(8, 5, requires_grad=True)
    relational(same, torch.randn(8, 7), 25, 50).backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()


class Functional(torch.nn.Module):
    """Flattens by a function, works in place, has a gate and a second head: the last vector is what `last` reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.gate = torch.nn.Linear(6, 6)
        self.other = torch.nn.Linear(6, 3)
        self.last = torch.nn.Linear(6, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv(images)
        features.relu_()
        pooled = features.mean(dim=(2, 3))
        pooled = pooled * self.gate(pooled).sigmoid()
        logits: torch.Tensor = self.last(pooled)
        self.other(pooled)
        return logits


def test_what_the_logits_are_read_from_is_found_in_any_model(toy: ImageSet) -> None:
    probe = as_float(toy.images[:4])
    model = Functional().eval()
    with Watched(Answered(model), "", "vector", probe, "layer") as vector:
        assert vector.first.shape == (4, 6)
        logits = model(probe)
        assert model.last(vector.take()).allclose(logits, atol=1e-6)
    with Watched(model, "conv", "map", probe, "layer") as found:
        model(probe)
        assert (found.take() < 0).any()  # what the layer gave, not what was made of it in place


@pytest.mark.parametrize(
    ("spec", "layer", "shape"),
    [("resnet50?width=2", "16", (32, 2, 2)), ("resnet18?width=2", "9", (8, 2, 2)), ("vit?width=12", "8", (12, 2, 2))],
)
def test_the_last_map_is_a_whole_blocks(spec: str, layer: str, shape: tuple[int, ...], toy: ImageSet) -> None:
    model = Model(f"zoo:{spec}").build(toy.shape, 3)
    probe = as_float(toy.images[:4])
    with Watched(model, "", "map", probe, "layer") as chosen, Watched(model, layer, "map", probe, "layer") as expected:
        model(probe)
        assert chosen.first.shape[1:] == shape
        assert chosen.take().equal(expected.take())


def test_nothing_is_left_behind_by_what_fails(toy: ImageSet, runtime: Runtime) -> None:
    student, teacher = (Model(f"zoo:cnn?width={width}").fresh(toy.shape, 3, 0) for width in (2, 4))
    objective = FitNets(student_layer="5", teacher_layer="none")
    with pytest.raises(InputError), objective.attach(student, teacher, toy, runtime, 0):
        pass
    with pytest.raises(InputError, match="as the column 'teacher': there is no such column"):
        fit(student, Distillation(), toy, recipe=Recipe(epochs=1), runtime=runtime, seed=0)
    columns = {TEACHER: torch.zeros(60, 4)}
    with pytest.raises(InputError, match=r"\(n, 3\).*shape \(60, 4\)"):
        fit(student, DKD(), toy, recipe=Recipe(epochs=1), runtime=runtime, seed=0, columns=columns)
    assert not any(part._forward_hooks for part in student.modules())


def test_two_classes_have_no_z_scores_and_equal_logits_no_explosion() -> None:
    index = torch.arange(4)
    columns = {TEACHER: torch.randn(4, 2)}
    batch = Batch(torch.rand(4, 2), torch.tensor([0, 1, 0, 1]), index, columns, Noise(0, index, 0))
    with pytest.raises(InputError, match="two classes"):
        StandardisedDistillation()(torch.nn.Identity(), batch)
    flat = torch.zeros(4, 3, requires_grad=True)
    batch = Batch(flat, batch.labels, index, {TEACHER: torch.randn(4, 3)}, batch.noise)
    StandardisedDistillation()(torch.nn.Identity(), batch).backward()
    assert flat.grad is not None
    assert flat.grad.norm() < 1000
