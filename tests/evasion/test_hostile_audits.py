"""Audits of what is odd, broken or in the way: a verdict or one clear error, never a crash or a pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillproof.attacks.straight_through import way_through
from stillproof.attacks.threats import L2, Linf
from stillproof.core.runtime import Runtime
from stillproof.errors import BudgetExceeded, InputError
from stillproof.evasion.account import curves, tables
from stillproof.evasion.allowance import Budget
from stillproof.evasion.auditing import Thoroughness, _count, audit
from stillproof.evasion.examination import First
from stillproof.evasion.ladder import Effort, begin
from stillproof.evasion.stages import Asked
from stillproof.evasion.verdict import decide, findings

FP32 = Runtime("cpu", "fp32", 1)
TINY = Thoroughness(
    images=24,
    close=12,
    problems=3,
    points=40,
    effort=Effort(
        pgd=5, apgd=8, targets=2, targeted=4, nearest=10, draws=10, probing=20, square=40, hop=300, patient=8
    ),
)


class Net(nn.Module):
    """A linear classifier of 8×8 images in a given number of classes, odd in one way."""

    def __init__(self, way: str = "", classes: int = 3, channels: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.norm = nn.BatchNorm1d(channels * 64)
        self.head = nn.Linear(channels * 64, classes)
        self.head.weight.data *= 5
        if way == "half":
            self.half()

    def __deepcopy__(self, memo: object) -> Net:
        if self.way == "not to be copied":
            raise TypeError("no copies")
        made = Net(self.way, self.head.out_features, self.head.in_features // 64)
        made.load_state_dict(self.state_dict())
        return made.train(self.training)

    def forward(self, images: Tensor) -> Tensor:
        if self.way == "fails on one" and len(images) == 1:
            raise ValueError("one image")
        if self.way == "NumPy":
            images = torch.from_numpy(np.round(images.detach().cpu().numpy() * 20) / 20)
        flat = images.flatten(1) - 0.5
        if self.way == "normed":
            flat = self.norm(flat)
        logits: Tensor = self.head(flat)
        return logits


def case(model: nn.Module, n: int = 24, channels: int = 1) -> tuple[Tensor, Tensor]:
    images = torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, model.eval()(images).argmax(1)


def everything_said(model: object, images: Tensor, labels: Tensor, threat: Linf | L2, **given: object) -> str:
    """An audit from end to end, down to what a report shows."""
    how = replace(TINY, images=len(images))
    found = audit(model, images, labels, threat, thoroughness=how, runtime=FP32, **given)  # type: ignore[arg-type]
    verdict = decide(found.evidence)
    assert findings("it", verdict, found.evidence, 0.3)
    assert tables(verdict, found.evidence)
    assert curves(found.evidence, threat.epsilon)
    return verdict.masked


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.8)])
@pytest.mark.parametrize(("classes", "channels"), [(2, 1), (3, 3)])
def test_any_number_of_classes_and_channels(threat: Linf | L2, classes: int, channels: int) -> None:
    model = Net("", classes, channels)
    images, labels = case(model, channels=channels)
    assert everything_said(model, images, labels, threat) in ("no", "inconclusive")


@pytest.mark.parametrize("way", ["fails on one", "not to be copied", "NumPy", "normed"])
def test_odd_modules_are_audited(way: str) -> None:
    model = Net(way)
    images, labels = case(model, n=60)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masked = everything_said(model, images, labels, Linf(0.1))
    assert masked == {"NumPy": "yes"}.get(way, masked)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_run_is_refused_with_the_reason() -> None:
    images = torch.rand(4, 1, 8, 8)
    with pytest.raises(InputError, match="fails on images"):
        audit(Net("half"), images, torch.zeros(4, dtype=torch.int64), Linf(0.1), runtime=FP32)
    with pytest.raises(InputError, match="no image to audit"):
        audit(Net(), images[:0], torch.zeros(0, dtype=torch.int64), Linf(0.1), runtime=FP32)


class Noisy(Net):
    """Its images are hidden in noise, which a seed may make the same in every pass."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.seed = seed

    def __deepcopy__(self, memo: object) -> Noisy:
        made = Noisy(self.seed)
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, images: Tensor) -> Tensor:
        drawn = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        return super().forward(images + 0.1 * torch.randn(images.shape, generator=drawn))


def test_a_lucky_draw_is_nothing_that_an_attack_found() -> None:
    """In a ball that holds next to nothing, nothing is found, however often a randomised classifier is asked."""
    model = Noisy(None)
    images, labels = case(Net(), n=60)
    found = audit(model.eval(), images, labels, Linf(1e-5), thoroughness=replace(TINY, images=60), runtime=FP32)
    lost = int(found.evidence.right.sum() - found.evidence.standing.sum())
    assert int(found.evidence.right.sum()) > 40
    assert lost <= 6  # those whose first ten passes were right by luck: these images lie anywhere


class InPlace(Noisy):
    """It changes the images that it is shown."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.sub_(0.5).add_(0.5))


def test_a_randomised_module_that_changes_its_input_is_judged_by_the_image() -> None:
    images, labels = case(Net(), n=60)
    before = images.clone()
    found = audit(InPlace(None).eval(), images, labels, Linf(1e-5), thoroughness=replace(TINY, images=60), runtime=FP32)
    assert int(found.evidence.right.sum() - found.evidence.standing.sum()) <= 6
    assert torch.allclose(images, before, atol=1e-6)


def test_a_randomised_module_without_a_softmax_has_no_logits_within() -> None:
    class Plain(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([images.flatten(1)[:, :3].sum(1) * n for n in range(3)], 1) + torch.randn(len(images), 3)

    assert way_through(Plain().eval(), torch.rand(4, 1, 8, 8)) is None


def test_data_that_is_changed_in_place_has_a_way_through() -> None:
    class Clamped(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            images.data.clamp_(0, 1)
            return (images.flatten(1)[:, :3] * 4).round() / 4

    assert way_through(Clamped().eval(), torch.rand(4, 1, 8, 8)) is not None


def test_an_answer_that_depends_on_the_batch_is_refused() -> None:
    images, labels = case(Net())
    with pytest.raises(InputError, match="depends on what else is in the batch"):
        audit(Noisy(0).eval(), images, labels, Linf(0.1), thoroughness=TINY, runtime=FP32)


class _KnowsItsClasses(torch.autograd.Function):
    @staticmethod
    def forward(_context: object, logits: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(_context: object, gradient: Tensor) -> Tensor:
        return gradient - torch.zeros(1, 3)


class Knowing(Net):
    """Its backward pass is written for three classes."""

    def __deepcopy__(self, memo: object) -> Knowing:
        made = Knowing()
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = _KnowsItsClasses.apply(super().forward(images))  # type: ignore[no-untyped-call]
        return found


def test_a_backward_pass_that_cannot_be_tested_ends_no_audit() -> None:
    images, labels = case(Knowing())
    assert everything_said(Knowing().eval(), images, labels, Linf(0.1)) in ("no", "inconclusive")


def test_what_a_close_look_finds_counts_and_is_no_sign_where_it_climbed_what_is_served() -> None:
    images, labels = case(Net(), n=6)
    first = First(logits=Net().eval()(images).detach(), ce=torch.ones(6), margin=torch.ones(6), repeats=torch.zeros(6))
    ladder = begin(first, labels, has_gradient=True, watched=6)
    nothing = torch.zeros(4, dtype=torch.bool)
    found = dict.fromkeys(("sweep.1", "sweep.10", "apgd", "apgd.double"), nothing) | {"nearest": torch.full((4,), 9.0)}
    found["apgd.double"] = torch.tensor([True, False, False, False])
    found["nearest"] = torch.tensor([0.05, 0.09, 0.2, 9.0])
    _count(ladder, torch.arange(4), found, Linf(0.1))
    assert ladder.standing.tolist() == [False, False, True, True, True, True]
    assert [(step.kind, step.fell) for step in ladder.steps] == [("deployed again", 1), ("close look", 1)]
    assert ladder.distance[:4].tolist() == pytest.approx([0.05, 0.09, 0.2, 9.0])


def test_where_nothing_is_right_nothing_is_said() -> None:
    model = Net()
    images, labels = case(model)
    assert everything_said(model, images, (labels + 1) % 3, Linf(0.1)) == "inconclusive"


@pytest.mark.parametrize("passes", [1, 60, 200, 400])
def test_a_budget_that_ends_early_calls_nothing_masked_or_robust(passes: int) -> None:
    model = Net()
    images, labels = case(model)
    found = audit(model, images, labels, Linf(0.02), thoroughness=TINY, runtime=FP32, budget=Budget(passes=passes))
    verdict = decide(found.evidence)
    assert verdict.masked == "inconclusive"
    assert {finding.status for finding in findings("it", verdict, found.evidence, 0.0)} <= {"inconclusive", "pass"}
    assert findings("it", verdict, found.evidence, 0.0)[0].status != "pass"


def test_a_box_that_answers_with_labels_of_one_class() -> None:
    images, labels = torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64)

    def always_first(asked: Tensor) -> Tensor:
        return torch.zeros(len(asked), dtype=torch.int64)

    assert everything_said(always_first, images, labels, Linf(0.1), classes=3) == "inconclusive"


def test_a_box_may_refuse_to_name_a_class() -> None:
    images, labels = torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64)

    def shy(asked: Tensor) -> Tensor:
        return torch.where(asked.mean((1, 2, 3)) > 0.5, -1, 0)

    assert everything_said(shy, images, labels, Linf(0.1), classes=3) == "inconclusive"


def test_the_budget_of_queries_holds_over_a_resumption(tmp_path: Path) -> None:
    model = Net()
    images, labels = case(model)
    box = Asked(lambda asked: model(asked).detach(), 1500)
    given = {"thoroughness": TINY, "runtime": FP32, "classes": 3, "checkpoint": tmp_path / "it.ckpt"}
    audit(box, images, labels, Linf(0.05), **given)  # type: ignore[arg-type]
    spent = box.queries
    assert 0 < spent <= 1500
    again = Asked(lambda asked: model(asked).detach(), 1500)
    found = audit(again, images, labels, Linf(0.05), **given)  # type: ignore[arg-type]
    assert again.queries == spent  # nothing was asked again, and what was is remembered
    assert len(found.evidence.trail) >= 4


def test_a_box_that_dies_in_the_middle_of_a_rung_is_not_asked_beyond_its_budget(tmp_path: Path) -> None:
    model = Net()
    images, labels = case(model)
    place, asked = tmp_path / "it.ckpt", 0

    class DiedError(Exception):
        pass

    def answers(some: Tensor) -> Tensor:
        nonlocal asked
        asked += len(some)
        if asked > 900 and place.exists() and not place.with_suffix(".died").exists():
            place.with_suffix(".died").touch()
            raise DiedError
        return model(some).detach()

    given = {"thoroughness": TINY, "runtime": FP32, "classes": 3, "checkpoint": place}
    with pytest.raises(DiedError):
        audit(Asked(answers, 1500), images, labels, Linf(0.02), **given)  # type: ignore[arg-type]
    found = audit(Asked(answers, 1500), images, labels, Linf(0.02), **given)  # type: ignore[arg-type]
    assert 900 < asked <= 1500
    evidence = found.evidence
    assert np.array_equal(evidence.standing, evidence.right & ~(evidence.outcomes == 1).any(axis=0))


def test_a_killed_audit_goes_on_to_the_same_evidence(tmp_path: Path) -> None:
    model = Net()
    images, labels = case(model)

    class KilledError(Exception):
        pass

    def after_three(done: int, _of: int, _note: str) -> None:
        if done == 3:
            raise KilledError

    given = {"thoroughness": TINY, "runtime": FP32}
    whole = audit(model, images, labels, Linf(0.05), **given)  # type: ignore[arg-type]
    place = tmp_path / "it.ckpt"
    with pytest.raises(KilledError):
        audit(model, images, labels, Linf(0.05), checkpoint=place, advance=after_three, **given)  # type: ignore[arg-type]
    resumed = audit(model, images, labels, Linf(0.05), checkpoint=place, **given)  # type: ignore[arg-type]
    for name in ("outcomes", "standing", "distance", "logits", "solved"):
        assert np.array_equal(getattr(whole.evidence, name), getattr(resumed.evidence, name)), name
    place.write_bytes(b"not a checkpoint")
    with pytest.raises(Exception, match="cannot be read"):
        audit(model, images, labels, Linf(0.05), checkpoint=place, **given)  # type: ignore[arg-type]


def test_a_spent_box_ends_the_ladder() -> None:
    images, labels = torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64)
    with pytest.raises(BudgetExceeded):
        audit(Asked(lambda asked: asked.flatten(1)[:, :3], 10), images, labels, Linf(0.1), classes=3, runtime=FP32)
    few = replace(TINY, images=20)
    box = Asked(lambda asked: torch.stack([1 - 0 * asked.mean((1, 2, 3)), 0 * asked.mean((1, 2, 3))], 1), 60)
    found = audit(box, images, labels, Linf(0.1), classes=2, thoroughness=few, runtime=FP32)
    assert box.queries <= 60
    assert decide(found.evidence).masked == "inconclusive"


class Broken(nn.Module):
    def forward(self, _images: Tensor) -> Tensor:
        raise RuntimeError("out of order")


def test_an_adaptive_attack_that_fails_is_named() -> None:
    model = Net()
    images, labels = case(model)

    def loss(*_: object) -> Tensor:
        raise RuntimeError("out of order")

    with pytest.raises(InputError, match="your adaptive attack fails"):
        audit(model, images, labels, Linf(0.001), thoroughness=TINY, runtime=FP32, adaptive=loss)
    with pytest.raises(InputError, match="fails on images"):
        audit(model, images, labels, Linf(0.001), thoroughness=TINY, runtime=FP32, adaptive=Broken())


class Misleading(torch.autograd.Function):
    """The identity, whose backward pass turns the sign of a third of the gradient."""

    @staticmethod
    def forward(_context: object, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(_context: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        turned = torch.rand(gradient.shape[1:], generator=torch.Generator().manual_seed(0)) < 0.35
        return torch.where(turned, -gradient, gradient)


@pytest.mark.parametrize("misleads", [False, True])
def test_a_backward_pass_that_misleads_is_seen(misleads: bool) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 768, generator=torch.Generator().manual_seed(0)))

        def forward(self, images: Tensor) -> Tensor:
            features = images.flatten(1)
            return (Misleading.apply(features) if misleads else features) @ self.weight.T

    images = torch.rand(80, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = Head().eval()
    labels = model(images).argmax(1)
    how = replace(TINY, images=80, close=40, problems=8)
    seen = audit(model, images, labels, Linf(0.004), thoroughness=how, runtime=FP32).evidence
    found = decide(seen)
    (sign,) = [sign for sign in found.signs if sign.name == "the gradient is not the slope"]
    assert sign.is_present is misleads
    assert not misleads or found.masked != "no"
