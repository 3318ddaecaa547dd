"""A way through steps that have no gradient: rounding, signs, casts, detached tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

STEPS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "round": torch.round,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "fix": torch.trunc,
    "detach": lambda values: values,
}
"""Operations that a small change does not see, and that stay near the identity: their gradient is taken to be 1."""

SIGNS = ("sign", "sgn")
"""Their gradient is taken to be that of tanh, as nothing is near the identity for large values."""

CASTS: Mapping[str, torch.dtype] = {
    "byte": torch.uint8,
    "char": torch.int8,
    "short": torch.int16,
    "int": torch.int32,
    "long": torch.int64,
}


class _Through(TorchFunctionMode):
    """While it is on, these operations pass gradients; their values stay what they are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            return None  # no_grad() within a forward pass
        name = getattr(func, "__name__", "").removesuffix("_")
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return func(*args, **kwargs)
        values = args[0]
        if name in SIGNS:
            return _passed(func(values.detach()), values.tanh())
        if name == "detach":
            return values
        if name in STEPS and not kwargs.get("out"):
            return _passed(func(values.detach(), *args[1:], **kwargs), values)
        cast = _integer_of(name, args, kwargs)
        if cast is not None:  # it stays a float, so that what is computed from it has a gradient
            return _passed(values.detach().to(cast).to(values.dtype), values)
        return func(*args, **kwargs)


def _passed(value: Tensor, gradient_of: Tensor) -> Tensor:
    found: Tensor = _Straight.apply(value, gradient_of)  # type: ignore[no-untyped-call]
    return found


class _Straight(torch.autograd.Function):
    """The value, with the gradient of something else."""

    @staticmethod
    def forward(_context: Any, value: Tensor, gradient_of: Tensor) -> Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def _integer_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.dtype | None:
    """The integer type that an operation casts to, if it does."""
    if name in CASTS:
        return CASTS[name]
    if name != "to":
        return None
    named = [given for given in (*args[1:], *kwargs.values()) if isinstance(given, torch.dtype)]
    return next((kind for kind in named if not kind.is_floating_point and kind != torch.bool), None)


class StraightThrough(nn.Module):
    """A classifier whose rounding, signs, integer casts, detach() and no_grad() pass gradients; to climb `through`.

    Its answers are those of the classifier, up to rounding. What is computed with NumPy, by comparison or by an index
    stays without gradient. Source: Bengio et al. 2013, arXiv 1308.3432; as an attack, Athalye et al. 2018, arXiv
    1802.00420.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits, (N, K)."""
        with _Through():
            logits: Tensor = self.classifier(images)
        return logits
