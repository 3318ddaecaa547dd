"""The logits inside a classifier: what its last linear layer says, whatever is made of it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def last_linear(classifier: nn.Module, images: Tensor) -> str | None:
    """The name of the linear layer that runs last on these images, if there is one and it runs once."""
    return _last(classifier, images, lambda module: type(module) is nn.Linear)


def last_weighted(classifier: nn.Module, images: Tensor) -> str | None:
    """The name of the layer with a matrix or a kernel of its own that runs last, if there is one and it runs once."""
    return _last(classifier, images, _has_weights)


def _has_weights(module: nn.Module) -> bool:
    """Itself, and no part of it: what a container keeps beside its layers (a class token, a mean) is no layer."""
    own = {"", "parametrizations"}  # torch.nn.utils.parametrizations computes a layer's weights
    named = [(name.rpartition(".")[0].partition(".")[0], values) for name, values in module.named_parameters()]
    return {within for within, _ in named} <= own and any(values.ndim >= 2 for _, values in named)


def _last(classifier: nn.Module, images: Tensor, is_meant: Callable[[nn.Module], bool]) -> str | None:
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _module, _given, _answer, name=name: ran.append(name))
        for name, module in classifier.named_modules()
        if is_meant(module) and "parametrizations" not in name.split(".")
    ]
    try:
        with torch.no_grad():
            classifier(images)
    finally:
        for hook in hooks:
            hook.remove()
    return ran[-1] if ran and ran.count(ran[-1]) == 1 else None


class InnerLogits(nn.Module):
    """A classifier that answers with what one of its layers says: to climb `through` a softmax that is saturated."""

    def __init__(self, classifier: nn.Module, layer: str) -> None:
        super().__init__()
        self.classifier, self.layer = classifier, layer

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> the layer's output, (N, K)."""
        said: list[Tensor] = []
        hook = self.classifier.get_submodule(self.layer).register_forward_hook(
            lambda _module, _given, answer: said.append(answer)
        )
        try:
            self.classifier(images)
        finally:
            hook.remove()
        return said[-1]


class BeforeSoftmax(nn.Module):
    """A classifier that answers with what its last softmax is given, whatever that comes from."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.has_heard = False
        """Whether there was a softmax in the last pass."""

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> the softmax's argument, (N, K); its answer, where there is no softmax."""
        with _Listening() as heard:
            answer: Tensor = self.classifier(images)
        self.has_heard = heard.given is not None
        return answer if heard.given is None else heard.given


class _Listening(TorchFunctionMode):
    """While it is on, it keeps what a softmax was given last."""

    def __init__(self) -> None:
        super().__init__()
        self.given: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("softmax", "log_softmax") and args and isinstance(args[0], Tensor):
            self.given = args[0]
        return func(*args, **(kwargs or {}))


def inner_logits(classifier: nn.Module, images: Tensor) -> nn.Module:
    """The classifier up to its last linear layer, or its last softmax, where that decides as the classifier does and
    says more; else the classifier."""
    layer = last_linear(classifier, images)
    candidates = [*([] if layer is None else [InnerLogits(classifier, layer)]), BeforeSoftmax(classifier)]
    answer = _said(classifier, images)
    for found in candidates:
        said = _said(found, images)
        alike = said.shape == answer.shape and torch.equal(said.argmax(1), answer.argmax(1))
        is_within = found.has_heard if isinstance(found, BeforeSoftmax) else True
        if alike and is_within and not torch.equal(said, answer):
            return found
    return classifier


def _said(model: nn.Module, images: Tensor) -> Tensor:
    """Its answer, with the same draws each time, about a copy: a model may change its input in place."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found: Tensor = model(images.clone())
    return found
