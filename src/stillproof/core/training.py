"""fit(): the only training loop. SGD with Nesterov momentum, OneCycle, on Lightning Fabric."""

from __future__ import annotations

import io
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillproof.core import faults
from stillproof.core.classifiers import predict
from stillproof.core.distillation import Batch, Objective
from stillproof.core.files import write_atomically
from stillproof.core.images import Augmentation, ImageSet, as_float, augmentation_for
from stillproof.core.noise import Noise, derive, permutation
from stillproof.core.optimisers import NesterovMuon
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError, StoreError, TrainingDiverged, reason

Advance = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, a note such as the loss)."""

ORTHOGONAL_DECAY = 0.01
"""Weight decay of what Muon trains: half its rate keeps a kernel's norm about that of orthonormal rows."""

CHECK_EVERY = 16
"""Steps between two looks at the loss: a look waits for the device."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. learning_rate is the peak of OneCycle; weight decay spares norms and biases.

    augmentation: None leaves it to the images (core.images.augmentation_for).
    orthogonal_rate: peak rate of Muon (core.optimisers) for the convolutions; None trains them as the rest, by SGD.
    """

    epochs: int = 12
    batch_size: int = 128
    learning_rate: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warm_up: float = 0.25
    anneal: Literal["cosine", "linear"] = "cosine"
    augmentation: Augmentation | None = None
    orthogonal_rate: float | None = None

    def __post_init__(self) -> None:
        rates = [self.learning_rate] if self.orthogonal_rate is None else [self.learning_rate, self.orthogonal_rate]
        if self.epochs < 1 or self.batch_size < 2 or min(rates) <= 0 or not 0 < self.warm_up < 1:
            raise InputError(
                f"epochs={self.epochs}, batch size {self.batch_size}, learning rates {rates}, "
                f"warm-up {self.warm_up:g} is no way to train.",
                "Use at least 1 epoch, batches of 2 or more, a positive rate, and a warm-up share in (0, 1).",
            )

    @classmethod
    def standard(cls, epochs: int) -> Recipe:
        """How victims, teachers and students are trained: small batches, Muon for the convolutions.

        Nothing in it changes what a classifier's answers give away: no label smoothing, no averaging over views.
        """
        return cls(epochs=epochs, batch_size=64, learning_rate=0.1, orthogonal_rate=0.02, warm_up=0.1, anneal="linear")

    def steps(self, n: int) -> int:
        """Optimiser steps in one epoch of n images: all are seen, in batches of nearly one size, of two or more."""
        return max(1, min(-(-n // self.batch_size), n // 2))


@dataclass(frozen=True, slots=True)
class Fit:
    """What training left. Passes of the student are counted in images; an objective may need several."""

    loss: float
    forwards: int
    backwards: int
    validation_accuracy: float | None


def fit(
    student: nn.Module,
    objective: Objective,
    images: ImageSet,
    *,
    recipe: Recipe,
    runtime: Runtime,
    seed: int,
    columns: Mapping[str, Tensor] | None = None,
    validation: ImageSet | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    advance: Advance | None = None,
) -> Fit:
    """Train `student` in place; it is left in eval mode, on the CPU, in float32.

    columns: tensors with one row an image, handed to the objective batch by batch.
    validation: scored once, after the last step; nothing is chosen by it.
    checkpoint: where to leave the state at the end of an epoch, at most every `checkpoint_seconds`; if it
    is there, training goes on from it, with the same result as if it had never stopped.
    Raises TrainingDiverged (step and objective) on a non-finite loss, InputError if columns do not fit.
    """
    for name, column in (columns or {}).items():
        if len(column) != len(images):
            raise InputError(f"the column {name!r} has {len(column)} rows for {len(images)} images.", "One row each.")
    if len(images) < 2:
        raise InputError(f"{images.name!r} has one image, and batch norm needs two to train on.", "Give more images.")
    device_kinds = [torch.device(runtime.device)] if runtime.device != "cpu" else []
    with torch.random.fork_rng(devices=device_kinds):
        torch.manual_seed(derive(seed, "fit"))
        loop = _Loop(student, objective, images, dict(columns or {}), recipe, runtime, seed)
        if checkpoint is not None and checkpoint.exists():
            loop.restore(checkpoint)
        saved = time.monotonic()
        try:
            while loop.epoch < recipe.epochs:
                loop.run_epoch(advance)
                if checkpoint is not None and time.monotonic() - saved >= checkpoint_seconds:
                    loop.save(checkpoint)
                    saved = time.monotonic()
                    faults.kill_point("training")
        finally:
            loop.counter.remove()
    if isinstance(objective, nn.Module):
        objective.eval().to("cpu")
    Runtime().place(student.eval())
    accuracy = None
    if validation is not None:
        guesses = predict(student, validation, runtime).argmax(dim=1)
        accuracy = float((guesses == validation.known_labels()).double().mean())
        student.to("cpu")
    return Fit(loop.last_loss, loop.forwards, recipe.epochs * len(images) + loop.inner_backwards, accuracy)


class _Loop:
    """The state of one training: what a checkpoint holds."""

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        images: ImageSet,
        columns: dict[str, Tensor],
        recipe: Recipe,
        runtime: Runtime,
        seed: int,
    ) -> None:
        self.fabric = _fabric(runtime)
        self.objective, self.images = objective, images
        device = self.fabric.device
        self.pixels = _near(images.images, device)
        self.labels = None if images.labels is None else _near(images.labels, device)
        self.columns = {name: _near(column, device) for name, column in columns.items()}
        self.recipe, self.runtime, self.seed = recipe, runtime, seed
        self.augmentation = recipe.augmentation or augmentation_for(images)
        runtime.place(student)
        trained = nn.ModuleList([student, *([objective] if isinstance(objective, nn.Module) else [])])
        self.trained = trained
        optimiser = optimiser_for(trained, recipe)
        self.steps = recipe.steps(len(images))
        total = recipe.epochs * self.steps + 1
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser,
            [group["lr"] for group in optimiser.param_groups],
            total_steps=total,
            pct_start=max(recipe.warm_up, 1.5 / total),  # OneCycleLR divides by zero where it warms up for one step
            anneal_strategy="cos" if recipe.anneal == "cosine" else "linear",
            cycle_momentum=False,
        )
        self.forwards = self.inner_backwards = 0
        self.counter = student.register_forward_hook(self._count)
        self.student, self.optimiser = self.fabric.setup(student, optimiser)
        trained.to(self.fabric.device)
        if isinstance(objective, nn.Module):  # what is frozen in it, a teacher say, stays in eval mode
            for part in objective.modules():
                part.train(any(p.requires_grad for p in part.parameters()))
        self.epoch = 0
        self.last_loss = float("nan")

    def _count(self, _module: nn.Module, images: tuple[Tensor, ...], _logits: object) -> None:
        self.forwards += len(images[0])
        self.inner_backwards += len(images[0]) * images[0].requires_grad  # an objective that climbs the image

    def run_epoch(self, advance: Advance | None) -> None:
        self.student.train()
        order = permutation(len(self.images), derive(self.seed, "order", self.epoch))
        losses: list[Tensor] = []
        for number, rows in enumerate(order.tensor_split(self.steps)):
            step = self.epoch * self.steps + number
            loss = self.objective(self.student, self._batch(rows, step))
            self.optimiser.zero_grad(set_to_none=True)
            self.fabric.backward(loss)
            self.optimiser.step()
            self.schedule.step()
            losses.append(loss.detach())
            if len(losses) == CHECK_EVERY or number == self.steps - 1:
                self._look(losses, step)
                losses = []
                if advance is not None:
                    advance(step + 1, self.recipe.epochs * self.steps, f"loss {self.last_loss:.3f}")
        self.epoch += 1

    def _batch(self, rows: Tensor, step: int) -> Batch:
        index = rows.to(self.fabric.device)
        noise = Noise(derive(self.seed, "augmentation"), index, step)
        labels = None if self.labels is None else _taken(self.labels, index)
        pixels = self.augmentation(_taken(self.pixels, index), noise, self.epoch)
        columns = {name: _taken(column, index) for name, column in self.columns.items()}
        return Batch(as_float(pixels), labels, index, columns, noise)

    def _look(self, losses: list[Tensor], last_step: int) -> None:
        values: list[float] = torch.stack(losses).float().tolist()
        self.last_loss = values[-1]
        for step, value in enumerate(values, start=last_step + 1 - len(values)):
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"the loss became {value} at step {step + 1} of {self.recipe.epochs * self.steps} "
                    f"({type(self.objective).__name__}).",
                    f"Lower the learning rate (now {self.recipe.learning_rate:g}), or the objective's weight.",
                )

    def save(self, path: Path) -> None:
        state = {
            "epoch": self.epoch,
            "last_loss": self.last_loss,
            "forwards": self.forwards,
            "inner_backwards": self.inner_backwards,
            "trained": self.trained.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if self.fabric.device.type == "cuda" else None,
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(path, content.getvalue())

    def restore(self, path: Path) -> None:
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.fabric.device, weights_only=True)
            self.trained.load_state_dict(state["trained"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.schedule.load_state_dict(state["schedule"])
            torch.set_rng_state(state["random"].cpu())
            if state["random_cuda"] is not None:
                torch.cuda.set_rng_state(state["random_cuda"].cpu())
        except Exception as error:  # a pickle can fail in any way
            raise StoreError(
                f"the checkpoint {path} cannot be read: {reason(error)}", "Delete it, then resume."
            ) from None
        self.epoch, self.last_loss = int(state["epoch"]), float(state["last_loss"])
        self.forwards, self.inner_backwards = int(state["forwards"]), int(state.get("inner_backwards", 0))


def _near(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, if it takes less than a quarter of what is free there; else where it is."""
    if device.type == "cuda" and tensor.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        return tensor.to(device)
    return tensor


def _taken(tensor: Tensor, rows: Tensor) -> Tensor:
    """These rows, on the device of `rows`, wherever the tensor is."""
    return tensor.index_select(0, rows.to(tensor.device)).to(rows.device)


def _fabric(runtime: Runtime) -> Any:
    from lightning_fabric import Fabric  # over a second to import

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    kind = torch.device(runtime.device)
    devices = [kind.index] if kind.index is not None else 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        return Fabric(accelerator=kind.type, devices=devices, precision=runtime.fabric_precision)


def freely(student: nn.Module) -> Callable[[Tensor], Tensor]:
    """A student's answers, in the precision it is trained in, for an objective that takes gradients of its own.

    Fabric allows none but its own backward pass through what it has wrapped.
    """
    from lightning_fabric.wrappers import is_wrapped

    if not is_wrapped(student):
        return student
    module, precision = student.module, student._strategy.precision  # type: ignore[union-attr]

    def answers(images: Tensor) -> Tensor:
        with precision.forward_context():  # type: ignore[union-attr, operator]
            logits: Tensor = module(images)  # type: ignore[operator]
        return logits.float()

    return answers


def optimiser_for(trained: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimiser of a recipe, at its peak rates. Raises InputError where there is nothing to train."""
    groups = _parameter_groups(trained, recipe)
    if recipe.orthogonal_rate is None:
        return torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    return NesterovMuon(groups, momentum=recipe.momentum)


def _parameter_groups(trained: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    parameters = [p for p in trained.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("the student has no parameters to train.", "Is it frozen?")
    kernels = [p for p in parameters if recipe.orthogonal_rate is not None and p.ndim == 4 and p.shape[1] > 1]
    chosen = {id(p) for p in kernels}
    rest = [p for p in parameters if id(p) not in chosen]
    groups: list[dict[str, Any]] = [
        {
            "params": kernels,
            "lr": recipe.orthogonal_rate,
            "weight_decay": ORTHOGONAL_DECAY,
            "orthogonal": True,
        },
        {"params": [p for p in rest if p.ndim > 1], "lr": recipe.learning_rate, "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "lr": recipe.learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
