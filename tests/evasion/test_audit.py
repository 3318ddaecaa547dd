"""Planted truths: what the audit says of classifiers that are known to be masked, robust, both, or neither."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillproof.attacks.losses import margin
from stillproof.attacks.threats import Linf
from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import TEACHER, CrossEntropy, Objective
from stillproof.core.images import as_float
from stillproof.core.runtime import Runtime
from stillproof.core.sources import DataSource
from stillproof.core.training import Recipe, fit
from stillproof.evasion.allowance import Budget
from stillproof.evasion.auditing import Audited, Thoroughness, audit
from stillproof.evasion.hardening.adversarial_training import AdversarialTraining
from stillproof.evasion.hardening.defensive_distillation import AtTemperature, SoftLabels
from stillproof.evasion.ladder import Effort
from stillproof.evasion.verdict import Verdict, decide, findings

THREAT = Linf(0.1)
QUICK = Thoroughness(
    images=120,
    close=48,
    problems=16,
    points=100,
    effort=Effort(apgd=30, targets=3, targeted=15, nearest=40, draws=40, probing=80, square=600, hop=1000, patient=30),
)


def trained(
    digits: DataSource, objective: Objective, runtime: Runtime, *, seed: int = 0, **columns: Tensor
) -> nn.Module:
    model = Model("zoo:cnn?width=8").fresh(digits.train.shape, 10, seed)
    recipe = Recipe(epochs=12, batch_size=50, learning_rate=0.1)
    fit(model, objective, digits.train, recipe=recipe, runtime=runtime, seed=seed, columns=columns)
    return model


@pytest.fixture(scope="module")
def models(digits: DataSource, runtime: Runtime) -> Mapping[str, nn.Module]:
    """A plain classifier, its twin from another seed, a PGD-trained one, a defensively distilled one."""
    signs = Signs()
    fit(signs, CrossEntropy(), digits.train, recipe=Recipe(epochs=20, batch_size=50), runtime=runtime, seed=0)
    teacher = trained(digits, AtTemperature(temperature=50), runtime)
    answers = predict(teacher, digits.train, runtime)
    return {
        "signs": signs,
        "plain": trained(digits, CrossEntropy(), runtime),
        "twin": trained(digits, CrossEntropy(), runtime, seed=1),
        "hardened": trained(digits, AdversarialTraining(threat="linf:0.1"), runtime),
        "distilled": trained(digits, SoftLabels(temperature=50), runtime, **{TEACHER: answers}),
    }


class Signs(nn.Module):
    """A hidden layer of signs: trained through tanh, deployed without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(64, 96), nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.hidden(images.flatten(1) - 0.5)
        logits: Tensor = self.head(hidden.tanh() if self.training else hidden.sign())
        return logits


class Around(nn.Module):
    """Something done to the images or the logits of a classifier."""

    def __init__(self, classifier: nn.Module, way: str) -> None:
        super().__init__()
        self.classifier, self.way = classifier, way

    def forward(self, images: Tensor) -> Tensor:
        if self.way == "bf16":
            for parameter in self.parameters():
                parameter.data = parameter.data.bfloat16().float()
        if self.way == "8 levels":
            images = (images * 7).round() / 7
        if self.way == "no_grad":
            with torch.no_grad():
                images = images * 1.0
        if self.way == "randomised":
            images = (images + 0.05 * torch.randn_like(images)).clamp(0, 1)
        logits: Tensor = self.classifier(images)
        if self.way.startswith("× "):
            return logits * float(self.way[2:])
        if self.way == "sigmoids":
            return logits.sigmoid()
        if self.way == "functional head":
            return (logits * 30 * torch.ones(1)).softmax(1).clamp_min(torch.finfo(torch.float32).tiny).log()
        if self.way == "inference_mode":
            with torch.inference_mode():
                found: Tensor = self.classifier(images)
            return found.clone()
        if self.way == "data":
            return self.classifier(images.data)  # type: ignore[no-any-return]
        if self.way == "saturated probabilities":
            return (logits * 100).softmax(1).clamp_min(torch.finfo(torch.float32).tiny).log()
        return logits + (1000 if self.way == "+ 1000" else 0)


def audited(
    model: nn.Module, digits: DataSource, runtime: Runtime, *, outputs: str = "logits", **given: object
) -> tuple[Verdict, Audited]:
    images, labels = as_float(digits.test.images), digits.test.known_labels()
    given = {"thoroughness": QUICK, **given}
    found = audit(model.eval(), images, labels, THREAT, outputs=outputs, runtime=runtime, **given)  # type: ignore[arg-type]
    return decide(found.evidence), found


TRUTHS = {
    "plain": ("plain", "", "no"),
    "plain, + 1000": ("plain", "+ 1000", "no"),
    "plain, bf16 weights": ("plain", "bf16", "no"),
    "plain, over-confident": ("plain", "× 4", "no"),
    "signs": ("signs", "", "yes"),
    "plain, × 100": ("plain", "× 100", "yes"),
    "plain, saturated probabilities": ("plain", "saturated probabilities", "yes"),
    "plain, 8 levels": ("plain", "8 levels", "yes"),
    "plain, no_grad": ("plain", "no_grad", "yes"),
    "plain, sigmoids": ("plain", "sigmoids", "yes"),
    "plain, functional head": ("plain", "functional head", "yes"),
    "plain, data": ("plain", "data", "yes"),
    "plain, inference_mode": ("plain", "inference_mode", "yes"),
    "distilled": ("distilled", "", "yes"),
    "hardened": ("hardened", "", "no"),
    "hardened, × 100": ("hardened", "× 100", "yes"),
}


@pytest.fixture(scope="module")
def honest(models: Mapping[str, nn.Module], digits: DataSource, runtime: Runtime) -> Callable[[str], Verdict]:
    """The verdict on a classifier as it is, looked up once."""

    @cache
    def verdict_on(name: str) -> Verdict:
        return audited(models[name], digits, runtime, twins=[models["twin"]])[0]

    return verdict_on


def test_what_misleads_is_looked_for_on_the_watched_images_and_what_stands_on_all(
    models: Mapping[str, nn.Module], digits: DataSource, runtime: Runtime
) -> None:
    few = replace(QUICK, effort=replace(QUICK.effort, watched=40))
    verdict, found = audited(Around(models["plain"], "× 100"), digits, runtime, thoroughness=few)
    trail, seen = {step["name"]: step for step in found.evidence.trail}, found.evidence
    assert verdict.masked == "yes"
    assert int((seen.watched & seen.right).sum()) == 40
    assert verdict.gap.n == int(seen.watched.sum())
    assert trail["PGD-20, cross-entropy"]["asked"] > 80  # what is claimed is claimed of all
    assert all(0 < trail[name]["asked"] <= 40 for name in ("APGD-30, cross-entropy", "random draws"))
    anew = trail["APGD-30, cross-entropy, two more starts"]
    assert (anew["ran"], "no gradient" in anew["why"]) == (False, True)  # where it begins is no matter
    assert verdict.robust.n == len(seen.labels) == 120
    assert verdict.robust.value == pytest.approx(audited(models["plain"], digits, runtime)[0].robust.value, abs=0.02)

    verdict, found = audited(models["signs"], digits, runtime, thoroughness=replace(few, close=8))
    again = next(step for step in found.evidence.trail if step["name"] == "Square, 80 queries, again")
    assert again["ran"]
    assert 0 < again["asked"] <= int((found.evidence.right & ~found.evidence.watched).sum())


def test_where_the_first_images_are_wrong_later_ones_are_watched(
    models: Mapping[str, nn.Module], digits: DataSource, runtime: Runtime
) -> None:
    images, labels = as_float(digits.test.images)[:60], digits.test.known_labels()[:60].clone()
    labels[:30] = (labels[:30] + 1) % 10
    few = replace(QUICK, effort=replace(QUICK.effort, watched=20))
    found = audit(Around(models["plain"], "× 100").eval(), images, labels, THREAT, thoroughness=few, runtime=runtime)
    assert int((found.evidence.watched & found.evidence.right).sum()) == 20
    assert decide(found.evidence).masked == "yes"


def test_a_budget_that_ends_pgd_after_the_watched_images_claims_nothing(
    models: Mapping[str, nn.Module], digits: DataSource, runtime: Runtime
) -> None:
    few = replace(QUICK, images=200, effort=replace(QUICK.effort, watched=20))
    verdict, found = audited(models["plain"], digits, runtime, thoroughness=few, budget=Budget(passes=4000))
    pgd = next(step for step in found.evidence.trail if step["name"].startswith("PGD"))
    assert 20 < pgd["asked"] < int(found.evidence.right.sum())
    assert verdict.claimed.value is None
    assert verdict.masked == "inconclusive"
    (claim,) = [one for one in findings("m", verdict, found.evidence, 0.3) if one.rule == "SP-E3"]
    assert claim.status == "inconclusive"


@pytest.mark.parametrize(("name", "masked"), [("plain", {"no"}), ("distilled", {"yes", "inconclusive"})])
def test_a_ball_too_small_to_tell_clears_nobody(
    name: str, masked: set[str], models: Mapping[str, nn.Module], digits: DataSource, runtime: Runtime
) -> None:
    images, labels = as_float(digits.test.images), digits.test.known_labels()
    found = audit(models[name].eval(), images, labels, Linf(0.01), thoroughness=QUICK, runtime=runtime)
    verdict = decide(found.evidence)
    assert verdict.gap.value is not None
    assert verdict.gap.value < 0.05
    assert verdict.masked in masked


@pytest.mark.parametrize("name", TRUTHS)
def test_masked_is_called_masked_and_honest_is_not(
    name: str,
    models: Mapping[str, nn.Module],
    digits: DataSource,
    runtime: Runtime,
    honest: Callable[[str], Verdict],
) -> None:
    base, way, truth = TRUTHS[name]
    outputs = "probabilities" if "probabilities" in way else "logits"
    twins = [models["twin"]]
    verdict, found = audited(Around(deepcopy(models[base]), way), digits, runtime, outputs=outputs, twins=twins)
    assert verdict.masked == truth, verdict.why
    # hiding gradients hides nothing from the worst case, which is that of the classifier within
    slack = {"8 levels": 0.1}.get(way, 0.03)  # rounding the image makes it another classifier
    if way:
        assert abs((verdict.robust.value or 0) - (honest(base).robust.value or 0)) <= slack
    if truth == "yes":
        assert verdict.causes
        assert (verdict.gap.value or 0) >= 0.05
        statuses = {finding.rule: finding.status for finding in findings("it", verdict, found.evidence, 0.0)}
        assert statuses["SP-E1"] != "pass"
        assert statuses["SP-E2"] == "fail"


def test_a_randomised_classifier_is_averaged(
    models: Mapping[str, nn.Module], digits: DataSource, runtime: Runtime
) -> None:
    few = replace(QUICK, images=40, close=16, problems=3)
    verdict, found = audited(Around(models["plain"], "randomised"), digits, runtime, thoroughness=few)
    assert any(sign.name == "two passes differ" and sign.is_present for sign in verdict.signs)
    assert found.evidence.trail[1]["backwards"] >= 10 * found.evidence.trail[1]["asked"]
    assert verdict.masked != "yes"


def test_the_budget_ends_it_and_then_nothing_is_called_robust(
    models: Mapping[str, nn.Module], digits: DataSource, runtime: Runtime
) -> None:
    verdict, found = audited(models["hardened"], digits, runtime, budget=Budget(passes=500))
    assert found.evidence.ended_by_budget
    assert verdict.masked == "inconclusive"
    assert all(finding.status != "pass" for finding in findings("it", verdict, found.evidence, 0.0)[:2])
    assert "budget" in found.evidence.trail[-1]["why"]


@pytest.mark.parametrize("passes", [1_000, 6_000, 20_000, 45_000])
def test_a_budget_bounds_all_of_an_audit(
    models: Mapping[str, nn.Module], digits: DataSource, runtime: Runtime, passes: int
) -> None:
    few = replace(QUICK, images=100)
    verdict, found = audited(models["hardened"], digits, runtime, thoroughness=few, budget=Budget(passes=passes))
    one_image = 4_000  # of the close look, which takes the most
    assert found.cost.forwards + found.cost.backwards < passes + one_image
    assert found.evidence.ended_by_budget
    assert verdict.masked == "inconclusive"


def test_a_budget_that_is_not_reached_changes_nothing(
    models: Mapping[str, nn.Module], digits: DataSource, runtime: Runtime
) -> None:
    few = replace(QUICK, images=40)
    free, unbounded = audited(models["hardened"], digits, runtime, thoroughness=few)
    held, bounded = audited(models["hardened"], digits, runtime, thoroughness=few, budget=Budget(passes=10**9))
    assert held.masked == free.masked
    assert np.array_equal(bounded.evidence.standing, unbounded.evidence.standing)
    assert np.array_equal(bounded.evidence.close["sweep.1"], unbounded.evidence.close["sweep.1"])


def test_a_black_box_is_never_called_robust(
    models: Mapping[str, nn.Module], digits: DataSource, runtime: Runtime
) -> None:
    def answers(images: Tensor) -> Tensor:
        return models["plain"](images).detach().argmax(1)

    images, labels = as_float(digits.test.images), digits.test.known_labels()
    few = replace(QUICK, images=30)
    found = audit(
        answers, images, labels, THREAT, classes=10, thoroughness=few, twins=[models["plain"]], runtime=runtime
    )
    verdict = decide(found.evidence)
    assert verdict.masked == "inconclusive"
    assert (verdict.robust.value or 0) < 0.3  # transfer from its own twin, and labels, are enough
    assert not any(step["backwards"] for step in found.evidence.trail)


def test_ones_own_loss_and_module_are_rungs(
    models: Mapping[str, nn.Module], digits: DataSource, runtime: Runtime
) -> None:
    hidden = Around(models["plain"], "8 levels")
    few = replace(QUICK, images=30)
    _, by_loss = audited(hidden, digits, runtime, thoroughness=few, adaptive=margin)
    _, by_module = audited(hidden, digits, runtime, thoroughness=few, adaptive=models["plain"])
    for found, name in ((by_loss, "adaptive loss"), (by_module, "adaptive, through your module")):
        (step,) = [step for step in found.evidence.trail if step["name"] == name]
        assert (step["ran"], step["asked"] > 0, step["backwards"] > 0) == (True, True, True)
