"""Distillation by what happens inside the networks: FitNets, attention transfer, RKD, CRD.

Each is a pure loss of a student's and a teacher's features; `attach` finds the layers and joins the loss to a student
as an objective for `fit`: cross-entropy on the labels + weight · loss. The teacher sees every augmented view.
Defaults are those of RepDistiller (Tian et al. 2020), whose schedule has 240 epochs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from stillproof.core.distillation import Batch
from stillproof.core.features import Form, Watched
from stillproof.core.images import ImageSet, as_float
from stillproof.core.noise import Noise, derive
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError

COINCIDENT = 1e-3
"""Rows nearer to each other than this share of the usual distance have no direction between them."""


def attention_maps(features: Tensor) -> Tensor:
    """Where a feature map is active: the mean square over its channels, (n, C, H, W) -> (n, H·W), of unit length."""
    return F.normalize(features.pow(2).mean(dim=1).flatten(1))


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square difference of the attention maps. student, teacher: (n, C, H, W), of any channels and sizes.

    Source: Zagoruyko & Komodakis 2017, arXiv 1612.03928.
    """
    first, second = (attention_maps(features) for features in same_size(student, teacher))
    return (first - second).pow(2).mean()


def same_size(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two feature maps, (n, C, H, W), averaged down to the smaller height and the smaller width."""
    height, width = (min(first.shape[axis], second.shape[axis]) for axis in (2, 3))
    return F.adaptive_avg_pool2d(first, (height, width)), F.adaptive_avg_pool2d(second, (height, width))


def distances(features: Tensor) -> Tensor:
    """Euclidean distances between all rows, (n, n), in units of their mean. features: (n, D)."""
    squares = features.pow(2).sum(dim=1)
    between = (squares[:, None] + squares[None] - 2 * features @ features.T).clamp(min=1e-12).sqrt()
    between = between * (1 - torch.eye(len(features), device=features.device))
    mean = between.sum() / (between > 0).sum().clamp(min=1)
    return between / mean.clamp(min=1e-12)


def angles(features: Tensor) -> Tensor:
    """Cosines of the angles of all triples of rows, (n, n, n); 0 where two rows as good as coincide. features: (n, D).

    The reference code divides by a length of near 0 there, and its gradient explodes.
    """
    between = features[None] - features[:, None]
    squares = between.pow(2).sum(dim=2, keepdim=True)
    apart = squares > COINCIDENT**2 * squares.mean()
    towards = torch.where(apart, between / torch.where(apart, squares, 1.0).sqrt(), 0.0)
    return towards @ towards.transpose(1, 2)


def relational(student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float) -> Tensor:
    """Smooth L1 between the distances, and between the angles, that the images of a batch have to one another.

    student, teacher: (n, D), of any D. Source: Park et al. 2019, arXiv 1904.05068.
    """
    far = F.smooth_l1_loss(distances(student), distances(teacher))
    turned = F.smooth_l1_loss(angles(student), angles(teacher))
    return distance_weight * far + angle_weight * turned


def contrast(log_scores: Tensor, n: int) -> Tensor:
    """NCE: the loss of telling the positive (column 0) from the m negatives. log_scores: (b, 1 + m).

    With s = exp(log_scores) and the noise m/n: −log s₀/(s₀ + m/n) − Σ log (m/n)/(sᵢ + m/n), mean over the batch.
    n: the images in all, each as likely as any to be drawn. Source: Tian et al. 2020, arXiv 1910.10699, eq. 18.
    """
    log_noise = math.log((log_scores.shape[1] - 1) / n)
    positive = F.softplus(log_noise - log_scores[:, 0])
    negative = F.softplus(log_scores[:, 1:] - log_noise)
    return (positive.sum() + negative.sum()) / len(log_scores)


@dataclass(frozen=True, kw_only=True)
class FeatureObjective(ABC):
    """What is common to distillation by features."""

    weight: float
    """Of the loss; the cross-entropy has 1."""
    student_layer: str = ""
    """Names of modules, joined by commas. Empty: the last feature map; or the vector that the last linear layer, the
    one whose output are the logits, reads."""
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
        with ExitStack() as watching:

            def watched(model: nn.Module, layers: str, who: str) -> list[Watched]:
                return [
                    watching.enter_context(Watched(model, layer, self.form, probe, who)) for layer in layers.split(",")
                ]

            seen = watched(student, self.student_layer, "student_layer")
            taught = watched(teacher, self.teacher_layer, "teacher_layer")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(seed, "feature distillation"))
                losses = [self.loss(a.first, b.first, len(images)) for a, b in zip(seen, taught, strict=True)]
            yield Attached(teacher, losses, seen, taught, self.weight, runtime)

    def __str__(self) -> str:
        return f"{type(self).__name__}, weight {self.weight:g}"


class FeatureLoss(nn.Module, ABC):
    """(student's features, teacher's features, batch) -> a scalar. May have parameters, which are trained too."""

    @abstractmethod
    def forward(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor: ...


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
        self._teacher = (runtime.place(teacher.eval().requires_grad_(False)),)  # no part of what is trained and saved
        self.losses = nn.ModuleList(losses)
        self._layers = (student_layers, teacher_layers)
        self._weight, self._runtime = weight, runtime

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch."""
        with torch.no_grad(), self._runtime.autocast():
            self._teacher[0](batch.images)
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
        return _Hint(student.shape[1], teacher.shape[1], rectified=bool((teacher >= 0).all()))


class _Hint(FeatureLoss):
    def __init__(self, inputs: int, outputs: int, *, rectified: bool) -> None:
        super().__init__()
        last = nn.ReLU() if rectified else nn.Identity()
        self.regressor = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), last)

    @override
    def forward(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        seen, taught = same_size(student, teacher)
        return F.mse_loss(self.regressor(seen), taught)


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance_weight < 0 or self.angle_weight < 0:
            raise InputError(
                f"distance_weight={self.distance_weight:g}, angle_weight={self.angle_weight:g} are no weights.",
                "They are 0 or more.",
            )

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
    log_scales: Tensor
    begun: Tensor

    def __init__(self, settings: CRD, student: int, teacher: int, images: int) -> None:
        super().__init__()
        self.settings, self.images = settings, images
        self.embed = nn.ModuleList([nn.Linear(student, settings.width), nn.Linear(teacher, settings.width)])
        bound = 1 / math.sqrt(settings.width / 3)
        self.register_buffer("memories", torch.empty(2, images, settings.width).uniform_(-bound, bound))
        self.register_buffer("log_scales", torch.zeros(2))
        """Logarithms of the normalisation constants, set by the first batch."""
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

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
            scores = torch.cat([positive, embedded[side] @ remembered[others].T], dim=1) / self.settings.temperature
            first = scores.detach().flatten().logsumexp(dim=0) + math.log(self.images / scores.numel())
            self.log_scales[side] = torch.where(self.begun, self.log_scales[side], first)
            total = total + contrast(scores - self.log_scales[side].clone(), self.images)
        with torch.no_grad():
            self.begun.fill_(True)
            for memory, latest in zip(self.memories, embedded, strict=True):
                kept = self.settings.momentum
                memory[batch.index] = F.normalize(kept * memory[batch.index] + (1 - kept) * latest)
        return total
