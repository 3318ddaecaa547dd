"""Distillation by what happens inside the networks: FitNets, attention transfer, RKD, CRD.

Each is a pure loss of a student's and a teacher's features; `attach` finds the layers and joins the loss to a student
as an objective for `fit`: cross-entropy on the labels + weight · loss. The teacher sees every augmented view.
Defaults are those of RepDistiller (Tian et al. 2020), whose schedule has 240 epochs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from stillproof.core.distillation import Batch
from stillproof.core.images import ImageSet, as_float
from stillproof.core.noise import Noise, derive
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError

Form = Literal["map", "vector"]
"""Features with places, (n, C, H, W); or one vector an image, (n, D)."""


def attention_maps(features: Tensor) -> Tensor:
    """Where a feature map is active: the mean square over its channels, (n, C, H, W) -> (n, H·W), of unit length."""
    return F.normalize(features.pow(2).mean(dim=1).flatten(1))


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square difference of the attention maps. student, teacher: (n, C, H, W), of any channels and sizes.

    Source: Zagoruyko & Komodakis 2017, arXiv 1612.03928.
    """
    side = min(student.shape[-1], teacher.shape[-1])
    maps = [attention_maps(F.adaptive_avg_pool2d(features, side)) for features in (student, teacher)]
    return (maps[0] - maps[1]).pow(2).mean()


def distances(features: Tensor) -> Tensor:
    """Euclidean distances between all rows, (n, n), in units of their mean. features: (n, D)."""
    squares = features.pow(2).sum(dim=1)
    between = (squares[:, None] + squares[None] - 2 * features @ features.T).clamp(min=1e-12).sqrt()
    between = between * (1 - torch.eye(len(features), device=features.device))
    return between / between[between > 0].mean()


def angles(features: Tensor) -> Tensor:
    """Cosines of the angles of all triples of rows, (n, n, n). features: (n, D)."""
    towards = F.normalize(features[None] - features[:, None], dim=2)
    return towards @ towards.transpose(1, 2)


def relational(student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float) -> Tensor:
    """Smooth L1 between the distances, and between the angles, that the images of a batch have to one another.

    student, teacher: (n, D), of any D. Source: Park et al. 2019, arXiv 1904.05068.
    """
    far = F.smooth_l1_loss(distances(student), distances(teacher))
    turned = F.smooth_l1_loss(angles(student), angles(teacher))
    return distance_weight * far + angle_weight * turned


def contrast(scores: Tensor, negatives: int, n: int) -> Tensor:
    """NCE: the loss of telling the positive (column 0) from the negatives. scores: (b, 1 + negatives), above 0.

    n: the images in all, each as likely as any to be drawn. Source: Tian et al. 2020, arXiv 1910.10699, eq. 18.
    """
    noise = negatives / n
    positive = scores[:, 0] / (scores[:, 0] + noise + 1e-7)
    negative = noise / (scores[:, 1:] + noise + 1e-7)
    return -(positive.log().sum() + negative.log().sum()) / len(scores)


@dataclass(frozen=True, kw_only=True)
class FeatureObjective(ABC):
    """What is common to distillation by features."""

    weight: float
    """Of the loss; the cross-entropy has 1."""
    student_layer: str = ""
    """Names of modules, joined by commas; empty: the last one with features of the form that is needed."""
    teacher_layer: str = ""

    def __post_init__(self) -> None:
        if self.weight < 0 or len(self.student_layer.split(",")) != len(self.teacher_layer.split(",")):
            raise InputError(
                f"weight={self.weight:g}, student_layer={self.student_layer}, teacher_layer={self.teacher_layer} "
                "cannot be distilled with.",
                "The weight is 0 or more, and each layer of the student has one of the teacher.",
            )

    @property
    @abstractmethod
    def form(self) -> Form:
        """The features that are needed."""

    @abstractmethod
    def loss(self, student: Tensor, teacher: Tensor, images: int) -> FeatureLoss:
        """The loss between two layers, of which these are features of some images, out of so many in all."""

    @contextmanager
    def attach(
        self, student: nn.Module, teacher: nn.Module, images: ImageSet, runtime: Runtime, seed: int
    ) -> Iterator[Attached]:
        """The objective of this student and this teacher, on these images. Raises InputError for unknown layers."""
        probe = as_float(images.images[: min(len(images), 4)])
        watched = [
            [Watched(model, layer, self.form, probe, who) for layer in layers.split(",")]
            for model, layers, who in (
                (student, self.student_layer, "student_layer"),
                (teacher, self.teacher_layer, "teacher_layer"),
            )
        ]
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(seed, "feature distillation"))
                losses = [self.loss(a.first, b.first, len(images)) for a, b in zip(*watched, strict=True)]
            yield Attached(teacher, losses, watched[0], watched[1], self.weight, runtime)
        finally:
            for layer in (*watched[0], *watched[1]):
                layer.remove()

    def __str__(self) -> str:
        return f"{type(self).__name__}, weight {self.weight:g}"


class FeatureLoss(nn.Module, ABC):
    """(student's features, teacher's features, batch) -> a scalar. May have parameters, which are trained too."""

    @abstractmethod
    def forward(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor: ...


class Watched:
    """A layer whose latest output is kept while the model runs."""

    def __init__(self, model: nn.Module, name: str, form: Form, probe: Tensor, who: str) -> None:
        self._form = form
        outputs = outputs_by_layer(model, probe)
        fitting = {layer: found for layer, output in outputs.items() if (found := _as_form(output, form)) is not None}
        if not name and form == "vector":  # what the last linear layer reads is no longer logits
            linear = [layer for layer in outputs if isinstance(model.get_submodule(layer), nn.Linear)]
            before = list(outputs)[: list(outputs).index(linear[-1])] if linear else list(outputs)
            fitting = {layer: found for layer, found in fitting.items() if layer in before}
        chosen = name or (list(fitting)[-1] if fitting else "")
        if chosen not in fitting:
            listed = "\n".join(f"{layer}: {'×'.join(map(str, found.shape[1:]))}" for layer, found in fitting.items())
            wanted = "a feature map, (n, C, H, W)" if form == "map" else "one vector an image, (n, D)"
            raise InputError(
                f"{who}={name}: there is no layer of that name that gives {wanted}.",
                f"It has these:\n{listed}" if listed else "It has none: use an objective on logits.",
            )
        self.first = fitting[chosen]
        self._latest: Tensor | None = None
        self._hook = model.get_submodule(chosen).register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: object) -> None:
        self._latest = _as_form(output, self._form)

    def take(self) -> Tensor:
        """The features of the last pass, float32."""
        if self._latest is None:
            raise InputError("a watched layer did not run.", "Name a layer that every forward pass goes through.")
        latest, self._latest = self._latest.float(), None
        return latest

    def remove(self) -> None:
        """Stop watching."""
        self._hook.remove()


def outputs_by_layer(model: nn.Module, images: Tensor) -> dict[str, object]:
    """What each named module returns for these images, in the order in which they finish; eval mode, no gradient."""
    found: dict[str, object] = {}
    hooks = [
        part.register_forward_hook(lambda _m, _i, output, name=name: found.__setitem__(name, output))
        for name, part in model.named_modules()
        if name
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(images.to(next(model.parameters()).device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


def _as_form(output: object, form: Form) -> Tensor | None:
    """The output in the form that is needed, or None if it has another. Tokens, (n, L, D), are a map if L is square."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    if form == "vector":
        return output if output.ndim == 2 else None
    if output.ndim == 3 and math.isqrt(output.shape[1]) ** 2 == output.shape[1]:
        n, length, width = output.shape
        return output.transpose(1, 2).reshape(n, width, math.isqrt(length), math.isqrt(length))
    return output if output.ndim == 4 and output.shape[-1] > 1 else None


class Attached(nn.Module):
    """Cross-entropy on the labels + weight · the losses between the watched layers: an objective for `fit`."""

    def __init__(
        self,
        teacher: nn.Module,
        losses: list[FeatureLoss],
        student_layers: list[Watched],
        teacher_layers: list[Watched],
        weight: float,
        runtime: Runtime,
    ) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.losses = nn.ModuleList(losses)
        self._layers = (student_layers, teacher_layers)
        self._weight, self._runtime = weight, runtime

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch."""
        with torch.no_grad(), self._runtime.autocast():
            self.teacher(batch.images)
        total = F.cross_entropy(student(batch.images), batch.known_labels())
        for loss, seen, taught in zip(self.losses, *self._layers, strict=True):
            total = total + self._weight * loss(seen.take(), taught.take(), batch)
        return total


@dataclass(frozen=True, kw_only=True)
class FitNets(FeatureObjective):
    """Mean square error between the teacher's features and the student's through a 1×1 convolution that is trained.

    One stage, as RepDistiller does it; the paper first trains the hint alone. Romero et al. 2015, arXiv 1412.6550.
    """

    weight: float = 100.0

    @property
    def form(self) -> Form:
        return "map"

    @override
    def loss(self, student: Tensor, teacher: Tensor, images: int) -> FeatureLoss:
        return _Hint(student.shape[1], teacher.shape[1])


class _Hint(FeatureLoss):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.regressor = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    @override
    def forward(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        side = min(student.shape[-1], teacher.shape[-1])
        guess = self.regressor(F.adaptive_avg_pool2d(student, side))
        return F.mse_loss(guess, F.adaptive_avg_pool2d(teacher, side))


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer(FeatureObjective):
    """The student looks where the teacher looks: `attention_transfer`."""

    weight: float = 1000.0

    @property
    def form(self) -> Form:
        return "map"

    @override
    def loss(self, student: Tensor, teacher: Tensor, images: int) -> FeatureLoss:
        return _Attention()


class _Attention(FeatureLoss):
    @override
    def forward(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        return attention_transfer(student, teacher)


@dataclass(frozen=True, kw_only=True)
class RKD(FeatureObjective):
    """Relational distillation: distances and angles between the images of a batch (`relational`)."""

    weight: float = 1.0
    distance_weight: float = 25.0
    angle_weight: float = 50.0

    @property
    def form(self) -> Form:
        return "vector"

    @override
    def loss(self, student: Tensor, teacher: Tensor, images: int) -> FeatureLoss:
        return _Relational(self.distance_weight, self.angle_weight)


class _Relational(FeatureLoss):
    def __init__(self, distance_weight: float, angle_weight: float) -> None:
        super().__init__()
        self.weights = (distance_weight, angle_weight)

    @override
    def forward(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        return relational(student, teacher, *self.weights)


@dataclass(frozen=True, kw_only=True)
class CRD(FeatureObjective):
    """Contrastive representation distillation: the student's embedding of an image is to be told from others' by the
    teacher's, and the other way round, against a memory of all images' embeddings.

    The negatives of a step are shared by the images of its batch (the reference draws them for each, at many times the
    work). Source: Tian et al. 2020, arXiv 1910.10699.
    """

    weight: float = 0.8
    negatives: int = 16384
    temperature: float = 0.07
    momentum: float = 0.5
    width: int = 128
    """Of the embeddings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives < 1 or self.temperature <= 0 or not 0 <= self.momentum < 1 or self.width < 1:
            raise InputError(
                f"negatives={self.negatives}, temperature={self.temperature:g}, momentum={self.momentum:g}, "
                f"width={self.width} is no CRD.",
                "One negative or more, a temperature above 0, a momentum in [0, 1), a width of 1 or more.",
            )

    @property
    def form(self) -> Form:
        return "vector"

    @override
    def loss(self, student: Tensor, teacher: Tensor, images: int) -> FeatureLoss:
        return _Contrast(self, student.shape[1], teacher.shape[1], images)


class _Contrast(FeatureLoss):
    memories: Tensor
    scales: Tensor

    def __init__(self, settings: CRD, student: int, teacher: int, images: int) -> None:
        super().__init__()
        self.settings, self.images = settings, images
        self.embed = nn.ModuleList([nn.Linear(student, settings.width), nn.Linear(teacher, settings.width)])
        bound = 1 / math.sqrt(settings.width / 3)
        self.register_buffer("memories", torch.empty(2, images, settings.width).uniform_(-bound, bound))
        self.register_buffer("scales", torch.zeros(2))
        """Normalisation constants, set by the first batch."""

    @override
    def forward(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        embedded = [F.normalize(layer(f)) for layer, f in zip(self.embed, (student, teacher), strict=True)]
        everyone = torch.zeros(1, dtype=torch.int64, device=batch.index.device)
        draw = Noise(batch.noise.seed, everyone, batch.noise.step)
        others = draw.integers(0, self.images, (self.settings.negatives,), stream="negatives")[0]
        total = torch.zeros((), device=student.device)
        for side in (0, 1):
            remembered = self.memories[1 - side]
            positive = (embedded[side] * remembered[batch.index]).sum(dim=1, keepdim=True)
            scores = torch.cat([positive, embedded[side] @ remembered[others].T], dim=1)
            likelihood = (scores / self.settings.temperature).exp()
            first = likelihood.detach().mean() * self.images
            self.scales[side] = torch.where(self.scales[side] == 0, first, self.scales[side])
            total = total + contrast(likelihood / self.scales[side].clone(), len(others), self.images)
        with torch.no_grad():
            for memory, latest in zip(self.memories, embedded, strict=True):
                kept = self.settings.momentum
                memory[batch.index] = F.normalize(kept * memory[batch.index] + (1 - kept) * latest)
        return total
