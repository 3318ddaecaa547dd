"""The logits inside a classifier: what its last linear layer says, whatever is made of it afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def last_linear(classifier: nn.Module, images: Tensor) -> str | None:
    """The name of the linear layer that runs last on these images, if there is one and it runs once."""
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _module, _given, _answer, name=name: ran.append(name))
        for name, module in classifier.named_modules()
        if type(module) is nn.Linear
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


def inner_logits(classifier: nn.Module, images: Tensor) -> nn.Module:
    """The classifier up to its last linear layer, where that decides as the classifier does and says more; else the
    classifier."""
    layer = last_linear(classifier, images)
    if layer is None:
        return classifier
    found = InnerLogits(classifier, layer)
    with torch.no_grad():
        said, answer = found(images), classifier(images)
    alike = said.shape == answer.shape and torch.equal(said.argmax(1), answer.argmax(1))
    return found if alike and not torch.equal(said, answer) else classifier
