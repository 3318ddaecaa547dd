"""Distilling so that poison does not get in, and driving out what got in: consensus, and teacher-anchored unlearning.

What is not training says so: the universal change of `worst_change` is sought by Adam on the change alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillproof.core.adapters import logits_of
from stillproof.core.distillation import Batch, kd_divergence
from stillproof.core.images import ImageSet, as_float, augmentation_for, batches
from stillproof.core.noise import Noise, derive, permutation
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError


def consensus(teacher: nn.Module, images: ImageSet, views: int, *, runtime: Runtime, seed: int) -> Tensor:
    """What the teacher says of several views of an image, as one: log of its mean probabilities, (N, K), float32.

    views: how many augmented ones beside the plain image. In fp32. What holds on one view alone is averaged away; what
    poison was optimised strongly for holds on all (its agreement says nothing), so this comes after a scan.
    """
    if views < 0:
        raise InputError(f"{views} views are none.", "Give 0 or more.")
    change = augmentation_for(images)
    parts: list[Tensor] = []
    model = runtime.place(teacher.eval())
    with torch.inference_mode():
        for rows in batches(len(images), 512):
            pixels = images.images[rows]
            ids = torch.arange(rows.start, rows.start + len(pixels))
            seen = [pixels, *(change(pixels, Noise(derive(seed, "view"), ids, view), view) for view in range(views))]
            said = [model(as_float(one).to(runtime.device)).float().softmax(1) for one in seen]
            parts.append(logits_of(torch.stack(said).mean(0)).cpu())
    return torch.cat(parts).clone()


@dataclass(frozen=True, kw_only=True)
class Unlearning:
    """How a student is held to its teacher on trusted images, and on these with the change that parts them most.

    sizes: for each round, how large its change may be, as the mean of its absolute values: a trigger is small, and a
    change that destroys the image teaches nothing; steps, rate: of Adam on the change; temperature: of the
    distillation. Without sizes it is plain fine-tuning.
    """

    sizes: tuple[float, ...] = (0.05, 0.1, 0.1, 0.15, 0.15)
    steps: int = 60
    rate: float = 0.05
    temperature: float = 1.0
    batch_size: int = 128

    def __post_init__(self) -> None:
        if min(self.sizes, default=1.0) <= 0 or self.steps < 1 or self.rate <= 0 or self.temperature <= 0:
            raise InputError(f"{self} cannot run.", "Give positive sizes, steps, rate and temperature.")


def worst_change(
    teacher: nn.Module,
    student: nn.Module,
    images: Tensor,
    size: float,
    settings: Unlearning,
    *,
    runtime: Runtime,
    seed: int,
) -> Tensor:
    """One change for all images, (C, H, W), under which the student departs most from its teacher on the plain ones.

    argmax KL(T(x) ‖ S(x + δ)), mean |δ| ≤ size

    images: float32 in [0, 1], (n, C, H, W).
    """
    place = [runtime.place(model.eval()) for model in (teacher, student)]
    change = torch.zeros(images.shape[1:], device=runtime.device, requires_grad=True)
    optimiser = torch.optim.Adam([change], lr=settings.rate)
    wanted = [(parameter, parameter.requires_grad) for model in place for parameter in model.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        for step in range(settings.steps):
            order = permutation(len(images), derive(seed, "change", step))[: settings.batch_size]
            some = images[order].to(runtime.device)
            with torch.no_grad(), runtime.autocast():
                said = place[0](some).float()
            with runtime.autocast():
                answer = place[1]((some + change).clamp(0, 1)).float()
            loss = -kd_divergence(answer, said, settings.temperature)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                change.copy_(shrunk(change.clamp_(-1, 1), size))
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)
    return change.detach().cpu()


def shrunk(change: Tensor, size: float) -> Tensor:
    """The nearest change whose mean absolute value is at most `size` (Duchi et al. 2008): it is sparse."""
    most = size * change.numel()
    lengths = change.abs().flatten().sort(descending=True).values
    if float(lengths.sum()) <= most:
        return change
    surplus = (lengths.cumsum(0) - most) / torch.arange(1, len(lengths) + 1, device=change.device)
    cut = surplus[int((lengths > surplus).nonzero().max())]
    return change.sign() * (change.abs() - cut).clamp_min(0)


class Anchored:
    """Mean of KL(T(x) ‖ S(x)) and, for each δ, KL(T(x) ‖ S(x + δ)): what the teacher says of plain images holds."""

    def __init__(self, changes: list[Tensor], temperature: float) -> None:
        self.changes, self.temperature = changes, temperature

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        """The mean of all these divergences, a scalar."""
        shown = [batch.images]
        for change in self.changes:
            shown.append((batch.images + change.to(batch.images.device)).clamp(0, 1))
        answers = student(torch.cat(shown)).chunk(len(shown))
        taught = batch.teacher_logits(answers[0].shape[1])
        losses = [kd_divergence(answer, taught, self.temperature) for answer in answers]
        return torch.stack(losses).mean()
