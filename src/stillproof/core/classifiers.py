"""A model SPEC -> a classifier: images in [0, 1] in, logits out. What it is, is looked at, not assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from stillproof.core.adapters import Answered, FromProbabilities, inner
from stillproof.core.compression import CALIBRATED_ON, Quantised
from stillproof.core.images import ImageSet, as_float, batches, check_range
from stillproof.core.libraries import BUILDERS, brings_weights, is_library, library_identity
from stillproof.core.noise import derive
from stillproof.core.plugins import (
    build,
    call_with_options,
    code_identity,
    factory_of,
    plugin_identity,
    read_options,
    table,
    user_code,
)
from stillproof.core.runtime import Runtime
from stillproof.core.sources.source import Opened
from stillproof.core.spec import Spec, file_digest, local_path
from stillproof.core.weights import existing, is_calibrated, load_body, load_weights, spec_of_file, state_digest
from stillproof.errors import InputError, nearest

Outputs = Literal["logits", "probabilities", "log-probabilities"]


@dataclass(frozen=True, slots=True)
class DoorFacts:
    """What a look at the classifier showed; each verb decides what it refuses."""

    classes: int
    finite: bool
    hides: bool
    """Whether it answers with −inf, and with nothing else that is not finite."""
    outputs: Outputs
    deterministic: bool
    differentiable: bool


@dataclass(frozen=True, slots=True)
class Model:
    """A model SPEC: `zoo:NAME`, `package.module:factory`, `hf:`, `timm:` or `torchvision:NAME`, each with
    `weights=FILE` or without, or the path of a .safetensors that Stillproof wrote (it says which model it holds)."""

    text: str

    @property
    def is_trained(self) -> bool:
        """Whether it brings its own weights; without, it is trained first."""
        spec = Spec.parse(self.text)
        return self._weights is not None or spec.runs_code or (is_library(spec) and brings_weights(spec))

    @property
    def has_weights(self) -> bool:
        """Whether it names a file with weights."""
        return self._weights is not None

    @property
    def is_pretrained(self) -> bool:
        """Whether a training that may begin with the weights of this model finds some: a file's, or a library's."""
        spec = Spec.parse(self.text)
        return self.has_weights or (is_library(spec) and brings_weights(spec))

    @property
    def is_quantised(self) -> bool:
        """Whether it is deployed in INT8. Raises InputError."""
        return self._weights is not None and is_calibrated(self._weights)

    @property
    def architecture(self) -> Spec:
        """The SPEC without its weights. Raises InputError."""
        spec = Spec.parse(self.text)
        if _is_weights(spec) and spec.options:
            raise InputError(f"{spec!s}: a file with weights takes no options.", "It says itself which model it holds.")
        return (spec_of_file(local_path(spec.name)) if _is_weights(spec) else spec).without("weights")

    @property
    def _weights(self) -> Path | None:
        spec = Spec.parse(self.text)
        named = spec.name if _is_weights(spec) else spec.options.get("weights")
        return None if named is None else local_path(named)

    @property
    def untrained(self) -> Model:
        """The same architecture without weights."""
        spec = self.architecture
        return Model(str(spec.with_option("pretrained", "false") if is_library(spec) else spec))

    @property
    def code(self) -> str | None:
        """The SPEC, if building this model runs code of the user's, or reaches for another library's models."""
        return self.untrained.text if self.architecture.runs_code or is_library(self.architecture) else None

    def identity(self) -> Mapping[str, str]:
        """JSON that changes whenever the classifier does: part of the keys of its stages.

        Raises InputError for a name or an option that does not exist, and for a missing file.
        """
        if self.architecture.scheme == "zoo":
            name = self.architecture.name.removeprefix("zoo:")
            factory = factory_of("model", name)
            read_options(factory, self.architecture, ("channels", "size", "classes"))
        elif not self.architecture.runs_code and not is_library(self.architecture):
            raise _unknown(self.architecture)
        known = {"model": str(self.architecture)}
        if self.architecture.scheme == "zoo":
            known |= plugin_identity(factory)
        if is_library(self.architecture):
            known |= library_identity(self.architecture)
        if self._weights is not None:
            known["weights"] = file_digest(existing(self._weights))
        if self.architecture.runs_code:
            known["code"] = code_identity(self.architecture)
        return known

    def state(self, opened: Opened) -> str | None:
        """A digest of the weights that user code, or another library, brings along for these images: they are in no
        file that `identity` could name. None of any other model. Raises InputError."""
        if self.code is None or not self.is_trained:
            return None
        return state_digest(self.build(opened.train.shape, len(opened.classes)))

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """The classifier, on the CPU, in eval mode. shape: (C, H, W) of its images. Raises InputError."""
        model = _construct(self.architecture, shape, classes)
        if self._weights is not None:
            calibration = load_weights(inner(model), self._weights)
            if calibration is not None:
                _check_calibration(calibration, shape, self._weights)
                model = Quantised(model.eval(), calibration)
        return model.eval()

    def fresh(self, shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
        """The architecture with fresh weights, drawn from the seed. Raises InputError."""
        if not is_library(self.architecture):
            return reinitialise(self.untrained.build(shape, classes), seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "initial weights"))
            return self.untrained.build(shape, classes)

    def begun(self, shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
        """What a training begins with that may use the weights of this model: those, and, where they are for another
        number of classes, a last layer that is drawn from the seed. Without weights: `fresh`. Raises InputError."""
        if self._weights is not None:
            model = self.fresh(shape, classes, seed)
            load_body(inner(model), self._weights)
            return model
        if not self.is_pretrained:
            return self.fresh(shape, classes, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "initial weights"))
            return _construct(self.architecture, shape, classes, new_head=True).eval()


def _check_calibration(calibration: Tensor, shape: tuple[int, int, int], path: Path) -> None:
    if len(calibration) > CALIBRATED_ON:
        raise InputError(
            f"{path} is calibrated on {len(calibration)} images, and no more than {CALIBRATED_ON} are needed.",
            "Write it again with stillproof.",
        )
    if tuple(calibration.shape[1:]) != shape:
        raise InputError(
            f"{path} is for images of {tuple(calibration.shape[1:])}, and these are {shape}.",
            "Give images of its kind.",
        )


def _is_weights(spec: Spec) -> bool:
    return spec.name.endswith(".safetensors")


def reinitialise(model: nn.Module, seed: int) -> nn.Module:
    """Fresh weights, drawn from the seed, in place. Raises InputError where a layer cannot be reset."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "initial weights"))
        for name, part in inner(model).named_modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
            elif any(True for _ in part.parameters(recurse=False)):
                raise InputError(
                    f"the layer {name or 'at the top'} ({type(part).__name__}) has weights of its own and no "
                    "reset_parameters(), so the model cannot be trained afresh.",
                    "Give that module a method reset_parameters().",
                )
    return model


def _construct(spec: Spec, shape: tuple[int, int, int], classes: int, *, new_head: bool = False) -> nn.Module:
    channels, height, width = shape
    if spec.scheme == "zoo":
        if height != width:
            raise InputError(
                f"zoo models take square images, not {height}×{width}.",
                "Crop or resize them first, or "
                "bring your own model with module:factory (an audit does without a twin: --twin none).",
            )
        name = spec.name.removeprefix("zoo:")
        made = build("model", spec, name, channels=channels, size=height, classes=classes)
    elif spec.runs_code:
        given = {"channels": channels, "size": height, "classes": classes}
        with torch.random.fork_rng(devices=[]):  # weights that a factory draws are the same each time
            torch.manual_seed(derive(0, "user code"))
            made = call_with_options(user_code(spec), spec, **given)
        if not isinstance(made, nn.Module):
            raise InputError(f"{spec.name} returned {type(made).__name__}.", "A factory returns a torch.nn.Module.")
        return Answered(made)
    elif is_library(spec):
        name = spec.name.removeprefix(f"{spec.scheme}:")
        made = call_with_options(
            BUILDERS[spec.scheme], spec, name=name, channels=channels, classes=classes, new_head=new_head
        )
    else:
        raise _unknown(spec)
    model: nn.Module = made
    return model


def _unknown(spec: Spec) -> InputError:
    if spec.scheme in ("http", "https"):
        return InputError(f"{spec.name} is an endpoint, and here a model is needed.", "Only audit --model asks one.")
    zoo = [f"zoo:{name}" for name in table("model")]
    forms = [*zoo, "hf:NAME", "timm:NAME", "torchvision:NAME", "package.module:factory"]
    return InputError(f"there is no model {spec.name!r}.", nearest(spec.name, forms))


def predict(model: nn.Module, images: ImageSet, runtime: Runtime, *, batch_size: int | None = None) -> Tensor:
    """Logits of every image, (N, K), float32, on the CPU; eval mode, always computed in fp32.

    batch_size: None is what suits the device.
    """
    training = model.training
    model.eval().to(runtime.device)
    try:
        with torch.inference_mode():
            parts = [
                model(as_float(images.images[rows].to(runtime.device))).float().cpu()
                for rows in batches(len(images), batch_size or runtime.images_at_once)
            ]
    finally:
        model.train(training)
    return torch.cat(parts).clone()


def look(classifier: nn.Module, images: Tensor) -> DoorFacts:
    """Look at a classifier with a few images, float32 in [0, 1], (n, C, H, W), n ≥ 2.

    Raises InputError where the images are outside [0, 1], or the output is no (n, K) float tensor.
    """
    check_range(float(images.min()), float(images.max()), "the images given to the classifier")
    classifier.eval()
    probe = images.detach().clone().requires_grad_()
    try:
        output = classifier(probe)
    except Exception as error:  # whatever the user's module raises
        raise InputError(
            f"the classifier fails on images of shape {tuple(images.shape)}: {type(error).__name__}: {error}",
            "It must take float32 images of that shape, in [0, 1].",
        ) from error
    if (
        not isinstance(output, Tensor)
        or output.ndim != 2
        or len(output) != len(images)
        or not output.is_floating_point()
    ):
        got = f"{tuple(output.shape)} of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"the classifier returns {got} for {len(images)} images.", "It must return logits, (N, K).")
    differentiable = False
    if output.requires_grad:
        (gradient,) = torch.autograd.grad(output.float().logsumexp(1).sum(), probe, allow_unused=True)
        differentiable = gradient is not None and bool(gradient.isfinite().all())
    first = output.detach().float()
    with torch.no_grad():
        again = classifier(images).float()
    return DoorFacts(
        classes=first.shape[1],
        finite=bool(first.isfinite().all()),
        hides=bool(first.isneginf().any()) and bool((first.isfinite() | first.isneginf()).all()),
        outputs=kind_of_output(output.detach()),
        deterministic=bool(torch.allclose(first, again, rtol=1e-4, atol=1e-5, equal_nan=True)),
        differentiable=differentiable,
    )


def kind_of_output(output: Tensor) -> Outputs:
    """Whether a classifier's answers, (n, K), are logits, probabilities, or the logarithms of such."""
    rounding = max(1e-5, output.shape[1] ** 0.5 * torch.finfo(output.dtype).eps)
    output = output.float()

    def are_probabilities(rows: Tensor) -> bool:
        sums = rows.sum(dim=1)
        return bool((rows >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=rounding))

    if are_probabilities(output):
        return "probabilities"
    if bool((output <= 0).all()) and are_probabilities(output.exp()):
        return "log-probabilities"
    return "logits"


def admit(model: nn.Module, images: ImageSet, what: str) -> tuple[nn.Module, DoorFacts]:
    """A classifier of these images, with probabilities turned into logits, and its facts.

    Raises InputError if its outputs are not finite or their number is not that of the classes.
    """
    facts = look(model, as_float(images.images[: min(len(images), 64)]))
    if facts.hides:
        raise InputError(
            f"{what} answers with −inf, as a guarded model does for what it hides.",
            "Give the model within. steal names its response (--defence), and audit --black-box asks it as it is.",
        )
    if not facts.finite:
        raise InputError(f"{what} returns NaN or infinite values on {images.name!r}.", "Check its weights.")
    if facts.classes != len(images.classes):
        raise InputError(
            f"{what} returns {facts.classes} classes, and {images.name!r} has {len(images.classes)}.",
            "Bring a model that was trained on these classes.",
        )
    return (FromProbabilities(model) if facts.outputs == "probabilities" else model), facts
