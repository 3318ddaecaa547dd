"""What an attack ascends: losses per image, (n,), larger where the attack is nearer to its aim.

All take logits, (n, K), labels, int64, (n,), and target: None where any other class than the label is the aim, or the
class that is, int64, (n,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stillproof.errors import InputError, nearest

LossName = Literal["cross-entropy", "log-odds", "margin", "dlr", "standardised"]

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, target: Tensor | None = None) -> Tensor:
    """−log softmax(z)_y, or log softmax(z)_t. Vanishes in float32 once the margin is over 16.6."""
    if target is None:
        return F.cross_entropy(logits, labels, reduction="none")
    return -F.cross_entropy(logits, target, reduction="none")


def log_odds(logits: Tensor, labels: Tensor, target: Tensor | None = None) -> Tensor:
    """log Σ_{j≠y} exp z_j − z_y, or z_t − log Σ_{j≠t} exp z_j: the odds of a wrong class, or of the target.

    It rises with the cross-entropy, log(1 + odds), and has its gradient but for a factor that is positive and the same
    for all pixels, so that a step of fixed length is the same; but it does not vanish where the softmax saturates.
    """
    wanted = labels if target is None else target
    own = logits.gather(1, wanted[:, None])[:, 0]
    others = logits.scatter(1, wanted[:, None], -torch.inf).logsumexp(dim=1)
    return others - own if target is None else own - others


def margin(logits: Tensor, labels: Tensor, target: Tensor | None = None, *, confidence: float = math.inf) -> Tensor:
    """max_{j≠y} z_j − z_y, or z_t − max_{j≠t} z_j: positive where the attack has succeeded; at most `confidence`, κ.

    Source: Carlini & Wagner 2017, arXiv 1608.04644.
    """
    wanted = labels if target is None else target
    own = logits.gather(1, wanted[:, None])[:, 0]
    # −inf where the class stands, not a product with a one-hot: that would clamp negative logits at 0
    others = logits.scatter(1, wanted[:, None], -torch.inf).amax(dim=1)
    return (others - own if target is None else own - others).clamp(max=confidence)


def dlr(logits: Tensor, labels: Tensor, target: Tensor | None = None) -> Tensor:
    """Difference of logits ratio: a margin that neither shift nor scale of the logits changes.

        −(z_y − max_{i≠y} z_i) / (z_π1 − z_π3)           or           −(z_y − z_t) / (z_π1 − (z_π3 + z_π4) / 2)

    π: the classes by falling logit. With fewer than 3 (or, targeted, 4) classes it is the margin.
    Source: Croce & Hein 2020, arXiv 2003.01690.
    """
    if logits.shape[1] < (3 if target is None else 4):
        return margin(logits, labels, target)
    own = logits.gather(1, labels[:, None])[:, 0]
    if target is None:
        top = logits.topk(3, dim=1).values
        return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)
    top = logits.topk(4, dim=1).values
    wanted = logits.gather(1, target[:, None])[:, 0]
    return (wanted - own) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def standardised(logits: Tensor, labels: Tensor, target: Tensor | None = None) -> Tensor:
    """Cross-entropy of z / std(z), the deviation held fixed: each image is brought to a temperature of its own.

    It has a gradient at every scale of the logits, as the margin has, and still heeds all classes. With 2 classes it is
    the margin.
    """
    if logits.shape[1] < 3:
        return margin(logits, labels, target)
    centred = logits - logits.mean(dim=1, keepdim=True)
    scale = centred.detach().square().mean(dim=1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return cross_entropy(centred / scale, labels, target)


def loss_of(named: LossName | Loss) -> Loss:
    """The loss of this name, or a loss of one's own as it is. Raises InputError."""
    if not isinstance(named, str):
        return named
    if named not in LOSSES:
        raise InputError(f"there is no loss {named!r}.", nearest(named, LOSSES))
    return LOSSES[named]


LOSSES: Mapping[LossName, Loss] = {
    "cross-entropy": cross_entropy,
    "log-odds": log_odds,
    "margin": margin,
    "dlr": dlr,
    "standardised": standardised,
}
