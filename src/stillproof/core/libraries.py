"""Models of other libraries, by name: transformers (`hf:`), timm and torchvision.

They are reached through a SPEC alone, inside the function: with some builds of torch they cannot even be imported.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from torch import nn

from stillproof.core.adapters import Answered, Prepared
from stillproof.core.spec import Spec, file_digest
from stillproof.errors import InputError, StillproofError, reason

Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation, per channel."""

Library = Literal["hf", "timm", "torchvision"]

PACKAGES: Mapping[str, str] = {"hf": "transformers", "timm": "timm", "torchvision": "torchvision"}

MOST_PIXELS = 4096
"""The largest side that images are scaled to."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""With these torchvision's weights were trained."""


def hf(
    name: str,
    *,
    channels: int,
    classes: int,
    new_head: bool = False,
    pretrained: bool = True,
    resize: int = 0,
    mean: str = "",
    std: str = "",
) -> nn.Module:
    """A model for image classification from the hub, or from a directory that save_pretrained wrote.

    Only safetensors are read, and none of the repository's code is run. Images are normalised as its
    preprocessor_config.json says, or by mean, std (per channel, joined by commas), and scaled to the size in its
    configuration, or to `resize`. With pretrained=false its architecture gets fresh weights for these classes.
    new_head: the last layer is drawn anew where it is for another number of classes.
    """
    transformers = _imported("hf")
    name = str(Path(name).expanduser())
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    transformers.utils.logging.disable_progress_bar()
    automatic = transformers.AutoModelForImageClassification
    try:
        if pretrained:
            made, told = automatic.from_pretrained(
                name,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **({"num_labels": classes, "ignore_mismatched_sizes": True} if new_head else {}),
            )
            absent = [*told["missing_keys"], *([] if new_head else told["mismatched_keys"])]
            if absent:
                raise InputError(
                    f"hf:{name} lacks {len(absent)} of its weights, {absent[0]} for one.",
                    "Is it a classifier, and complete? With ?pretrained=false it is an architecture to be trained.",
                )
        else:
            config = transformers.AutoConfig.from_pretrained(name, num_labels=classes, trust_remote_code=False)
            config.num_channels = channels
            made = automatic.from_config(config, trust_remote_code=False)
    except StillproofError:
        raise
    except Exception as error:  # the hub, the cache and the files each have their own
        raise _unreadable(f"hf:{name}", error) from None
    told = _preprocessing(transformers, name) if pretrained else {}
    given = _pair(mean, std, channels) or _normalisation(told, channels)
    if pretrained and None in given:
        raise InputError(
            f"hf:{name} does not say how its images are normalised.", "Add ?mean=.5,.5,.5&std=.5,.5,.5 as it was."
        )
    middle = ((0.5,) * channels, (0.25,) * channels)
    size = (
        resize or _size_of(getattr(made.config, "image_size", 0)) or _size_of(told.get("crop_size") or told.get("size"))
    )
    return _prepared(Answered(made.float()), size, *(given if pretrained or None not in given else middle))


def timm(
    name: str,
    *,
    channels: int,
    classes: int,
    new_head: bool = False,
    pretrained: bool = False,
    resize: int = 0,
    mean: str = "",
    std: str = "",
) -> nn.Module:
    """A model of timm; with pretrained=true its weights are fetched, for the classes that they know (new_head: for
    these).

    Images are scaled to the size it was made for, or to `resize`, and normalised as timm says, or by mean, std.
    """
    library = _imported("timm")
    try:
        sized = {} if pretrained and not new_head else {"num_classes": classes}
        made = library.create_model(name, pretrained=pretrained, in_chans=channels, **sized)
    except Exception as error:
        raise _unreadable(f"timm:{name}", error) from None
    told = made.pretrained_cfg
    given = _pair(mean, std, channels) or _for_channels(told["mean"], told["std"], channels)
    return _prepared(made, resize or int(told["input_size"][-1]), *given)


def torchvision(
    name: str,
    *,
    channels: int,
    classes: int,
    new_head: bool = False,
    pretrained: bool = False,
    resize: int = 0,
    mean: str = "",
    std: str = "",
) -> nn.Module:
    """A model of torchvision; with pretrained=true its default weights are fetched, for the classes that they know.
    It has no new_head.

    Images are scaled to `resize`, if given, and normalised as ImageNet is, or by mean, std.
    """
    library = _imported("torchvision")
    if channels != 3:
        raise InputError(f"torchvision:{name} takes 3 channels, not {channels}.", "Use a model of the zoo.")
    try:
        if new_head and pretrained:
            raise InputError(
                f"torchvision:{name} keeps the classes of its weights: a training cannot begin with them.",
                "Take timm:NAME?pretrained=true, or pretrained=false.",
            )
        sized = {"weights": "DEFAULT"} if pretrained else {"weights": None, "num_classes": classes}
        made = library.models.get_model(name, **sized)
    except Exception as error:
        raise _unreadable(f"torchvision:{name}", error) from None
    return _prepared(made, resize, *(_pair(mean, std, channels) or (IMAGENET_MEAN, IMAGENET_STD)))


BUILDERS: Mapping[str, Callable[..., nn.Module]] = {"hf": hf, "timm": timm, "torchvision": torchvision}


def is_library(spec: Spec) -> bool:
    """Whether a SPEC names a model of one of these libraries."""
    return spec.scheme in BUILDERS


def brings_weights(spec: Spec) -> bool:
    """Whether a library's model comes trained: `hf:` does unless told otherwise, the others do where asked to."""
    return spec.options.get("pretrained", str(spec.scheme == "hf")).lower() in ("true", "1", "yes", "on")


def library_identity(spec: Spec) -> dict[str, str]:
    """What changes whenever the model may: the library's version, and the files of a local directory."""
    try:
        known = {"library": version(PACKAGES[spec.scheme])}
    except PackageNotFoundError:
        known = {"library": "none"}
    folder = Path(spec.name.removeprefix("hf:")).expanduser()
    if spec.scheme == "hf" and folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
        known["files"] = " ".join(f"{file.name} {file_digest(file)}" for file in files)
    return known


def _imported(library: Library) -> Any:
    package = PACKAGES[library]
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise _broken(package, error) from None
        advice = "pip install 'stillproof[hf]'" if library == "hf" else f"pip install {package}"
        raise InputError(f"{library}: models need the package {package}, which is not installed.", advice) from None
    except Exception as error:
        raise _broken(package, error) from None


def _broken(package: str, error: Exception) -> InputError:
    import torch

    return InputError(
        f"{package} is installed and cannot be imported: {type(error).__name__}: {reason(error)}",
        f"It was likely built for another torch than the {torch.__version__} here: install the torchvision that\n"
        "belongs to it, of the same build (CPU or CUDA). Or use zoo:resnet18, or package.module:factory.",
    )


def _unreadable(what: str, error: Exception) -> InputError:
    return InputError(
        f"the model {what} cannot be had: {reason(error)}", "Is the name right, and what it needs installed?"
    )


def _preprocessing(transformers: Any, name: str) -> dict[str, Any]:
    try:
        reader = transformers.image_processing_utils.ImageProcessingMixin
        told: dict[str, Any] = reader.get_image_processor_dict(name)[0]
    except Exception:  # there is none, or it cannot be read: the user is asked instead
        return {}
    return told


def _size_of(told: Any) -> int:
    """The side in one of the forms that configurations have it in; 0 if it is not a square's."""
    if isinstance(told, Mapping):
        told = told.get("height") or told.get("shortest_edge")
    if isinstance(told, list | tuple):
        told = told[0] if told and all(side == told[0] for side in told) else 0
    return told if isinstance(told, int) else 0


def _normalisation(told: Mapping[str, Any], channels: int) -> tuple[Any, Any]:
    """Mean and standard deviation of pixels in [0, 1], as a preprocessor's configuration means them."""
    scale = 255 * float(told.get("rescale_factor", 1 / 255)) if told.get("do_rescale", True) else 255.0
    if told and not told.get("do_normalize", True):
        return (0.0,) * channels, (1 / scale,) * channels
    mean, std = told.get("image_mean"), told.get("image_std")
    if mean is None or std is None:
        return None, None
    return [value / scale for value in mean], [value / scale for value in std]


def _pair(mean: str, std: str, channels: int) -> Statistics | None:
    if not mean and not std:
        return None
    try:
        found = [[float(part) for part in text.split(",")] for text in (mean, std)]
    except ValueError:
        found = [[], []]
    if any(len(part) != channels for part in found):
        raise InputError(f"mean={mean} and std={std} are not {channels} numbers each.", "Write mean=.49,.48,.45")
    return found[0], found[1]


def _for_channels(mean: Sequence[float], std: Sequence[float], channels: int) -> Statistics:
    """Of a colour model that was made for grey images: the mean over its channels."""
    if len(mean) == channels:
        return mean, std
    return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels


def _prepared(model: nn.Module, size: int, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    if not 0 <= size <= MOST_PIXELS:
        raise InputError(f"images cannot be scaled to {size}×{size}.", f"Use resize=1 to {MOST_PIXELS}.")
    return Prepared(model, size=size, mean=mean, std=std)
