"""What to take for the gradient of an operation that has none: rounding, signs, comparisons, casts, saturation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

STEPS = ("round", "floor", "ceil", "trunc", "fix")
"""Operations that a small change does not see, and that stay near the identity: their gradient is taken to be 1."""

SIGNS = ("sign", "sgn")
"""Their gradient is taken to be that of tanh, as nothing is near the identity for large values."""

SATURATING: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda said: 1 - said * said,
    "sigmoid": lambda said: said * (1 - said),
}
"""Functions with their derivative, from what they say. Where that is exactly 0 in float32, it is taken to be 1."""

COMPARISONS: Mapping[str, int] = {
    **dict.fromkeys(("gt", "greater", "ge", "greater_equal"), 1),
    **dict.fromkeys(("lt", "less", "le", "less_equal"), -1),
}
"""Whether they are true above or below: their gradient is taken to be that of a sigmoid of the difference."""

STEEPNESS = 4.0
"""Of that sigmoid: as steep as the identity where both are equal."""

REMAINDERS = ("remainder", "fmod")
"""What a step leaves over: constant, if the step is the identity."""

DIVISIONS = ("floor_divide", "__floordiv__")
"""Whole divisions: their gradient is taken to be the division's."""

CASTS: Mapping[str, torch.dtype] = {
    "byte": torch.uint8,
    "char": torch.int8,
    "short": torch.int16,
    "int": torch.int32,
    "long": torch.int64,
}

AS_FLOATS = ("float", "double", "half", "bfloat16")
"""How floats are made of integers and bools, besides to() and type()."""

MAKE_ANEW = frozenset({"__getitem__", "__and__", "__or__", "__xor__", "__invert__", "__lshift__", "__rshift__"})
"""Names that end like those in place, and write to nothing."""

STANDS_FOR = "_stillproof_integer"
"""The name under which a float that stands for a tensor of integers or bools remembers its type."""

SCORES = "_stillproof_scores"
"""The name under which an argmax remembers what it is the largest of."""

Operation = Callable[..., Any]


def stand_in(
    name: str, func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any], *, masks: bool
) -> Tensor | None:
    """What the operation says, with a gradient in place of the one that it has not; None where it has its own.

    name: of the operation, without the underscore that those in place end with; args: of which the first is a float
    tensor, or an argmax that remembers its scores; masks: whether comparisons, and what is made of them, votes, and
    what is flat get one as well.
    """
    values = args[0]
    if kwargs.get("out") is not None:
        return None
    if name in SIGNS:
        smooth = values.tanh()  # before it is written to
        return passed(func(values.detach()), smooth)
    if name in STEPS:
        return passed(func(values.detach(), *args[1:], **kwargs), values)
    cast = _integer_of(name, args, kwargs)
    if cast is not None:  # it stays a float, so that what is computed from it has a gradient
        return _standing_for(cast, values.detach().to(cast).to(values.dtype), values)
    if hasattr(values, STANDS_FOR) and _makes_floats(name, args, kwargs):
        plain: Tensor = values.to(func(values.detach(), *args[1:], **kwargs).dtype, copy=True)
        return plain
    if not masks:
        return None
    if name == "one_hot":
        return _one_hot(func, args, kwargs)
    if not any(isinstance(given, Tensor) and given.requires_grad for given in args):
        return None
    as_named = func.__name__  # in place they would have to change what they are given
    if as_named in SATURATING:
        said = func(values)
        dead = SATURATING[as_named](said.detach()) == 0
        return passed(said.detach(), torch.where(dead, values, said)) if bool(dead.any()) else None
    if name in REMAINDERS and len(args) == 2:
        return func(values.detach(), _without_gradient(args[1]))  # type: ignore[no-any-return]
    if name == "where" and len(args) == 3:
        return _chosen(*(args if func is torch.where else (args[1], args[0], args[2])))
    if len(args) != 2:
        return None
    other = args[1].to(values.dtype) if isinstance(args[1], Tensor) else args[1]
    if as_named in COMPARISONS:
        truth = func(values.detach(), _without_gradient(args[1]))
        smooth = (COMPARISONS[as_named] * STEEPNESS * (values - other)).sigmoid()
        return _standing_for(torch.bool, truth.to(values.dtype), smooth)
    if name in DIVISIONS or (name in ("div", "divide") and kwargs.get("rounding_mode") is not None):
        return passed(func(values.detach(), _without_gradient(args[1]), **kwargs), values / other)
    return None


def passed(value: Tensor, gradient_of: Tensor) -> Tensor:
    """The value, with the gradient of something else of its shape."""
    found: Tensor = _Straight.apply(value, gradient_of)  # type: ignore[no-untyped-call]
    return found


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, value: Tensor, gradient_of: Tensor) -> Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def with_integers(func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The operation; where it wants integers (an index, a shift) or bools, with those that floats stand for."""
    try:
        return func(*args, **kwargs)
    except (TypeError, RuntimeError, IndexError, NotImplementedError):
        # what is written to has to stay what it is: a copy of it would be written to instead
        kept = 1 if func.__name__.endswith("_") and func.__name__ not in MAKE_ANEW else 0
        changed = [*args[:kept], *(_as_integer(given) for given in args[kept:])]
        named = {name: _as_integer(given) for name, given in kwargs.items()}
        if all(new is old for new, old in zip([*changed, *named.values()], [*args, *kwargs.values()], strict=True)):
            raise
        return func(*changed, **named)


def _as_integer(given: Any) -> Any:
    if isinstance(given, tuple):
        changed = tuple(_as_integer(part) for part in given)
        return given if all(new is old for new, old in zip(changed, given, strict=True)) else changed
    cast = getattr(given, STANDS_FOR, None) if isinstance(given, Tensor) else None
    return given if cast is None else torch.Tensor.to(given.detach(), cast)


def remember_scores(found: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """An argmax over the last dimension, that remembers what it is the largest of."""
    values, *more = args
    if (more[0] if more else kwargs.get("dim")) in (-1, values.ndim - 1) and not kwargs.get("keepdim"):
        setattr(found, SCORES, values)
    return found


def _chosen(mask: Tensor, there: Any, elsewhere: Any) -> Tensor | None:
    """torch.where(), with a gradient of the mask, if that stands for one of bools."""
    if not hasattr(mask, STANDS_FOR):
        return None
    exact: Tensor = torch.where(_as_integer(mask), there, elsewhere)
    kind = None if exact.is_floating_point() else exact.dtype
    step = torch.as_tensor(_without_gradient(there)) - torch.as_tensor(_without_gradient(elsewhere))
    step = step.to(mask.dtype).nan_to_num(0, 0, 0)  # what is not chosen may be anything
    found = exact.to(mask.dtype if kind else exact.dtype) + (mask - mask.detach()) * step
    if kind is not None:
        setattr(found, STANDS_FOR, kind)
    return found


def _one_hot(func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which class is named, with the gradient of the softmax of what it is the largest of."""
    scores = getattr(args[0], SCORES, None)
    if scores is None:
        return None
    named = func(*args, **kwargs)
    if named.shape != scores.shape:
        return None
    return _standing_for(named.dtype, named.to(scores.dtype), scores.softmax(-1))


def _standing_for(kind: torch.dtype, value: Tensor, gradient_of: Tensor) -> Tensor:
    found = passed(value, gradient_of)
    setattr(found, STANDS_FOR, kind)
    return found


def _without_gradient(given: Any) -> Any:
    return given.detach() if isinstance(given, Tensor) else given


def _integer_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.dtype | None:
    """The integer type that an operation casts to, if it does."""
    if name in CASTS:
        return CASTS[name]
    kinds = _kinds(name, args, kwargs)
    return next((kind for kind in kinds if not kind.is_floating_point and kind != torch.bool), None)


def _makes_floats(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return name in AS_FLOATS or any(kind.is_floating_point for kind in _kinds(name, args, kwargs))


def _kinds(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.dtype]:
    """The types that a conversion names, or takes from another tensor."""
    if name not in ("to", "type"):
        return []
    given = [*args[1:], *kwargs.values()]
    return [one.dtype if isinstance(one, Tensor) else one for one in given if isinstance(one, torch.dtype | Tensor)]
