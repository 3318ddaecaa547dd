"""Making a classifier smaller without another architecture: pruning, and INT8 (torchao, extra `quant`)."""

from __future__ import annotations

import logging
import warnings
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stillproof.core.adapters import Adapter
from stillproof.core.images import as_float
from stillproof.errors import InputError

CALIBRATED_ON = 64
"""Images that the ranges of activations are taken from."""


QUIET = ("torchao", "torch.utils._pytree", "torch.export", "torch._export", "torch.fx")
"""What warns, when torchao is imported, of kernels for other devices, and prints graphs that it cannot export."""


class Compression(Protocol):
    """A frozen dataclass: what is done to a copy of the teacher before it is tuned, and after."""

    quantises: ClassVar[bool]
    """Whether what is deployed is the tuned classifier in INT8."""

    @property
    def title(self) -> str:
        """How a report calls it."""

    def begin(self, model: nn.Module) -> None:
        """Before tuning, in place. Raises InputError where the model has nothing to compress."""

    def end(self, model: nn.Module) -> None:
        """After it, in place: the state dict has the names that it had."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    """The smallest weights of all convolutions and linear layers together are 0, and stay 0 while the rest is tuned.

    share: of the weights. Source: Han et al. 2015, arXiv 1506.02626.
    """

    share: float = 0.8

    quantises: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(f"a share of {self.share:g} cannot be pruned.", "Give a share between 0 and 1.")

    @property
    def title(self) -> str:
        return f"pruned by {self.share:.0%}"

    def begin(self, model: nn.Module) -> None:
        layers = [layer for layer in _layers(model) if "weight" in layer._parameters]
        if not layers:
            raise InputError("the teacher has no convolution or linear layer to prune.", "Compress another model.")
        sizes = torch.cat([layer.get_parameter("weight").detach().abs().flatten() for layer in layers])
        rank = max(1, min(len(sizes), round(self.share * len(sizes))))
        largest_gone = sizes.kthvalue(rank).values
        for layer in layers:
            kept = layer.get_parameter("weight").detach().abs() > largest_gone
            parametrize.register_parametrization(layer, "weight", _Kept(kept))

    def end(self, model: nn.Module) -> None:
        for layer in _layers(model):
            if parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], _Kept):  # type: ignore[union-attr, index]
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Tuned as it is, then quantised: weights by channel, activations by tensor, with ranges seen on transfer images.

    Convolutions and linear layers compute on the grid of 8 bits (torchao's PT2E, the x86 back end's rules).
    """

    quantises: ClassVar[bool] = True

    @property
    def title(self) -> str:
        return "INT8"

    def begin(self, model: nn.Module) -> None:  # noqa: ARG002
        _pt2e()  # what is missing is told before the tuning

    def end(self, model: nn.Module) -> None:
        pass


def _layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


class _Kept(nn.Module):
    """A weight, less what was pruned. torch's own pruning sets weights in a hook of their layer's call, and attention
    reads those of its last layer without calling it."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        """kept: bool, of the weight's shape."""
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.kept, weight, torch.zeros_like(weight))


class Quantised(Adapter):
    """A classifier in INT8. Gradients with respect to its images are those of the model that it was made of.

    It has no other mode than eval, and its weights get no gradient. Straight through: a scanner or an attacker who
    holds the artefact holds these weights too.
    """

    def __init__(self, model: nn.Module, calibration: Tensor) -> None:
        """calibration: uint8, (n, C, H, W). Raises InputError where it cannot be quantised."""
        super().__init__(model)
        self.calibration = calibration
        # of a copy, for the graph stays on the CPU; and no submodule, for an exported one refuses eval()
        self._graph = (_quantised(deepcopy(model).cpu(), as_float(calibration)),)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits, (N, K)."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # the rules are those of a CPU
            logits: Tensor = self._graph[0](images.detach().float().cpu().contiguous())
        answered = logits.to(images.device)
        if not (torch.is_grad_enabled() and images.requires_grad):
            return answered
        through: Tensor = self.model(images)
        return through + (answered - through).detach()

    def __deepcopy__(self, known: dict[int, Any]) -> Quantised:
        """The graph, which nothing changes, is shared: it cannot be copied."""
        copy = Quantised.__new__(Quantised)
        nn.Module.__init__(copy)
        copy.model, copy.calibration, copy._graph = deepcopy(self.model, known), self.calibration, self._graph
        copy.train(self.training)
        return copy


def calibration_of(classifier: nn.Module) -> Tensor | None:
    """The images, uint8, that set the ranges of a classifier in INT8, whatever is around it; None of any other."""
    while isinstance(classifier, Adapter):
        if isinstance(classifier, Quantised):
            return classifier.calibration
        classifier = classifier.model
    return None


def _quantised(model: nn.Module, calibration: Tensor) -> nn.Module:
    prepare, convert, quantiser = _pt2e()
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(model.eval(), (calibration,), dynamic_shapes=({0: batch},)).module()
            watched = prepare(exported, quantiser)
            watched(calibration)
            found: nn.Module = convert(watched)
        except Exception as error:  # export refuses models in many ways
            reason = str(error).splitlines()[0] if str(error) else ""
            raise InputError(
                f"the classifier cannot be exported for INT8: {type(error).__name__}: {reason}",
                "torch.export must be able to trace its forward(); or prune it instead.",
            ) from error
    return found


def _pt2e() -> tuple[Any, Any, Any]:
    """torchao's prepare and convert, and the quantiser. Raises InputError where it is not there."""
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():  # of what torch deprecates and torchao uses
            warnings.simplefilter("ignore")
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except Exception as error:  # with a torch of another version it raises more than ImportError
        raise InputError(
            f"INT8 needs torchao: {type(error).__name__}: {error}",
            "Install the extra: pip install 'stillproof[quant]'.",
        ) from error
    quantiser = x86.X86InductorQuantizer()
    quantiser.set_global(x86.get_default_x86_inductor_quantization_config())
    return prepare_pt2e, convert_pt2e, quantiser
