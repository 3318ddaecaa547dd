"""The objectives against slow, plain versions of themselves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stillproof.core.distillation import (
    TEACHER,
    Batch,
    CrossEntropy,
    Distillation,
    OnlineTeacher,
    TeacherLabel,
    kd_divergence,
)
from stillproof.core.noise import Noise
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError


def batch(n: int = 6, *, labelled: bool = True, teacher: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(n, 1, 8, 8, generator=generator)
    index = torch.arange(n)
    columns = {} if teacher is None else {TEACHER: teacher}
    return Batch(images, index % 4 if labelled else None, index, columns, Noise(0, index, 0))


@given(st.floats(0.5, 50), st.integers(0, 1000))
def test_kd_divergence_is_its_equation(temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) * 5
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p = [math.exp(v / temperature) for v in t.tolist()]
        q = [math.exp(v / temperature) for v in s.tolist()]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(kd_divergence(student, teacher, temperature)) == pytest.approx(temperature**2 * total / 5, rel=1e-6)


def test_the_factor_t_squared_keeps_the_size_of_the_gradient() -> None:
    student, teacher = torch.randn(2, 64, 10, generator=torch.Generator().manual_seed(0))
    sizes = []
    for temperature in (20.0, 40.0):
        probe = student.clone().requires_grad_()
        kd_divergence(probe, teacher, temperature).backward()
        assert probe.grad is not None
        sizes.append(float(probe.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_log_probabilities_serve_as_well_as_logits() -> None:
    student, teacher = torch.randn(2, 8, 5)
    shifted = kd_divergence(student, teacher.log_softmax(1), 4.0)
    assert torch.allclose(kd_divergence(student, teacher, 4.0), shifted, atol=1e-5)


def test_each_objective_is_the_sum_that_it_says() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    teacher = torch.randn(6, 4)
    given = batch(teacher=teacher)
    logits = model(given.images)
    ce = nn.functional.cross_entropy(logits, given.known_labels())
    kd = kd_divergence(logits, teacher, 3.0)
    assert torch.allclose(CrossEntropy()(model, given), ce)
    assert torch.allclose(Distillation(temperature=3, alpha=0.7)(model, given), 0.7 * kd + 0.3 * ce)
    guessed = nn.functional.cross_entropy(logits, teacher.argmax(1), label_smoothing=0.1)
    assert torch.allclose(TeacherLabel(label_smoothing=0.1)(model, given), guessed)


def test_without_labels_only_alpha_one_works() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    bare = batch(labelled=False, teacher=torch.randn(6, 4))
    assert Distillation(alpha=1.0)(model, bare).isfinite()
    with pytest.raises(InputError, match="needs labels"):
        Distillation(alpha=0.9)(model, bare)


def test_an_online_teacher_is_asked_about_the_views_themselves() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    teacher = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4))
    views = batch()
    online = OnlineTeacher(teacher, Distillation(), Runtime())
    with torch.no_grad():
        cached = batch(teacher=teacher.eval()(views.images))
    assert torch.allclose(online(model, views), Distillation()(model, cached))
    assert not any(p.requires_grad for p in teacher.parameters())
