"""Robust soft label adversarial distillation, RSLAD (Zi et al. 2021, arXiv 2108.07969)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.core.distillation import Batch, kd_divergence
from stillproof.errors import InputError
from stillproof.evasion.hardening.inner import Inner


@dataclass(frozen=True, kw_only=True)
class RSLAD(Inner):
    """α·KL(teacher(x) ‖ student(x')) + (1 − α)·KL(teacher(x) ‖ student(x)), x' the worst for the first of them.

    The teacher must be robust itself; no label is used. Its logits travel as the column `teacher`. The paper's α is
    5/6, with 10 steps of 2/255 within 8/255, at temperature 1.
    """

    alpha: float = 5 / 6
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise InputError(f"{self} cannot be distilled with.", "alpha is in (0, 1].")

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        soft = None

        def divergence(logits: Tensor) -> Tensor:
            nonlocal soft
            soft = batch.teacher_logits(logits.shape[1]).softmax(dim=1) if soft is None else soft
            return F.kl_div(F.log_softmax(logits, dim=1), soft, reduction="sum")

        worst = self.worst(student, batch, divergence)
        # in one pass, so that batch norm sees both kinds
        hardened, plain = student(torch.cat([worst, batch.images])).chunk(2)
        teacher = batch.teacher_logits(plain.shape[1])
        return self.alpha * kd_divergence(hardened, teacher, 1.0) + (1 - self.alpha) * kd_divergence(
            plain, teacher, 1.0
        )
