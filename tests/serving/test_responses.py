"""Every response serves probabilities, keeps what it promises, and is what its formula says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn

import stillproof
from stillproof.core.noise import Noise
from stillproof.core.plugins import table
from stillproof.core.spec import Spec
from stillproof.errors import InputError
from stillproof.serving.guard import guard
from stillproof.serving.responses import Response
from stillproof.serving.responses.adaptive_misinformation import Misinformation
from stillproof.serving.responses.joined import response_of
from stillproof.serving.responses.modelguard_w import MARGIN, SMALLEST, least_informative

SPECS = [
    *table("response"),
    "top?k=1",
    "round?decimals=0",
    "round?decimals=1",
    "mad?argmax=false",
    "mad?epsilon=0.1",
    "modelguard-w?epsilon=0.1",
    "modelguard-s?epsilon=0.2",
    "reverse-sigmoid?beta=2&gamma=0.5",
    "adaptive-misinformation?tau=1.1",
    "top?k=2+round?decimals=1",
    "modelguard-w+top?k=2",
    "modelguard-s+mad",
]


def made(text: str) -> Response:
    return response_of(Spec.parse_joined(text))


def images_for(n: int) -> Tensor:
    return Noise(3, torch.arange(n), 0).uniform((3, 4, 4))


class Seen(nn.Module):
    """Logits of a fixed linear map."""

    def __init__(self, classes: int, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.Linear(48, classes)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.linear(images.flatten(1))
        return logits


class Given(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[: len(images)]


def helpers_of(response: Response, classes: int) -> list[nn.Module]:
    parts = getattr(response, "parts", (response,))
    return [Seen(classes, seed=9) for part in parts if part.needs_helper]


def served(text: str, logits: Tensor) -> Tensor:
    """log-probabilities of a fresh guard."""
    response = made(text)
    guarded = guard(Given(logits), response, helpers_of(response, logits.shape[1]))
    return guarded(images_for(len(logits))).detach()


def l1(logits: Tensor, answers: Tensor) -> Tensor:
    return (answers.double().exp() - logits.double().softmax(1)).abs().sum(1)


def hard(classes: int) -> Tensor:
    """Logits that break what is careless: huge, tied, near-uniform, opposite, one unit apart."""
    rows = [
        torch.zeros(classes),
        torch.linspace(-1e4, 1e4, classes),
        torch.linspace(1e4, -1e4, classes),
        torch.cat([torch.full((classes - 1,), -1e4), torch.tensor([1e4])]),
        torch.cat([torch.full((classes - 1,), 1e4), torch.tensor([-1e4])]),
        torch.cat([torch.zeros(classes - 1), torch.tensor([1e-9])]),
        torch.linspace(0, 1e-3, classes),
        1e4 + torch.linspace(0, 0.01, classes),
        Noise(1, torch.tensor([5]), 0).normal((classes,))[0],
        8 * Noise(1, torch.tensor([6]), 0).normal((classes,))[0],
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("text", SPECS)
def test_extreme_logits_are_served_as_probabilities(text: str, classes: int) -> None:
    logits = hard(classes)
    answers = served(text, logits)
    assert not answers.isnan().any()
    assert not answers.isposinf().any()
    assert torch.allclose(answers.exp().sum(1), torch.ones(len(logits)), atol=1e-4)
    if made(text).keeps_argmax:
        assert torch.equal(answers.argmax(1), logits.argmax(1))


LOGIT = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@pytest.mark.parametrize("text", [text for text in SPECS if made(text).keeps_argmax])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_who_promises_the_argmax_keeps_it(text: str, data: st.DataObject) -> None:
    classes = data.draw(st.integers(2, 6))
    spread = data.draw(st.sampled_from([1.0, 1e-3, 1e-6]))
    row = st.lists(LOGIT, min_size=classes, max_size=classes)
    logits = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3))) * spread
    answers = served(text, logits)
    assert torch.equal(answers.argmax(1), logits.argmax(1))
    assert torch.allclose(answers.exp().sum(1), torch.ones(len(logits)), atol=1e-4)


def test_who_promises_nothing_can_lose_it() -> None:
    """The promises are not idle: each response that makes none has an answer that breaks it."""
    logits = torch.tensor([[0.30, 0.31, 0.39], [0.34, 0.32, 0.33 + 0.02]]).log()
    for text in ("round?decimals=1", "reverse-sigmoid?beta=2&gamma=0.5", "mad?argmax=false"):
        assert not made(text).keeps_argmax
        assert not torch.equal(served(text, logits).argmax(1), logits.argmax(1)), text


@pytest.mark.parametrize("text", [text for text in SPECS if not made(text).remembers])
def test_an_answer_does_not_depend_on_its_batch(text: str) -> None:
    images = images_for(33)
    model, response = Seen(10, scale=3), made(text)
    guarded = guard(model, response, helpers_of(response, 10)).eval()
    logits = model(images).detach()
    whole = response(logits, images, guarded.state)
    for rows in (slice(0, 1), slice(7, 8), slice(5, 21)):
        assert torch.allclose(response(logits[rows], images[rows], guarded.state), whole[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("text", ["mad", "mad?argmax=false", "modelguard-w", "modelguard-s"])
def test_the_l1_budget_is_respected_and_used(text: str, epsilon: float) -> None:
    logits = torch.cat([hard(10), 3 * Noise(2, torch.arange(40), 0).normal((10,))])
    spec = Spec.parse(text).with_option("epsilon", str(epsilon))
    distance = l1(logits, served(str(spec), logits))
    assert float(distance.max()) <= epsilon + 1e-4
    if text != "modelguard-s" and epsilon <= 0.5:
        assert float(distance.max()) >= epsilon - 1e-4


@pytest.mark.parametrize(
    "text",
    [
        "reverse-sigmoid?beta=0",
        "round?decimals=8",
        "mad?epsilon=0",
        "mad?epsilon=0&argmax=false",
        "modelguard-w?epsilon=0",
        "modelguard-s?epsilon=0",
        "adaptive-misinformation?tau=0",
        "power?exponent=1",
        "top?k=10",
        "stingy?share=1",
    ],
)
def test_at_its_weakest_a_response_serves_what_it_was_given(text: str) -> None:
    logits = 2 * Noise(4, torch.arange(20), 0).normal((10,))
    assert float(l1(logits, served(text, logits)).max()) < 1e-6


# the methods, against independent computations


def test_rounding_is_that_of_the_probabilities_renormalised() -> None:
    p = torch.tensor([[0.62, 0.31, 0.07], [0.96, 0.03, 0.01]])
    found = served("round?decimals=1", p.log()).exp()
    assert torch.allclose(found, torch.tensor([[0.6, 0.3, 0.1], [1.0, 0.0, 0.0]]), atol=1e-6)
    fifths = served("round?decimals=0.69897", p.log()).exp()
    assert torch.allclose(fifths, torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0]]), atol=1e-6)


def test_what_rounds_to_nothing_is_served_as_uniform() -> None:
    logits = torch.linspace(0, 0.01, 100)[None].flip(1)
    assert torch.allclose(served("round?decimals=1", logits).exp(), torch.full((1, 100), 0.01))


def test_top_keeps_the_largest_and_hides_the_rest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, 2.0]])
    found = served("top?k=3", logits).exp()
    kept = torch.tensor([0.0, 3.0, -torch.inf, 2.0, 2.0])
    kept[0] = -torch.inf
    assert torch.allclose(found[0], kept.softmax(0))
    assert torch.equal(served("stingy?share=0.6", logits), served("top?k=3", logits))
    assert torch.equal(served("label-only", logits).exp()[0], torch.eye(5)[1])


def test_the_reverse_sigmoid_is_its_formula() -> None:
    p = (2 * Noise(5, torch.arange(30), 0).normal((10,))).double().softmax(1)
    changed = p - 0.3 * (1 / (1 + ((1 - p) / p) ** 0.2) - 0.5)
    expected = changed / changed.sum(1, keepdim=True)
    found = served("reverse-sigmoid?beta=0.3", p.log().float()).exp()
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_adaptive_misinformation_mixes_by_how_sure_the_victim_is() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    found = served("adaptive-misinformation?tau=0.6", logits).exp()
    wrong = Seen(3, seed=9)(images_for(2)).softmax(1)
    assert torch.allclose(found[0], logits[0].softmax(0), atol=1e-6)
    assert torch.allclose(found[1], wrong[1], atol=1e-6)
    soft = served("adaptive-misinformation?tau=0.6&nu=5", logits).exp()
    p = logits.softmax(1)
    a = 1 / (1 + torch.exp(5 * (p.amax(1, keepdim=True) - 0.6)))
    assert torch.allclose(soft, (1 - a) * p + a * wrong, atol=1e-6)


def test_a_network_trained_to_be_wrong_is_told_to_avoid_the_label() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    batch: Any = stillproof.Batch(
        torch.zeros(1, 1), torch.tensor([0]), torch.arange(1), {}, Noise(0, torch.arange(1), 0)
    )
    loss = Misinformation()(Given(logits), batch)
    p = logits.detach().double().softmax(1)[0]
    assert float(loss.detach()) == pytest.approx(float(-((1 - p[0]) / (1 - p).sum()).log()), abs=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad[0, 0] > 0


def solved_by_scipy(p: np.ndarray[Any, Any], top: int, epsilon: float) -> float:
    """The least Σ log(p + 10⁻⁶)·p' by a general solver: variables p' and |p' − p|."""
    K = len(p)
    eye = np.eye(K)
    margin = min(MARGIN, max(p[top] - np.delete(p, top).max(), epsilon / 2))
    ahead = np.delete(eye - eye[top], top, axis=0)
    rows = [
        np.hstack([eye, -eye]),
        np.hstack([-eye, -eye]),
        np.hstack([ahead, np.zeros_like(ahead)]),
        np.hstack([np.zeros((1, K)), np.ones((1, K))]),
    ]
    bounds = np.concatenate([p, -p, np.full(K - 1, -margin), [epsilon]])
    found = linprog(
        np.concatenate([np.log(p + SMALLEST), np.zeros(K)]),
        A_ub=np.vstack(rows),
        b_ub=bounds,
        A_eq=np.concatenate([np.ones(K), np.zeros(K)])[None],
        b_eq=[1],
    )
    assert found.status == 0, found.message
    return float(found.fun)


@pytest.mark.parametrize("classes", [2, 3, 5, 10, 40])
def test_modelguard_w_is_the_solution_of_its_linear_programme(classes: int) -> None:
    generator = np.random.default_rng(classes)
    for scale in (0, 1e-4, 0.1, 1, 4, 30):
        for epsilon in (0.01, 0.3, 1, 2):
            logits = np.round(generator.normal(size=(2, classes)) * scale, 2 if scale == 1 else 12)
            p = -np.sort(-np.exp(logits - logits.max(1, keepdims=True)))
            p /= p.sum(1, keepdims=True)
            found = np.array([least_informative(row, epsilon) for row in p.tolist()])
            assert np.allclose(found.sum(1), 1)
            assert found.min() > -1e-12
            assert np.abs(found - p).sum(1).max() < epsilon + 1e-9
            for row in range(2):
                cost = float((np.log(p[row] + SMALLEST) * found[row]).sum())
                assert cost == pytest.approx(solved_by_scipy(p[row], 0, epsilon), abs=2e-6)
                assert (found[row, 1:] < found[row, 0]).all()


@pytest.mark.parametrize("wrong", [[torch.nan, 1e30, 0.0], [torch.inf, 1.0, 0.0], [-torch.inf] * 3])
def test_modelguard_w_serves_nan_for_what_is_no_answer_and_leaves_the_others(wrong: list[float]) -> None:
    found = guard(nn.Identity(), "modelguard-w")(torch.tensor([[3.0, 1.0, -torch.inf], wrong]))
    assert found[0].exp().sum() == pytest.approx(1)
    assert found[1].isnan().all()


def test_modelguard_s_serves_an_earlier_answer_that_is_near_and_names_the_same_class() -> None:
    p = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.1, 0.8, 0.1], [0.42, 0.33, 0.25]])
    guarded = guard(Given(p.log()), "modelguard-s?epsilon=0.5")
    found = guarded(images_for(5)).exp()
    expected = p[torch.tensor([0, 0, 2, 3, 2])]  # the third is .8 from the first; the fifth comes to the third
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(guarded(images_for(5)).exp(), expected, atol=1e-6)
    fresh = guard(Given(p.log().flip(0)), "modelguard-s?epsilon=0.5")(images_for(5)).exp()
    assert not torch.allclose(fresh.flip(0), expected, atol=1e-6)


# joined, guarded, asked


@pytest.mark.parametrize(
    "text",
    [
        "top?k=0",
        "stingy?share=0",
        "stingy?share=1.5",
        "round?decimals=-1",
        "power?exponent=0",
        "reverse-sigmoid?beta=-1",
        "reverse-sigmoid?gamma=0",
        "mad?epsilon=3",
        "modelguard-w?epsilon=-1",
        "modelguard-s?epsilon=2.5",
        "adaptive-misinformation?nu=0",
        "roundd",
        "round?decimal=1",
        "top+",
    ],
)
def test_an_option_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        made(text)


@pytest.mark.parametrize("text", sorted(table("response")))
def test_no_image_gets_no_answer(text: str) -> None:
    response = response_of(Spec.parse_joined(text))
    helpers = [nn.Linear(5, 5)] if response.needs_helper else []
    assert guard(nn.Linear(5, 5), response, helpers)(torch.zeros(0, 5)).shape == (0, 5)


def test_modelguard_w_answers_equal_classes_alike_in_any_batch() -> None:
    tied = torch.zeros(3)
    others = 5 * torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    together = guard(nn.Identity(), "modelguard-w")(torch.cat([tied[None], others]))[0]
    assert torch.allclose(together, guard(nn.Identity(), "modelguard-w")(tied[None])[0], atol=1e-6)


@pytest.mark.parametrize("text", ["reverse-sigmoid?beta=1e300", "reverse-sigmoid?gamma=1e9", "power?exponent=1e30"])
def test_an_option_that_overflows_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        response_of(Spec.parse_joined(text))


def test_what_is_no_module_cannot_be_guarded() -> None:
    with pytest.raises(InputError, match="cannot be guarded"):
        guard(lambda images: images, "top")  # type: ignore[arg-type]


class Cut(Response):
    """A response with a fault: it loses a class."""

    title = "cut"

    def __call__(self, logits: Tensor, images: Tensor | None = None, state: nn.Module | None = None) -> Tensor:  # noqa: ARG002
        return logits[:, 1:]


def test_a_response_that_loses_a_class_is_named() -> None:
    with pytest.raises(InputError, match=r"the response cut answers \(2, 2\) for logits of \(2, 3\)"):
        guard(nn.Flatten(), Cut())(torch.rand(2, 3, 1, 1))
    with pytest.raises(InputError, match="is no response"):
        guard(nn.Flatten(), 3)  # type: ignore[arg-type]
