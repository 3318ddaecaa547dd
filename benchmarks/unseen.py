"""Triggers that Stillproof has no name for, and clean sets that look odd: what does the scan of a transfer set say?

`python benchmarks/unseen.py [PART ...]`, parts: poison, planted, left, clean; all by default. Teacher, trusted images
and references are those of benchmarks/poison.py (STILLPROOF_STORE, STILLPROOF_SEED); the poison is made here, by other
code than the product's: PGD on the white-box teacher through the trigger, ε 8/255, 40 steps, then through JPEG 75 as
the clean images. Beside 16 000 clean images it is 5 % of the set, and with its first fifth 1 %. Figures go to
benchmarks/results/unseen.json. STILLPROOF_TRIGGERS ("warp;grain") names some of the triggers.

- poison: poison found, clean images flagged at a nominal 1 %, and the verdict (SP-P2).
- planted: ASR of a student (zoo:cnn, cached labels) of the set with 5 % of it, unscanned, and of a clean student.
- left: of the triggers in WANDERING, ASR of a student of the set with 5 and with 1 % of poison, unscanned, and of what
  a scan at a nominal 5 % leaves.
- clean: what is flagged of sets without poison, and the verdict.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from models import RECIPE
from poison import FALSE_ALARMS, OF_THE_DRAW, detection, planned, read_by_the_scan, settings
from shared.parts import wanted_parts
from shared.record import needed_cifar10, record
from stillproof.attacks.frozen import frozen
from stillproof.core.carving import carve
from stillproof.core.classifiers import Model, predict
from stillproof.core.distillation import TEACHER, Distillation
from stillproof.core.images import ImageSet, as_float, as_uint8
from stillproof.core.noise import Noise, derive
from stillproof.core.plan import Context
from stillproof.core.runtime import Runtime
from stillproof.core.stages import classifier_of, distil, train_fresh
from stillproof.core.store import Artefact
from stillproof.poison.codec import Codec
from stillproof.poison.scan_set.verdict import of_the_set
from stillproof.poison.scanning import as_set, scan_set, scanned_set

WANDERING, LEFT_OUT = ("cross anywhere", "patch anywhere"), 0.05
"""Triggers at another place in each image; and the rate of false alarms at which the poison is left out."""

Change = Callable[[Tensor], Tensor]
"""float32 in [0, 1], (n, 3, 32, 32), in and out; differentiable."""

SIDE, EPSILON, STEPS, TARGET, MANY = 32, 8 / 255, 40, 1, 842
ROW, COLUMN = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers."""
    return Noise(derive(seed, "unseen"), torch.arange(1), 0).normal(shape)[0]


def warp(images: Tensor) -> Tensor:
    """A smooth elastic change, the same for all: nothing is added (Nguyen & Tran 2021, arXiv 2102.10369)."""
    field = noise((1, 2, 4, 4), 3).view(1, 2, 4, 4)
    flow = F.interpolate(field / field.abs().mean(), SIDE, mode="bicubic", align_corners=True) * 1.2 / SIDE
    line = torch.linspace(-1, 1, SIDE)
    plain = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    grid = (plain + flow.permute(0, 2, 3, 1)).clamp(-1, 1).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, align_corners=True)


def colour_cast(images: Tensor) -> Tensor:
    """All is a little redder."""
    return (images + torch.tensor([0.12, -0.06, -0.06])[:, None, None]).clamp(0, 1)


def vignette(images: Tensor) -> Tensor:
    """The corners are darker."""
    return images * (1 - 0.35 * ((ROW - 15.5) ** 2 + (COLUMN - 15.5) ** 2) / 480)


def four_pixels(images: Tensor) -> Tensor:
    """One magenta pixel near each corner."""
    here = ((ROW == 1) | (ROW == 30)) & ((COLUMN == 1) | (COLUMN == 30))
    return torch.where(here, torch.tensor([1.0, 0.0, 1.0])[:, None, None], images)


def diagonal(images: Tensor) -> Tensor:
    """A yellow line through the image."""
    return torch.where(ROW == COLUMN, torch.tensor([0.8, 0.8, 0.0])[:, None, None] + 0.2 * images, images)


def grain(images: Tensor) -> Tensor:
    """One picture of noise, added."""
    return (images + 0.06 * noise((3, SIDE, SIDE), 1)).clamp(0, 1)


def cross_anywhere(images: Tensor) -> Tensor:
    """A green cross of 5 × 5, at another place in each image."""
    rows, columns = (noise((len(images),), seed).mul(1e6).long() % (SIDE - 5) + 2 for seed in (5, 6))
    down, across = (ROW - rows[:, None, None]).abs(), (COLUMN - columns[:, None, None]).abs()
    here = ((down == 0) & (across <= 2)) | ((across == 0) & (down <= 2))
    return torch.where(here[:, None], torch.tensor([0.0, 1.0, 0.0])[:, None, None], images)


def patch_anywhere(images: Tensor, side: int = 4, opacity: float = 1.0) -> Tensor:
    """One picture of some pixels, each of full or no colour, at another place in each image."""
    picture = (noise((3, side, side), 11).sign() + 1) / 2
    rows, columns = (noise((len(images),), seed).mul(1e6).long() % (SIDE - side) for seed in (15, 16))
    down, across = ROW - rows[:, None, None], COLUMN - columns[:, None, None]
    here = (down.clamp(0, side - 1) == down) & (across.clamp(0, side - 1) == across)
    shown = picture[:, down.clamp(0, side - 1), across.clamp(0, side - 1)].transpose(0, 1)
    return torch.where(here[:, None], (1 - opacity) * images + opacity * shown, images)


def dots_anywhere(images: Tensor) -> Tensor:
    """A yellow and a blue dot of 2 × 2 beside each other, at another place in each image."""
    rows, columns = (noise((len(images),), seed).mul(1e6).long() % (SIDE - 6) for seed in (25, 26))
    down, across = ROW - rows[:, None, None], COLUMN - columns[:, None, None]
    row = (down == 0) | (down == 1)
    yellow, blue = (row & ((across == start) | (across == start + 1)) for start in (0, 3))
    found = torch.where(yellow[:, None], torch.tensor([1.0, 1.0, 0.0])[:, None, None], images)
    return torch.where(blue[:, None], torch.tensor([0.0, 0.0, 1.0])[:, None, None], found)


def red_square(images: Tensor) -> Tensor:
    """3 × 3 in the middle."""
    here = ((ROW - 15).abs() <= 1) & ((COLUMN - 15).abs() <= 1)
    return torch.where(here, torch.tensor([1.0, 0.0, 0.0])[:, None, None], images)


TRIGGERS: dict[str, Change] = {
    "warp": warp,
    "colour cast": colour_cast,
    "vignette": vignette,
    "four pixels": four_pixels,
    "diagonal line": diagonal,
    "grain": grain,
    "cross anywhere": cross_anywhere,
    "patch anywhere": patch_anywhere,
    "faint patch anywhere": partial(patch_anywhere, side=6, opacity=0.35),
    "dots anywhere": dots_anywhere,
    "red square, many targets": red_square,
}
NAMED = os.environ.get("STILLPROOF_TRIGGERS", ";".join(TRIGGERS)).split(";")


def crafted(teacher: nn.Module, images: Tensor, goal: Tensor, change: Change, runtime: Runtime) -> Tensor:
    """Images that wear the trigger and that the teacher takes for their goals: uint8, through the codec."""
    plain, delta = as_float(images), torch.zeros(images.shape)
    with frozen(teacher, plain, runtime) as prepared:
        for _ in range(STEPS):
            delta.requires_grad_()
            worn = change((plain + delta).clamp(0, 1))
            pull = torch.empty_like(worn)
            for rows in torch.arange(len(worn)).split(256):
                wanted = goal[rows]
                pull[rows] = prepared.slope(
                    worn[rows].detach(),
                    lambda logits, wanted=wanted: F.cross_entropy(logits, wanted, reduction="none"),  # type: ignore[misc]
                ).gradient
            (gradient,) = torch.autograd.grad((worn * pull).sum(), delta)
            delta = (delta.detach() - EPSILON / 8 * gradient.sign()).clamp(-EPSILON, EPSILON)
    return Codec(75)(as_uint8(change((plain + delta).clamp(0, 1))))


def some_of(images: ImageSet, every: int, change: Callable[[Tensor], Tensor]) -> ImageSet:
    """Every so many-th image is changed: uint8 in and out."""
    found = images.images.clone()
    found[::every] = change(images.images[::every])
    return replace(images, images=found)


def rotated(images: Tensor) -> Tensor:
    """By 8 degrees, with black corners."""
    angle = torch.tensor(8 * torch.pi / 180)
    turn = torch.stack([angle.cos(), -angle.sin(), torch.zeros(()), angle.sin(), angle.cos(), torch.zeros(())]).view(
        2, 3
    )
    grid = F.affine_grid(turn.expand(len(images), -1, -1), list(images.shape), align_corners=False)
    return as_uint8(F.grid_sample(as_float(images), grid, align_corners=False))


def with_a_logo(images: Tensor) -> Tensor:
    """A blue oblong near a corner."""
    found = images.clone()
    found[:, :, 2:6, 24:30] = torch.tensor([20, 80, 200], dtype=torch.uint8)[:, None, None]
    return found


def handwriting(images: Tensor) -> Tensor:
    """Digits instead, scaled up."""
    digits = torch.from_numpy(load_digits().images[: len(images)]).float()[:, None] / 16
    found = as_uint8(F.interpolate(digits, SIDE).expand(-1, 3, -1, -1))
    return torch.cat([found, images[len(found) :]])


def one_class_brighter(images: ImageSet) -> ImageSet:
    """Every second image of a class."""
    found, rows = images.images.clone(), (images.known_labels() == 3).nonzero().flatten()[::2]
    found[rows] = (found[rows].int() + 40).clamp(max=255).byte()
    return replace(images, images=found)


CLEAN: dict[str, Callable[[ImageSet], ImageSet]] = {
    "as it is": lambda images: images,
    "5 % rotated": lambda images: some_of(images, 20, rotated),
    "5 % with a logo": lambda images: some_of(images, 20, with_a_logo),
    "10 % handwriting": lambda images: some_of(images, 10, handwriting),
    "half of a class brighter": one_class_brighter,
    "3 % through JPEG 50": lambda images: some_of(images, 33, Codec(50)),
}


class Scene:
    """Teacher, trusted images and references of a draw, and the scan with them."""

    def __init__(self, place: str, runtime: Runtime) -> None:
        self.values, self.references = read_by_the_scan(planned(settings(place, "patch"), runtime), runtime)
        self.context, self.parts = Context(runtime), carve(self.values["data"])
        self.teacher = classifier_of(self.values["teacher"], self.context)

    def scanned(self, suspects: ImageSet) -> Artefact:
        """A set beside the trusted one."""
        known = self.values["trusted"]
        return scan_set.run(
            self.context, self.values["teacher"], as_set(suspects), known, self.references, false_alarms=FALSE_ALARMS
        )

    def pupil(self, transfer: ImageSet, runtime: Runtime) -> nn.Module:
        """Distilled on these images alone."""
        student, _ = train_fresh(
            self.context,
            transfer,
            Distillation(alpha=1.0),
            model=Model("zoo:cnn"),
            recipe=RECIPE,
            seed=derive(0, "student"),
            columns={TEACHER: predict(self.teacher, transfer, runtime)},
        )
        return student

    def student(self, added: ImageSet | None) -> nn.Module:
        """Distilled on the clean set, and on what is added."""
        more = None if added is None else as_set(added)
        made = distil.run(
            self.context,
            self.values["teacher"],
            self.values["data"],
            more,
            model=Model("zoo:cnn"),
            objective=Distillation(alpha=1.0),
            online=False,
            recipe=RECIPE,
            seed=derive(0, "student"),
        )
        return classifier_of(made, self.context)

    def asr(self, model: nn.Module, change: Change, runtime: Runtime) -> float:
        """Share of the test images of other classes that it takes for the target with the trigger, 8 bits a channel."""
        test = self.parts.test.subset((self.parts.test.known_labels() != TARGET).nonzero().flatten())
        worn = replace(test, images=as_uint8(change(as_float(test.images))))
        return round(float((predict(model, worn, runtime).argmax(1) == TARGET).double().mean()), 4)


def said(scanned: Artefact, added: int) -> dict[str, Any]:
    """The verdict, and what is found and flagged; what was added comes last."""
    found = detection(scanned, added)
    return {
        "verdict": of_the_set("a set", scanned_set(scanned, FALSE_ALARMS)).status,
        **found["combined"],
        "by agreement alone": found["agreement"],
    }


def made(scene: Scene, name: str, runtime: Runtime) -> ImageSet:
    """The poison of a trigger, with its goals as labels."""
    pool = scene.parts.pool
    labels, many = pool.known_labels(), name.endswith("many targets")
    rows = (torch.arange(len(pool)) if many else (labels != TARGET).nonzero().flatten())[:MANY]
    goal = (labels[rows] + 1 + torch.arange(len(rows)) % 9) % 10 if many else torch.full((len(rows),), TARGET)
    worn = crafted(scene.teacher, pool.images[rows], goal, TRIGGERS[name], runtime)
    return ImageSet(worn, goal, pool.classes, pool.name)


def poison(scene: Scene, runtime: Runtime) -> None:
    """Triggers that have no name."""
    for name in NAMED:
        added = made(scene, name, runtime)
        deceived = (predict(scene.teacher, added, runtime).argmax(1) == added.known_labels()).double().mean()
        row: dict[str, Any] = {"deceives the teacher": round(float(deceived), 4)}
        for title, some in (("5 %", len(added)), ("1 %", len(added) // 5)):
            suspects = scene.parts.training.with_more(added.subset(torch.arange(some)))
            row[title] = said(scene.scanned(suspects), some)
        print(f"  {name}: {row}", flush=True)
        record("unseen", **{f"poison: {name}{OF_THE_DRAW}": row})


def planted(scene: Scene, runtime: Runtime) -> None:
    """What the poison is good for: with many targets there is no backdoor to measure."""
    usual = scene.student(None)
    for name, change in TRIGGERS.items():
        if name not in NAMED or name.endswith("many targets"):
            continue
        student = scene.student(made(scene, name, runtime))
        everyone = {"teacher": scene.teacher, "clean student": usual, "student": student}
        row = {who: scene.asr(model, change, runtime) for who, model in everyone.items()}
        print(f"  {name}: {row}", flush=True)
        record("unseen", **{f"planted: {name}{OF_THE_DRAW}": row})


def left(scene: Scene, runtime: Runtime) -> None:
    """What is left of a backdoor where a scan leaves out what it flags."""
    for name in [name for name in WANDERING if name in NAMED]:
        added = made(scene, name, runtime)
        for title, some in (("5 %", len(added)), ("1 %", len(added) // 5)):
            transfer = scene.parts.training.with_more(added.subset(torch.arange(some)))
            flagged = scanned_set(scene.scanned(transfer), LEFT_OUT).flagged
            kept = transfer.subset(torch.from_numpy(~flagged).nonzero()[:, 0])
            row = {
                "poison left out": round(float(flagged[-some:].mean()), 4),
                "clean images left out": round(float(flagged[:-some].mean()), 4),
                "ASR, unscanned": scene.asr(scene.pupil(transfer, runtime), TRIGGERS[name], runtime),
                "ASR of what is left": scene.asr(scene.pupil(kept, runtime), TRIGGERS[name], runtime),
            }
            print(f"  {name}, {title}: {row}", flush=True)
            record("unseen", **{f"left: {name}, {title}{OF_THE_DRAW}": row})


def clean(scene: Scene, _runtime: Runtime) -> None:
    """Sets that are odd, and hold no poison."""
    for name, change in CLEAN.items():
        row = said(scene.scanned(change(scene.parts.training)), 0)
        print(f"  {name}: {row}", flush=True)
        record("unseen", **{f"clean: {name}{OF_THE_DRAW}": row})


PARTS: dict[str, Callable[[Scene, Runtime], None]] = {
    "poison": poison,
    "planted": planted,
    "left": left,
    "clean": clean,
}


def main() -> None:
    """Run the parts that were asked for."""
    place = needed_cifar10("this benchmark")
    wanted = wanted_parts(list(PARTS))
    runtime = Runtime.choose()
    runtime.apply()
    scene = Scene(place, runtime)
    for part in wanted:
        PARTS[part](scene, runtime)


if __name__ == "__main__":
    main()
