"""Weights in files: read as plain tensors alone, strictly; written so that they say which model they are of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from stillproof.core.files import write_atomically
from stillproof.core.spec import Spec
from stillproof.errors import InputError, reason

SPEC_KEY, SHAPE_KEY, CLASSES_KEY = "stillproof.model", "stillproof.shape", "stillproof.classes"

CALIBRATION_KEY = "stillproof.calibration"
"""A tensor beside the weights, uint8, (n, C, H, W): the classifier is deployed in INT8, with ranges seen on these."""


def existing(path: Path) -> Path:
    """The path of a file that is there. Raises InputError."""
    if not path.is_file():
        raise InputError(f"there is no file {path}.", "Check the path of the weights.")
    return path


def spec_of_file(path: Path) -> Spec:
    """The model SPEC that a .safetensors says it holds. Raises InputError."""
    metadata = _metadata(path)
    if SPEC_KEY not in metadata:
        raise InputError(f"{path} does not say which model it holds.", f"Write zoo:NAME?weights={path}.")
    spec = Spec.parse(metadata[SPEC_KEY]).without("weights")
    if spec.scheme != "zoo":  # a file does not get to name code that runs
        raise InputError(
            f"{path} says that it holds {spec.name!r}, which is not a model of the zoo.",
            f"If you trust it, write {spec.name}?weights={path}.",
        )
    return spec


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(existing(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}", "Is it truncated?") from None


def load_weights(model: nn.Module, path: Path) -> Tensor | None:
    """Load a state dict (.safetensors; .pt and .pth only as plain tensors) into a model, strictly.

    Hands back the images that a classifier in INT8 was calibrated on, uint8, where the file holds them.
    """
    state, calibration = _read(path)
    load_state(model, state, str(path))
    return calibration


def is_calibrated(path: Path) -> bool:
    """Whether a file with weights is of a classifier that is deployed in INT8. Raises InputError."""
    return _read(path)[1] is not None


def load_body(model: nn.Module, path: Path) -> None:
    """As `load_weights`, but a last layer for another number of classes stays as it is in the model."""
    state, own = _read(path)[0], model.state_dict()
    last = next(reversed(own), "").rpartition(".")[0]
    differ = [name for name, value in state.items() if name in own and own[name].shape != value.shape]
    if all(name.rpartition(".")[0] == last and own[name].shape[1:] == state[name].shape[1:] for name in differ):
        state |= {name: own[name] for name in differ}
    load_state(model, state, str(path))


def _read(path: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    """A state dict, and the images beside it that a classifier in INT8 was calibrated on. Raises InputError."""
    existing(path)
    state: Mapping[str, Any]
    if path.suffix == ".safetensors":
        _metadata(path)
        try:
            state = safetensors.torch.load_file(path)
        except Exception as error:  # a type of number that torch lacks, for one
            raise InputError(f"{path} cannot be read: {reason(error)}", "Save plain float tensors.") from None
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can fail in any way
            raise InputError(
                f"{path} does not load as plain tensors ({type(error).__name__}).",
                "It holds more than a state dict, or it is damaged; nothing in it was executed.\n"
                "Save model.state_dict() alone, best with safetensors.",
            ) from None
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise InputError(f"{path} holds no state dict.", "Save model.state_dict() alone.")
    calibration = state.get(CALIBRATION_KEY)
    if calibration is not None and (calibration.dtype != torch.uint8 or calibration.ndim != 4 or not len(calibration)):
        raise InputError(f"{path} is calibrated on what are no images.", "Write it again with stillproof.")
    return {name: value for name, value in state.items() if name != CALIBRATION_KEY}, calibration


def state_digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, with their names, in hex."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            plain = value.detach().cpu().contiguous().flatten()
            found.update(plain.view(torch.uint8).numpy().tobytes() if len(plain) else b"")
        else:  # get_extra_state() may return anything
            found.update(f"{name} {value!r}\n".encode())
    return found.hexdigest()


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """model.load_state_dict, strictly, with one clear InputError."""
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise InputError(
            f"the weights in {where} do not fit the model: {' '.join(lines)}",
            "Is it the same architecture, width, image size and number of classes?",
        ) from None


def save_classifier(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    spec: str,
    shape: tuple[int, ...],
    classes: Sequence[str],
    calibration: Tensor | None = None,
) -> None:
    """Write weights as safetensors; the file says which model it holds, for what. Raises StoreError.

    calibration: of a classifier that is deployed in INT8.
    """
    metadata = {SPEC_KEY: spec, SHAPE_KEY: json.dumps(shape), CLASSES_KEY: json.dumps(list(classes))}
    beside = {} if calibration is None else {CALIBRATION_KEY: calibration}
    plain = {name: value.detach().contiguous().clone() for name, value in {**state, **beside}.items()}
    write_atomically(path, safetensors.torch.save(plain, metadata))
