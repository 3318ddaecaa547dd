"""A way through steps that have no gradient, whatever the classifier's code is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stillproof.attacks.inner_logits import inner_logits
from stillproof.attacks.stand_ins import SCORES, remember_scores, stand_in, with_integers

ALIKE = 0.95
"""Cosine of two gradients from which one is as good as the other."""

LEAVING = frozenset({"numpy", "__array__", "tolist", "item"})
"""What goes out of torch, and has no gradient there."""


class _Through(TorchFunctionMode):
    """While it is on, these operations pass gradients; their values stay what they are. passed: how many did; masks:
    see `stand_in`."""

    def __init__(self, *, masks: bool) -> None:
        super().__init__()
        self.passed, self.masks = 0, masks
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
        name = getattr(func, "__name__", "")
        name = name if name.endswith("__") else name.removesuffix("_")  # in place or not
        if not args or not isinstance(args[0], Tensor):
            return with_integers(func, args, kwargs)
        values = args[0]
        if values.is_floating_point():
            if name == "detach" or func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
                self.passed += values.requires_grad
                return values
            if name in LEAVING:
                return func(values.detach(), *args[1:], **kwargs)
            if name == "argmax" and self.masks:
                return remember_scores(func(*args, **kwargs), args, kwargs)
        if values.is_floating_point() or hasattr(values, SCORES):
            found = stand_in(name, func, args, kwargs, masks=self.masks)
            if found is not None:
                self.passed += 1
                return found
        return with_integers(func, args, kwargs)


def _staying_out(through: _Through) -> Callable[[Any], None]:
    """inference_mode() within a forward pass: entered, and not in force."""

    def enter(mode: Any) -> None:
        through.passed += 1
        mode._inference_mode_context = nullcontext()

    return enter


def way_through(classifier: nn.Module, images: Tensor, *, within: bool = True) -> nn.Module | None:
    """What to climb through a classifier with steps that have no gradient; None where there is no such step, where it
    makes no difference to the gradient, or where there is no way that says what the classifier says.

    images: a few, on the classifier's device: those without a gradient tell most; within: whether the logits inside are
    looked for as well. Where stand-ins for masks change what it says, or fail, those of single steps alone are tried.
    """
    inner = inner_logits(classifier, images) if within else classifier
    said, usual = _as_it_is(inner, images)
    for masks in (True, False):
        found = StraightThrough(inner, masks=masks)
        slope = _faithful_slope(found, images, said)
        if slope is not None and (usual is None or bool(slope.isfinite().all())):
            is_a_way = inner is not classifier or (found.passed > 0 and not _is_the_same(slope, usual))
            return found if is_a_way else None
    return None


def _faithful_slope(way: nn.Module, images: Tensor, said: Tensor) -> Tensor | None:
    """Its gradient, if it has one and says the same."""
    try:
        answer, slope = _climbed(way, images)
    except Exception:  # it goes where torch cannot follow
        return None
    return slope if torch.allclose(answer, said, rtol=1e-3, atol=1e-3 * float(said.std())) else None


def _climbed(classifier: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What it says about these images, and the gradient of a sum of that; draws are the same each time."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = images.detach().clone().requires_grad_()
        answer = classifier(probe.clone()).float()  # it may write to what it is given
        weights = torch.linspace(1, 2, answer.shape[1], device=answer.device)  # a plain sum may be constant
        gradient: Tensor = torch.autograd.grad((answer * weights).sum(), probe)[0]
        return answer.detach(), gradient


def _as_it_is(classifier: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What it says, and that gradient as it is, or None."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        said: Tensor = classifier(images.clone()).float()
    try:
        slope = _climbed(classifier, images)[1]
    except Exception:  # it has none
        return said, None
    return said, slope if bool(slope.isfinite().all()) else None


def _is_the_same(slope: Tensor, usual: Tensor | None) -> bool:
    """Whether the classifier as it is has about this slope at each image: what was passed through hides nothing."""
    if usual is None:
        return False
    ours, theirs = slope.flatten(1).double(), usual.flatten(1).double()
    likeness = torch.nn.functional.cosine_similarity(ours, theirs, eps=torch.finfo(torch.float64).tiny)
    return bool(((likeness > ALIKE) | ((ours == 0) & (theirs == 0)).all(1)).all())


class StraightThrough(nn.Module):
    """A classifier whose rounding, signs, comparisons, integer casts, saturated tanh and sigmoid, detach(), .data,
    no_grad() and inference_mode() pass gradients, to climb `through`.

    masks: see `stand_in`. Its answers are those of the classifier, up to rounding, where `way_through` made it: floats
    that stand for masks do not take part in everything that bools do. What is computed with NumPy or by an index stays
    without gradient. Source: Bengio et al. 2013, arXiv 1308.3432; as an attack, Athalye et al. 2018, arXiv 1802.00420.
    """

    def __init__(self, classifier: nn.Module, *, masks: bool = True) -> None:
        super().__init__()
        self.classifier, self.masks = classifier, masks
        self.passed = 0
        """How many operations of the last pass were passed through."""

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits, (N, K)."""
        with _Through(masks=self.masks) as through:
            logits: Tensor = self.classifier(images)
        self.passed = through.passed
        return logits
