"""What goes through the layers of a network: finding a layer with features, and watching it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from stillproof.core.adapters import inner
from stillproof.errors import InputError

Form = Literal["map", "vector"]
"""Features with places, (n, C, H, W); or one vector an image, (n, D)."""


class Watched:
    """A layer whose latest features are kept while the model runs, until the context is left.

    Names are those of the model within its adapters. What is kept is a copy: a later layer may work in place.
    """

    def __init__(self, model: nn.Module, name: str, form: Form, probe: Tensor, who: str) -> None:
        self._form = form
        passes, logits = passes_by_layer(model, probe)
        fitting = {layer: found for layer, made in passes.items() if (found := _as_form(made.output, form)) is not None}
        head = _head(passes, logits, inner(model)) if form == "vector" and not name else ""
        chosen = name or head or (_last_map(fitting, passes) if form == "map" else "")
        self._read_input = bool(head)
        if head:
            fitting[head] = passes[head].first_input.flatten(1)
        if chosen not in fitting:
            listed = "\n".join(f"{layer}: {'×'.join(map(str, found.shape[1:]))}" for layer, found in fitting.items())
            wanted = "a feature map, (n, C, H, W)" if form == "map" else "one vector an image, (n, D)"
            raise InputError(
                f"{who}={name}: there is no layer of that name that gives {wanted}.",
                f"It has these:\n{listed}" if listed else "It has none: use an objective on logits.",
            )
        self.first = fitting[chosen]
        self._latest: Tensor | None = None
        self._layer = inner(model).get_submodule(chosen)

    def __enter__(self) -> Self:
        self._hook = self._layer.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_error: object) -> None:
        self._hook.remove()

    def _keep(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        found = inputs[0].flatten(1) if self._read_input else _as_form(output, self._form)
        self._latest = None if found is None else found.clone()

    def take(self) -> Tensor:
        """The features of the last pass, float32."""
        if self._latest is None:
            raise InputError("a watched layer did not run.", "Name a layer that every forward pass goes through.")
        latest, self._latest = self._latest.float(), None
        return latest


class Pass(NamedTuple):
    """What went through a layer."""

    first_input: Tensor
    output: object


def passes_by_layer(model: nn.Module, images: Tensor) -> tuple[dict[str, Pass], Tensor]:
    """What goes through each named module for these images, in the order in which they finish last; and the logits.

    Eval mode, without gradient.
    """
    found: dict[str, Pass] = {}

    def keep(name: str, inputs: tuple[object, ...], output: object) -> None:
        found.pop(name, None)  # a layer that runs twice stands where it ran last
        first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else torch.empty(0)
        found[name] = Pass(first.clone(), output.clone() if isinstance(output, Tensor) else output)

    def hook(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        return lambda _module, inputs, output: keep(name, inputs, output)

    hooks = [part.register_forward_hook(hook(name)) for name, part in inner(model).named_modules() if name]
    training = {part: part.training for part in model.modules()}
    try:
        with torch.no_grad():
            logits: Tensor = model.eval()(images.to(next(model.parameters(), images).device))
    finally:
        for part, was_training in training.items():
            part.training = was_training
        for registered in hooks:
            registered.remove()
    return found, logits


def feature_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The maps, (n, C, H, W), that the model's outermost layers give of these images, in the order they are made.

    A layer within another that gives a map itself is not listed.
    """
    passes, _ = passes_by_layer(model, images)
    found = {layer: kept for layer, made in passes.items() if (kept := _as_form(made.output, "map")) is not None}

    def is_inside(layer: str) -> bool:
        parts = layer.split(".")
        return any(".".join(parts[:depth]) in found for depth in range(1, len(parts)))

    return {layer: kept for layer, kept in found.items() if not is_inside(layer)}


def _as_form(output: object, form: Form) -> Tensor | None:
    """The output in the form that is needed, or None if it has another.

    Tokens, (n, L, D), are a map if L is a square, or one more (the first is then the class token).
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    if form == "vector":
        return output if output.ndim == 2 else None
    if output.ndim == 3 and output.shape[2] > 1:
        n, length, width = output.shape
        if math.isqrt(length) ** 2 != length and math.isqrt(length - 1) ** 2 == length - 1:
            output, length = output[:, 1:], length - 1
        side = math.isqrt(length)
        return output.transpose(1, 2).reshape(n, width, side, side) if side > 1 and side**2 == length else None
    return output if output.ndim == 4 and min(output.shape[2:]) > 1 else None


def _head(passes: Mapping[str, Pass], logits: Tensor, model: nn.Module) -> str:
    """The linear layer whose output are the logits, or "" if there is none."""
    for layer, made in reversed(list(passes.items())):
        output = made.output if isinstance(model.get_submodule(layer), nn.Linear) else None
        if isinstance(output, Tensor) and output.shape == logits.shape and torch.equal(output, logits):
            return layer
    return ""


def _last_map(fitting: Mapping[str, Tensor], passes: Mapping[str, Pass]) -> str:
    """The last layer with a feature map that is not inside one whose own output is something else."""

    def is_inside(layer: str) -> bool:
        parts = layer.split(".")
        above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        return any(n in passes and isinstance(passes[n].output, Tensor) and n not in fitting for n in above)

    return next((layer for layer in reversed(list(fitting)) if not is_inside(layer)), "")
