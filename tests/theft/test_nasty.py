"""The Nasty Teacher's loss: its direction, its bound, its arithmetic; and what is said of one that fails."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stillproof.core.distillation import TEACHER, Batch, kd_divergence
from stillproof.core.noise import Noise
from stillproof.core.plan import Execution
from stillproof.core.plugins import build
from stillproof.core.runtime import Runtime
from stillproof.core.spec import Spec
from stillproof.core.store import Store
from stillproof.errors import InputError
from stillproof.findings import Finding, Result
from stillproof.theft.hardening.nasty import NastyTeacher
from stillproof.verbs import Verb, verb_named

SEEDS = st.integers(0, 10_000)


class Given(nn.Module):
    """Answers with logits that were given to it."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, _images: Tensor) -> Tensor:
        return self.logits


def batch(normal: Tensor, labels: Tensor) -> Batch:
    index = torch.arange(len(labels))
    return Batch(torch.zeros(len(labels), 1, 8, 8), labels, index, {TEACHER: normal}, Noise(0, index, 0))


def some(seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a teacher and of the normal one, (6, 5), and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits, normal = (scale * torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits, normal, torch.randint(0, 5, (6,), generator=generator)


def by_numpy(logits: Tensor, normal: Tensor, labels: Tensor, weight: float, temperature: float) -> float:
    T = temperature

    def softmax(values: Any) -> Any:
        powers = np.exp(values - values.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    z, q = logits.numpy(), softmax(normal.numpy() / T)
    p = softmax(z / T)
    honest = -np.log(softmax(z)[np.arange(len(z)), labels.numpy()]).mean()
    return float(honest - weight * T * T * (p * np.log(p / q)).sum(axis=1).mean())


@given(SEEDS, st.floats(0, 1), st.floats(0.5, 20))
def test_the_loss_is_its_equation_and_the_kl_runs_from_the_nasty_to_the_normal(seed: int, w: float, t: float) -> None:
    logits, normal, labels = some(seed)
    loss = NastyTeacher(weight=w, temperature=t)(Given(logits), batch(normal, labels))
    assert float(loss.detach()) == pytest.approx(by_numpy(logits, normal, labels, w, t), abs=1e-9)


def test_the_two_directions_of_the_kl_differ_so_the_test_above_can_tell() -> None:
    logits, normal, labels = some(1)
    turned = F.cross_entropy(logits, labels) - 0.5 * kd_divergence(logits, normal, 4.0)
    assert abs(by_numpy(logits, normal, labels, 0.5, 4) - float(turned)) > 0.1


def reference_loss(logits: Tensor, normal: Tensor, labels: Tensor, weight: float, temperature: float) -> Tensor:
    """As the reference code computes it, less its constant 100: probabilities are the target of KLDivLoss."""
    T = temperature
    apart = nn.KLDivLoss(reduction="batchmean")(F.log_softmax(normal / T, dim=1), F.softmax(logits / T, dim=1))
    return F.cross_entropy(logits, labels) - weight * apart * (T * T)


@given(SEEDS)
def test_loss_and_gradient_are_those_of_the_reference_code(seed: int) -> None:
    logits, normal, labels = some(seed)
    ours, theirs = Given(logits.clone()), Given(logits.clone())
    loss = NastyTeacher()(ours, batch(normal, labels))
    expected = reference_loss(theirs.logits, normal, labels, 0.04, 4.0)
    assert torch.allclose(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.allclose(ours.logits.grad, theirs.logits.grad)  # type: ignore[arg-type]


def test_where_a_probability_underflows_the_reference_s_gradient_is_nan_and_this_one_is_not() -> None:
    logits = torch.tensor([[2000.0, 0.0, -2000.0]])
    normal, labels = torch.zeros(1, 3), torch.tensor([0])
    ours, theirs = Given(logits.clone()), Given(logits.clone())
    reference_loss(theirs.logits, normal, labels, 0.04, 4.0).backward()
    NastyTeacher()(ours, batch(normal, labels)).backward()
    assert theirs.logits.grad is not None
    assert ours.logits.grad is not None
    assert theirs.logits.grad.isnan().any()
    assert ours.logits.grad.isfinite().all()


def test_begun_at_the_normal_teacher_the_kl_has_no_gradient() -> None:
    _, normal, labels = some(3)
    at = Given(normal.clone())
    NastyTeacher(weight=100.0)(at, batch(normal, labels)).backward()
    plain = Given(normal.clone())
    F.cross_entropy(plain.logits, labels).backward()
    assert torch.allclose(at.logits.grad, plain.logits.grad)  # type: ignore[arg-type]


@given(SEEDS, st.floats(0, 1000), st.floats(0.1, 1e6))
def test_the_loss_is_bounded_from_below_by_the_normal_teacher(seed: int, weight: float, scale: float) -> None:
    logits, normal, labels = some(seed)
    T = 4.0
    least_likely = -F.log_softmax(normal / T, dim=1).amin(dim=1).mean()
    loss = NastyTeacher(weight=weight, temperature=T)(Given(scale * logits), batch(normal, labels))
    assert float(loss.detach()) >= -weight * T * T * float(least_likely) - 1e-6


def test_options_reach_it_and_its_title_says_what_was_changed() -> None:
    method = build("hardening", Spec.parse("nasty?weight=0.005&temperature=20"))
    assert method == NastyTeacher(weight=0.005, temperature=20)
    assert method.title == "nasty (ω = 0.005, T = 20)"
    assert NastyTeacher().title == "nasty"
    for bad in ("nasty?weight=-1", "nasty?temperature=0", "nasty?weight=nan", "nasty?omega=1"):
        with pytest.raises(InputError):
            build("hardening", Spec.parse(bad))


# planted cases: what collapses, diverges or does not take is said to


class Silent:
    def started(self, *_: object) -> None: ...
    def advanced(self, *_: object) -> None: ...
    def finished(self, *_: object) -> None: ...


def run(name: str, store: Path, **given: Any) -> tuple[Result, set[str]]:
    """The result, and the names of the classifiers that are left."""
    verb: Verb = verb_named(name)
    settings = verb.settings(data="digits", **given).resolved()
    runtime = Runtime.choose(threads=1)
    values = Execution(verb.plan(settings, runtime), Store(str(store)), Silent()).run()
    return verb.conclude(settings, values), set(verb.models(settings, values))


@cache
def hardened(store: Path, method: str) -> tuple[Result, set[str]]:
    """One hardening of the same small model; the victim and its retrainings are shared by all."""
    return run("harden", store, model="zoo:cnn?width=16", epochs=12, method=method)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nasty")


def finding(result: Result, rule: str, subject: str) -> Finding:
    (found,) = [f for f in result.findings if (f.rule, f.subject) == (rule, subject)]
    return found


def beyond(result: Result, subject: str) -> float:
    value = finding(result, "SP-T4", subject).measurements["KL beyond that of a retraining"].value
    assert value is not None
    return value


def test_a_nasty_teacher_of_digits_takes_and_keeps_its_accuracy(store: Path) -> None:
    result, left = hardened(store, "nasty")
    assert finding(result, "SP-T4", "nasty").status == "pass"
    assert finding(result, "SP-T3", "nasty").status != "fail"
    assert left == {"before", "hardened"}


def test_an_omega_of_nearly_nothing_is_not_said_to_take(store: Path) -> None:
    nothing = "nasty?weight=0.000001"
    result, _ = hardened(store, nothing)
    assert finding(result, "SP-T4", nothing).status != "pass"
    assert beyond(result, nothing) < 0.3 * beyond(hardened(store, "nasty")[0], "nasty")


def test_an_omega_that_destroys_the_accuracy_broke_the_classifier(store: Path) -> None:
    result, left = hardened(store, "nasty?weight=2")
    took = finding(result, "SP-T4", "nasty?weight=2")
    assert took.status == "fail"
    assert "broke the classifier" in took.title
    assert "Lower" in took.advice
    assert finding(result, "SP-T3", "nasty?weight=2").status == "fail"
    assert left == {"before", "hardened"}


DIVERGING = "nasty?weight=1e30"


def test_training_that_diverges_is_a_finding_and_leaves_no_classifier(store: Path) -> None:
    result, left = hardened(store, DIVERGING)
    took = finding(result, "SP-T4", DIVERGING)
    assert took.status == "fail"
    assert "diverged" in took.title
    assert any("The loss became" in line and "training began with" in line for line in took.evidence)
    assert "diverged" in result.summary
    assert left == {"before"}
    assert Result.model_validate_json(result.model_dump_json()) == result


def test_a_theft_goes_on_beside_a_defence_that_diverged(store: Path) -> None:
    small: dict[str, Any] = {"victim": "zoo:cnn?width=6", "thief_model": "zoo:cnn?width=4", "queries": "4/class"}
    result, left = run(
        "steal",
        store,
        defence=("nasty", DIVERGING),
        thief=("kd?temperature=4&alpha=0.9",),
        seeds=2,
        epochs=2,
        thief_epochs=1,
        limit=400,
        **small,
    )
    took = finding(result, "SP-T4", DIVERGING)
    assert (took.status, "diverged" in took.title) == ("fail", True)
    assert [line.split(":")[0] for line in took.evidence if "became" in line] == ["Seed 0", "Seed 1"]
    kept = finding(result, "SP-T2", DIVERGING)
    assert kept.status == "inconclusive"
    assert "did not take" in kept.evidence[0]
    assert any("untrained network" in line for line in finding(result, "SP-T1", DIVERGING).evidence)
    assert "diverged" not in finding(result, "SP-T4", "nasty").title
    assert left == {"victim-seed0", "victim-seed1", "nasty-seed0", "nasty-seed1"}
