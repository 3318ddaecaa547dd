"""Muon: its step against an SVD, and that it trains; the other groups against torch's SGD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stillproof.core.optimisers import COEFFICIENTS, STEPS, NesterovMuon, orthogonalised


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_a_step_keeps_its_directions_and_loses_its_lengths(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    lengths = 0.3 + torch.rand(len(frame.S), generator=generator)
    matrix = frame.U @ torch.diag(lengths) @ frame.Vh
    found = orthogonalised([1e3 * matrix, -1e3 * matrix])
    assert found[1].allclose(-found[0], atol=1e-4)
    within = frame.U.T @ found[0] @ frame.Vh.T
    assert (within.diagonal() > 0.5).all()
    assert (within.diagonal() < 1.4).all()
    assert (within - torch.diag(within.diagonal())).abs().max() < 1e-3


def test_matrices_of_all_sizes_come_out_as_alone_and_as_by_the_plain_iteration() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (5, 3), (3, 7), (4, 4), (1, 9), (128, 1152)]
    matrices = [torch.randn(size, generator=generator) for size in sizes]
    a, b, c = COEFFICIENTS
    for matrix, found in zip(matrices, orthogonalised(matrices), strict=True):
        assert found.allclose(orthogonalised([matrix])[0], atol=1e-5)
        plain = (matrix / matrix.norm()).double()
        for _ in range(STEPS):
            square = plain @ plain.mT
            plain = a * plain + (b * square + c * square @ square) @ plain
        assert found.allclose(plain.float(), atol=1e-4)


def test_a_kernel_without_gradient_stays() -> None:
    assert orthogonalised([torch.zeros(3, 4)])[0].equal(torch.zeros(3, 4))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_kernel_moves_by_the_rate_whatever_its_gradient(memory_format: torch.memory_format) -> None:
    kernel = nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=memory_format))
    before, rate = kernel.detach().clone(), 0.1
    optimiser = NesterovMuon([{"params": [kernel], "lr": rate, "orthogonal": True}], momentum=0.9)
    kernel.grad = 1e-4 * torch.randn(4, 3, 3, 3).contiguous(memory_format=memory_format)
    optimiser.step()
    moved = (kernel.detach() - before).flatten(1)
    assert 0.5 * rate < torch.linalg.svdvals(moved).mean() < 1.4 * rate
    expected = orthogonalised([kernel.grad.flatten(1)])[0]
    assert moved.allclose(-rate * expected, atol=0.01)


def test_other_groups_move_as_by_torchs_sgd() -> None:
    ours, theirs = (nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    mine = NesterovMuon([{"params": list(ours.parameters()), "lr": 0.1, "weight_decay": 0.01}], momentum=0.9)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for step in range(5):
        images = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        for model, optimiser in ((ours, mine), (theirs, reference)):
            optimiser.zero_grad()
            model(images).pow(2).sum().backward()
            optimiser.step()
    assert ours.weight.allclose(theirs.weight, atol=1e-6)
    assert ours.bias.allclose(theirs.bias, atol=1e-6)
