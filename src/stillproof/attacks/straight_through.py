"""A way through steps that have no gradient: rounding, signs, casts, detached tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stillproof.attacks.inner_logits import inner_logits

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


LEAVING = frozenset({"numpy", "__array__", "tolist", "item"})
"""What goes out of torch, and has no gradient there."""

STANDS_FOR = "_stillproof_integer"
"""The name under which a float that stands for an integer tensor remembers its type."""


class _Through(TorchFunctionMode):
    """While it is on, these operations pass gradients; their values stay what they are. passed: how many did."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0
        self._entering: Any = None

    def __enter__(self) -> _Through:
        self._entering = torch.inference_mode.__enter__
        torch.inference_mode.__enter__ = _staying_out(self)  # type: ignore[method-assign]  # no function mode sees it
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *why: object) -> None:
        super().__exit__(*why)  # type: ignore[no-untyped-call]
        torch.inference_mode.__enter__ = self._entering  # type: ignore[method-assign]

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            self.passed += not args[0]
            return None  # no_grad() within a forward pass
        name = getattr(func, "__name__", "").removesuffix("_")
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return _with_integers(func, args, kwargs)
        values = args[0]
        if name in SIGNS:
            self.passed += 1
            return _passed(func(values.detach()), values.tanh())
        if name == "detach" or func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            self.passed += values.requires_grad
            return values
        if name in LEAVING:
            return func(values.detach(), *args[1:], **kwargs)
        if name in STEPS and kwargs.get("out") is None:
            self.passed += 1
            return _passed(func(values.detach(), *args[1:], **kwargs), values)
        cast = _integer_of(name, args, kwargs)
        if cast is not None:  # it stays a float, so that what is computed from it has a gradient
            self.passed += 1
            found = _passed(values.detach().to(cast).to(values.dtype), values)
            setattr(found, STANDS_FOR, cast)
            return found
        return _with_integers(func, args, kwargs)


def _staying_out(through: _Through) -> Callable[[Any], None]:
    """inference_mode() within a forward pass: entered, and not in force."""

    def enter(mode: Any) -> None:
        through.passed += 1
        mode._inference_mode_context = nullcontext()

    return enter


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


def _with_integers(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operation; where it wants integers (an index, a shift), with those that floats stand for."""
    try:
        return func(*args, **kwargs)
    except (TypeError, RuntimeError, IndexError, NotImplementedError):
        changed = [_as_integer(given) for given in args]
        if all(new is old for new, old in zip(changed, args, strict=True)):
            raise
        return func(*changed, **kwargs)


def _as_integer(given: Any) -> Any:
    if isinstance(given, tuple):
        changed = tuple(_as_integer(part) for part in given)
        return given if all(new is old for new, old in zip(changed, given, strict=True)) else changed
    cast = getattr(given, STANDS_FOR, None) if isinstance(given, Tensor) else None
    return given if cast is None else torch.Tensor.to(given.detach(), cast)


def _integer_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.dtype | None:
    """The integer type that an operation casts to, if it does."""
    if name in CASTS:
        return CASTS[name]
    if name != "to":
        return None
    named = [given for given in (*args[1:], *kwargs.values()) if isinstance(given, torch.dtype)]
    return next((kind for kind in named if not kind.is_floating_point and kind != torch.bool), None)


def way_through(classifier: nn.Module, images: Tensor) -> nn.Module | None:
    """What to climb through a classifier with steps that have no gradient; None where there is no such step, or no way.

    images: a few, on the classifier's device.
    """
    inner = inner_logits(classifier, images)
    found = StraightThrough(inner)
    try:
        with torch.enable_grad():
            probe = images.detach().clone().requires_grad_()
            torch.autograd.grad(found(probe.clone()).float().sum(), probe)  # it may change what it is shown
    except Exception:  # it goes where torch cannot follow
        return None
    return found if found.passed or inner is not classifier else None


class StraightThrough(nn.Module):
    """A classifier whose rounding, signs, integer casts, detach(), .data, no_grad() and inference_mode() pass
    gradients, to climb `through`.

    Its answers are those of the classifier, up to rounding. What is computed with NumPy, by a comparison or an index
    stays without gradient. Source: Bengio et al. 2013, arXiv 1308.3432; as an attack, Athalye et al. 2018, arXiv
    1802.00420.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.passed = 0
        """How many operations of the last pass were passed through."""

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits, (N, K)."""
        with _Through() as through:
            logits: Tensor = self.classifier(images)
        self.passed = through.passed
        return logits
