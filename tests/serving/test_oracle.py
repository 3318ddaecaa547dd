"""The oracle reveals what it is told to, counts exactly, and refuses whole batches."""

import math

import pytest
import torch
from torch import Tensor, nn

from stillproof.core.images import ImageSet
from stillproof.core.runtime import Runtime
from stillproof.errors import BudgetExceeded, InputError
from stillproof.serving.oracle import Oracle, Reveal
from stillproof.theft.transfer import TINY, log_probabilities


class Fixed(nn.Module):
    """Logits of a fixed linear map."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(192, classes)

    def forward(self, images: Tensor) -> Tensor:
        return 5 * self.linear(images.flatten(1))


def test_every_image_is_a_query_and_a_batch_beyond_the_budget_is_refused_whole(toy: ImageSet, runtime: Runtime) -> None:
    oracle = Oracle(Fixed(), Reveal.parse("probabilities"), runtime, budget=100)
    oracle.ask(toy)
    oracle.ask(toy.subset(torch.zeros(30, dtype=torch.int64)))  # the same image again is a query again
    assert oracle.queries == 90
    with pytest.raises(BudgetExceeded, match="90 of 100 queries and was asked 11 more"):
        oracle.ask(toy.subset(torch.arange(11)))
    assert oracle.queries == 90
    oracle.ask(toy.subset(torch.arange(10)))
    assert oracle.queries == 100
    assert oracle.bits == 100 * 32 * 3


@pytest.mark.parametrize(
    ("text", "bits"), [("logits", 96), ("top-2", 2 * (32 + math.log2(3))), ("label", math.log2(3))]
)
def test_bits_are_those_of_the_answer(text: str, bits: float, toy: ImageSet, runtime: Runtime) -> None:
    oracle = Oracle(Fixed(), Reveal.parse(text), runtime)
    oracle.ask(toy)
    assert oracle.bits == pytest.approx(60 * bits)


def test_what_is_revealed_is_all_that_is_revealed(toy: ImageSet, runtime: Runtime) -> None:
    answers = {text: Oracle(Fixed(), Reveal.parse(text), runtime).ask(toy) for text in ("logits", "top-2", "label")}
    logits = answers["logits"].scores
    assert logits is not None
    assert answers["label"].scores is None
    assert torch.equal(answers["label"].classes[:, 0], logits.argmax(1))
    top = answers["top-2"]
    assert top.scores is not None
    assert top.scores.shape == (60, 2)
    assert torch.allclose(top.scores, logits.softmax(1).topk(2).values)


@pytest.mark.parametrize("text", ["logits", "probabilities", "top-2", "label"])
def test_nan_is_no_answer_whatever_is_revealed(text: str, toy: ImageSet, runtime: Runtime) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([torch.nan, 1.0, 2.0]).expand(len(images), -1)

    with pytest.raises(InputError, match="holds NaN"):
        Oracle(Broken(), Reveal.parse(text), runtime).ask(toy)


def test_a_thief_spreads_what_was_not_revealed_evenly(toy: ImageSet, runtime: Runtime) -> None:
    reveal = Reveal.parse("top-1")
    answer = Oracle(Fixed(4), reveal, runtime).ask(toy)
    assert answer.scores is not None
    found = log_probabilities(answer, reveal, 4).exp()
    assert torch.allclose(found.sum(1), torch.ones(60))
    assert torch.allclose(found.gather(1, answer.classes), answer.scores, atol=1e-6)
    rest = found.scatter(1, answer.classes, torch.nan)
    assert torch.allclose(rest.nanmean(1), (1 - answer.scores[:, 0]) / 3, atol=1e-6)


def test_all_answers_become_finite_log_probabilities(toy: ImageSet, runtime: Runtime) -> None:
    full = log_probabilities(Oracle(Fixed(), Reveal.parse("logits"), runtime).ask(toy), Reveal.parse("logits"), 3)
    for text in ("probabilities", "top-3", "top-9"):
        reveal = Reveal.parse(text)
        found = log_probabilities(Oracle(Fixed(), reveal, runtime).ask(toy), reveal, 3)
        assert torch.allclose(found.exp(), full.exp(), atol=1e-5)
    reveal = Reveal.parse("label")
    certain = log_probabilities(Oracle(Fixed(), reveal, runtime).ask(toy), reveal, 3)
    assert certain.isfinite().all()
    assert torch.allclose(certain.exp().amax(1), torch.ones(60), atol=3 * TINY)


@pytest.mark.parametrize("text", ["top-0", "top-x", "everything", ""])
def test_an_unknown_reveal_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="cannot reveal"):
        Reveal.parse(text)
