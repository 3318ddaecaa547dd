"""fit(): what it reaches on CIFAR-10, and how near it comes to the bare passes of the same network.

`python benchmarks/training.py [PART ...]`, parts: accuracy, overhead, reference, distillation; all by default.

- accuracy: zoo:resnet18?width=16, the standard recipe, 45 000 training images (5 000 held out for validation), three
  seeds; the test set is looked at once. Each training is a stage: run it again and it goes on where it was.
- overhead: an epoch of fit, augmentation and loading included, over bare forward + backward + SGD step on one batch
  that lies ready (bf16, channels_last), in turn, five times; the median of the ratios; and the same of the recipe's own
  optimiser step (Muon) over SGD's.
- reference: the same for the loop that the AST and Nasty Teacher code has: fp32, NCHW, a DataLoader that transforms
  PIL images one by one; ResNet-18 at full width.
- distillation: KD with a frozen teacher over bare student step + bare teacher forward; with cached logits over the bare
  student step, SGD's and the recipe's own.

About 25 minutes on two cores. Ratios are of times within one run.
"""

from __future__ import annotations

import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from shared.parts import wanted_parts
from shared.plans import executed
from shared.record import cifar10, record
from stillproof.core import measures
from stillproof.core.carving import carve, data_stage
from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import TEACHER, CrossEntropy, Distillation, Objective, OnlineTeacher
from stillproof.core.images import ImageSet, as_float
from stillproof.core.plan import Context, job, stage
from stillproof.core.runtime import Runtime, cores
from stillproof.core.stages import train_fresh
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe, fit, optimiser_for

SMALL, FULL = "zoo:resnet18?width=16", "zoo:resnet18"
SEEDS = (0, 1, 2)
RECIPE = Recipe.standard(epochs=12)
SHAPE = (3, 32, 32)

REFERENCE_BATCH = 128
"""What the reference code trains with; fit is timed at the same in that comparison."""


@job(version=1)
def trained(context: Context, data: Artefact, *, recipe: Recipe, seed: int) -> Artefact:
    """Trained on all that is not held out; what it says of the test images."""
    parts = carve(data)
    images = torch.cat([parts.training.images, parts.pool.images])
    labels = torch.cat([parts.training.known_labels(), parts.pool.known_labels()])
    everything = ImageSet(images, labels, parts.training.classes, "training and pool")
    model = Model(SMALL)
    common = {"model": model, "recipe": recipe, "seed": seed, "validation": parts.validation}
    student, found = train_fresh(context, everything, CrossEntropy(), **common)  # type: ignore[arg-type]
    right = predict(student, parts.test, context.runtime).argmax(1) == parts.test.known_labels()
    return Artefact({"validation": found.validation_accuracy}, {"right": right})


def accuracy(runtime: Runtime) -> None:
    """Test accuracy of three seeds."""
    place = cifar10()
    if not place:
        print("left out: accuracy needs STILLPROOF_CIFAR10, a folder with CIFAR-10 as parquet")
        return
    data = data_stage(place, None).stage
    stages = {str(seed): stage(trained, f"train, seed {seed}", data=data, recipe=RECIPE, seed=seed) for seed in SEEDS}
    values = executed(stages, runtime)
    tests = [float(found.tensors["right"].double().mean()) for found in values.values()]
    mean = measures.mean_share(np.stack([found.tensors["right"].numpy() for found in values.values()]))
    record(
        "training",
        accuracy={
            "model": SMALL,
            "recipe": str(RECIPE),
            "seeds": list(SEEDS),
            "test": tests,
            "mean": mean.model_dump(mode="json"),
            "validation": [found.values["validation"] for found in values.values()],
            "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
    )


def random_images(n: int) -> ImageSet:
    """Noise: what is timed does not depend on the picture."""
    pixels = torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, torch.arange(n) % 10, tuple("0123456789"), "noise")


def fresh(spec: str, runtime: Runtime, seed: int = 0) -> nn.Module:
    """A classifier to be timed."""
    return runtime.place(Model(spec).fresh(SHAPE, 10, seed))


def bare_step(spec: str, runtime: Runtime, batch: int, *, sgd: bool = True) -> Callable[[], None]:
    """Forward, backward and optimiser step (SGD's, or the recipe's own) on one batch that lies ready."""
    model = fresh(spec, runtime).train()
    optimiser = optimiser_for(model, replace(RECIPE, orthogonal_rate=None) if sgd else RECIPE)
    images = random_images(batch)
    ready, labels = as_float(images.images.to(runtime.device)), images.known_labels().to(runtime.device)

    def step() -> None:
        with runtime.autocast():
            loss = nn.functional.cross_entropy(model(ready), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return step


def bare_forward(spec: str, runtime: Runtime, batch: int) -> Callable[[], None]:
    """A forward pass without gradient on one batch that lies ready."""
    model = fresh(spec, runtime).eval()
    ready = as_float(random_images(batch).images.to(runtime.device))

    def step() -> None:
        with torch.no_grad(), runtime.autocast():
            model(ready)

    return step


def seconds(step: Callable[[], None], times: int, runtime: Runtime) -> float:
    """Seconds a step, after three that do not count."""
    for _ in range(3):
        step()
    if runtime.device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        step()
    if runtime.device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def fit_seconds(
    spec: str,
    objective: Objective,
    images: ImageSet,
    runtime: Runtime,
    batch: int = RECIPE.batch_size,
    **columns: Tensor,
) -> float:
    """Seconds a step of fit, an epoch with everything that belongs to it."""
    student = fresh(spec, runtime, seed=1)
    recipe = replace(RECIPE, epochs=1, batch_size=batch)
    began = time.perf_counter()
    fit(student, objective, images, recipe=recipe, runtime=runtime, seed=0, columns=columns)
    return (time.perf_counter() - began) / recipe.steps(len(images))


def compared(ours: Callable[[], float], bare: Callable[[], float], rounds: int = 5) -> dict[str, object]:
    """Both in turn; the median ratio and all of them."""
    pairs = [(ours(), bare()) for _ in range(rounds)]
    ratios = sorted(mine / theirs for mine, theirs in pairs)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "all": [round(ratio, 3) for ratio in ratios],
        "seconds": {"fit": pairs[-1][0], "bare": pairs[-1][1]},
    }


def overhead(runtime: Runtime) -> None:
    """fit over the bare step."""
    batch = RECIPE.batch_size
    images = random_images(batch * 100)
    step = bare_step(SMALL, runtime, batch)
    fit_seconds(SMALL, CrossEntropy(), images.subset(torch.arange(2 * batch)), runtime)  # what is imported late
    found = compared(lambda: fit_seconds(SMALL, CrossEntropy(), images, runtime), lambda: seconds(step, 100, runtime))
    own = bare_step(SMALL, runtime, batch, sgd=False)
    muon = compared(lambda: seconds(own, 100, runtime), lambda: seconds(step, 100, runtime))
    record("training", overhead={"model": SMALL, "batch": batch, **found, "the recipe's own step over SGD's": muon})


class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """PIL images, each transformed when it is asked for, as torchvision's CIFAR-10 with the usual transforms does."""

    MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    STD = torch.tensor([0.247, 0.243, 0.261]).view(3, 1, 1)

    def __init__(self, images: ImageSet) -> None:
        self.pixels = images.images.permute(0, 2, 3, 1).numpy()
        self.labels = images.known_labels().tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.pixels[row])
        padded = Image.new("RGB", (40, 40))
        padded.paste(image, (4, 4))
        left, top = random.randint(0, 8), random.randint(0, 8)  # noqa: S311
        image = padded.crop((left, top, left + 32, top + 32))
        if random.random() < 0.5:  # noqa: S311
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return (tensor - self.MEAN) / self.STD, self.labels[row]


def reference_seconds(images: ImageSet, workers: int) -> float:
    """Seconds a step of the loop as the reference code writes it: fp32, NCHW, a DataLoader, a look at every loss."""
    model = Model(FULL).fresh(SHAPE, 10, 0).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(
        Pictures(images), batch_size=REFERENCE_BATCH, shuffle=True, num_workers=workers
    )
    criterion = nn.CrossEntropyLoss()
    total, steps = 0.0, 0
    began = time.perf_counter()
    for inputs, targets in loader:
        optimiser.zero_grad()
        loss = criterion(model(inputs), targets)
        loss.backward()
        optimiser.step()
        total += loss.item()
        steps += 1
    return (time.perf_counter() - began) / steps


def reference(runtime: Runtime) -> None:
    """fit against the reference loop, at full width."""
    images = random_images(REFERENCE_BATCH * 10)
    by_workers = {workers: reference_seconds(images, workers) for workers in (0, cores())}
    best = min(by_workers, key=lambda workers: by_workers[workers])
    found = compared(
        lambda: reference_seconds(images, best),
        lambda: fit_seconds(FULL, CrossEntropy(), images, runtime, batch=REFERENCE_BATCH),
        rounds=3,
    )
    times = {"reference": found["seconds"]["fit"], "fit": found["seconds"]["bare"]}  # type: ignore[index]
    record(
        "training",
        reference={
            "model": FULL,
            "workers": best,
            "times_faster": found["ratio"],
            "all": found["all"],
            "seconds": times,
        },
    )


def distillation(runtime: Runtime) -> None:
    """KD over the bare passes that it needs."""
    batch = RECIPE.batch_size
    images = random_images(batch * 100)
    teacher = Model(SMALL).fresh(SHAPE, 10, 2)
    logits = predict(teacher, images, runtime)
    student = bare_step(SMALL, runtime, batch)
    forward = bare_forward(SMALL, runtime, batch)
    objective = Distillation()
    online = compared(
        lambda: fit_seconds(SMALL, OnlineTeacher(teacher, objective, runtime), images, runtime),
        lambda: seconds(student, 100, runtime) + seconds(forward, 100, runtime),
    )
    cached = compared(
        lambda: fit_seconds(SMALL, objective, images, runtime, **{TEACHER: logits}),
        lambda: seconds(student, 100, runtime),
    )
    own = bare_step(SMALL, runtime, batch, sgd=False)
    cached_own = compared(
        lambda: fit_seconds(SMALL, objective, images, runtime, **{TEACHER: logits}),
        lambda: seconds(own, 100, runtime),
    )
    found = {"online": online, "cached": cached, "cached, over the recipe's own step": cached_own}
    record("training", distillation={"teacher": SMALL, "student": SMALL, **found})


PARTS = {"accuracy": accuracy, "overhead": overhead, "reference": reference, "distillation": distillation}


def main() -> None:
    """Run the parts that were asked for."""
    wanted = wanted_parts(list(PARTS))
    runtime = Runtime.choose()
    runtime.apply()
    for name in wanted:
        PARTS[name](runtime)


if __name__ == "__main__":
    main()
