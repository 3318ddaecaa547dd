"""Transfer from a surrogate: it needs no gradient of the victim, and one query a surrogate."""

import pytest
import torch
from torch import nn

from stillproof.attacks.gradient import PGD
from stillproof.attacks.square import Square
from stillproof.attacks.surrogate import Transfer
from stillproof.attacks.threats import Linf
from stillproof.errors import InputError

from .test_all_attacks import case
from .test_gradient import FP32


def test_a_model_that_only_answers_falls_to_its_twin() -> None:
    twin, images, labels = case()
    asked = 0

    def victim(given: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        asked += len(given)
        return (1e4 * twin(given)).softmax(1).detach()  # saturated: no gradient, no scores

    threat = Linf(0.03)
    white_box = PGD(threat=threat, steps=20, step=0.1, loss="margin")(twin, images, labels, runtime=FP32)
    found = Transfer(threat=threat, surrogates=(twin,))(victim, images, labels, runtime=FP32)
    assert found.success.float().mean() >= white_box.success.float().mean() - 0.05
    assert int(found.queries.max()) == 2
    assert int(found.queries.sum()) == asked
    assert (found.distance <= 0.03 + 1e-6).all()
    blind = Square(threat=threat, queries=100)(victim, images, labels, runtime=FP32)
    assert found.success.float().mean() > blind.success.float().mean()


def test_a_second_surrogate_is_asked_about_what_the_first_left() -> None:
    twin, images, labels = case()
    useless = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    threat = Linf(0.05)
    alone = Transfer(threat=threat, surrogates=(useless,))(twin, images, labels, runtime=FP32)
    both = Transfer(threat=threat, surrogates=(useless, twin))(twin, images, labels, runtime=FP32)
    assert both.success.sum() > alone.success.sum()
    assert (both.queries[~alone.success] >= 3).all()
    assert (both.queries[alone.success] == alone.queries[alone.success]).all()


def test_nothing_to_transfer_from_is_refused() -> None:
    with pytest.raises(InputError, match="without surrogates"):
        Transfer(surrogates=())
