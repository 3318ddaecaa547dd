"""Graphs of stages that several verbs share: the scan of a transfer set, and the students of a set that is defended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from stillproof.core.carving import Data
from stillproof.core.classifiers import Model
from stillproof.core.distillation import Objective
from stillproof.core.noise import derive
from stillproof.core.plan import Stage, stage
from stillproof.core.training import Recipe
from stillproof.poison.further_scanning import OF_A_PROBE, OF_VIEWS, scan_further, train_probe, view
from stillproof.poison.premise import check_premise
from stillproof.poison.resistant import Unlearning
from stillproof.poison.resisting import VIEWS, assemble, distil_on_the_rest, unlearn, vouched
from stillproof.poison.scan_set.stability import VIEWS as VIEWED
from stillproof.poison.scanning import REFERENCES, scan_set, train_reference
from stillproof.poison.student_scanning import HELD_OUT, invert_clean, scan_student

DEFENCES = ("scan", "scan and consensus", "unlearning")
"""What is held to SP-P4."""

BASELINES = ("trusted images alone", "fine-tuning")
"""What the defences are compared with: both use the trusted images, and neither looks for poison."""

LEFT_OUT = 0.05
"""Rate of false alarms at which a defence leaves images out: some clean ones less cost little, some poison much."""

UNLEARNING_EPOCHS = 8

PROBE_EPOCHS = 8

TUNING_RATE = 0.05
"""Peak rate of fine-tuning: half of training's."""


def tuning(epochs: int) -> Recipe:
    """The recipe of a classifier that is trained already."""
    return replace(Recipe.standard(epochs), learning_rate=TUNING_RATE, orthogonal_rate=TUNING_RATE / 5)


@dataclass(frozen=True, slots=True)
class Looking:
    """How a transfer set is scanned: the references' model and epochs, the rate of false alarms, the seed."""

    reference: str
    epochs: int
    false_alarms: float
    seed: int

    def stage(self, teacher: Stage, suspects: Stage, trusted: Stage, *, images: int, known: int) -> Stage:
        """The stage of the scan, with those of its references. images, known: how many there are, about."""
        references = [
            stage(
                train_reference,
                f"train reference {fold + 1} of {REFERENCES}",
                passes=3 * known * self.epochs,
                teacher=teacher,
                trusted=trusted,
                model=Model(self.reference),
                fold=fold,
                recipe=Recipe.standard(self.epochs),
                seed=derive(self.seed, "reference", fold),
            )
            for fold in range(REFERENCES)
        ]
        return stage(
            scan_set,
            "scan the transfer set",
            passes=2 * (images + known),
            teacher=teacher,
            suspects=suspects,
            trusted=trusted,
            references=references,
            false_alarms=self.false_alarms,
        )

    def premise(self, scanned: Stage) -> Stage:
        """The stage that checks what a scan rests on."""
        reads: dict[str, Any] = {name: scanned.inputs[name] for name in ("teacher", "trusted", "references")}
        return stage(check_premise, "check the teacher beside the references", **reads)

    def further(
        self, teacher: Stage, suspects: Stage, trusted: Stage, names: Sequence[str], *, images: int, known: int
    ) -> Stage:
        """The stage of further scanners (see `further_scanning`), with what they read."""
        sets: dict[str, Any] = {"teacher": teacher, "suspects": suspects, "trusted": trusted}
        read: dict[str, Any] = {}
        if set(names) & set(OF_VIEWS):
            passes = (1 + len(VIEWED)) * (images + known)
            read["views"] = stage(view, "look at views", passes=passes, seed=derive(self.seed, "views"), **sets)
        if set(names) & set(OF_A_PROBE):
            read["probe"] = stage(
                train_probe,
                "train a probe on both sets",
                passes=3 * PROBE_EPOCHS * (images + known),
                model=Model(self.reference),
                recipe=Recipe.standard(PROBE_EPOCHS),
                seed=derive(self.seed, "probe"),
                **sets,
            )
        return stage(
            scan_further,
            "ask further scanners",
            suspects=suspects,
            trusted=trusted,
            names=tuple(names),
            seed=derive(self.seed, "further"),
            **read,
        )


CLEAN_STUDENTS = 2
"""That the scan of a student distils itself, to know what is usual."""


@dataclass(frozen=True, slots=True)
class Inspecting:
    """How a student is scanned: the model of the clean ones, whether it is deployed in INT8, the epochs of their
    training and of the search, the seed."""

    model: Model
    quantised: bool
    epochs: int
    inversion_epochs: int
    seed: int

    def stage(self, teacher: Stage, student: Stage, trusted: Stage, scanned: Stage | None = None) -> Stage:
        """The stage of the scan, with those of the clean students. scanned: of its transfer set."""
        clean = [
            stage(
                train_reference,
                f"distil clean student {number + 1} of {CLEAN_STUDENTS}",
                teacher=teacher,
                trusted=trusted,
                model=self.model,
                fold=HELD_OUT,
                recipe=Recipe.standard(self.epochs),
                seed=derive(self.seed, "clean student", number),
            )
            for number in range(CLEAN_STUDENTS)
        ]
        read: dict[str, Any] = {"teacher": teacher, "trusted": trusted, "clean": clean}
        read |= {"epochs": self.inversion_epochs, "seed": self.seed}
        usual = stage(invert_clean, "seek changes in clean students", quantised=self.quantised, **read)
        read |= {"student": student, "usual": usual} | ({} if scanned is None else {"scanned": scanned})
        return stage(scan_student, "scan the student", **read)


@dataclass(frozen=True)
class Defended:
    """A poisoned transfer set, the training part and what was crafted; the validation part is the trusted set."""

    data: Data
    teacher: Stage
    crafted: Stage
    looking: Looking

    @cached_property
    def suspects(self) -> Stage:
        """The transfer set."""
        return stage(assemble, "assemble the poisoned set", data=self.data.stage, added=self.crafted)

    @cached_property
    def trusted(self) -> Stage:
        """The trusted set."""
        return stage(vouched, "take the trusted set", data=self.data.stage)

    @cached_property
    def scanned(self) -> Stage:
        """Its scan."""
        sizes = self.data.sizes
        return self.looking.stage(
            self.teacher, self.suspects, self.trusted, images=sizes.training, known=sizes.validation
        )

    def students(
        self, poisoned: Stage, *, model: Model, objective: Objective, epochs: int, seed: int
    ) -> dict[str, Stage]:
        """A student under each defence, and of each baseline, by name. poisoned: one of the whole set, to be tuned."""
        sizes = self.data.sizes
        left = {"suspects": self.suspects, "scanned": self.scanned}
        # as many steps on few images as on many
        longer = epochs * max(1, round(sizes.training / sizes.validation))
        found = {
            name: self._distilled(name, given, views, model, objective, lasting, images, seed)
            for name, given, views, lasting, images in (
                ("scan", left, 0, epochs, sizes.training),
                ("scan and consensus", left, VIEWS, epochs, sizes.training),
                ("trusted images alone", {"suspects": self.trusted}, 0, longer, sizes.validation),
            )
        }
        tuned = UNLEARNING_EPOCHS * len(Unlearning().sizes)
        found["unlearning"] = self._tuned("unlearning", poisoned, Unlearning(), UNLEARNING_EPOCHS, seed)
        found["fine-tuning"] = self._tuned("fine-tuning", poisoned, Unlearning(sizes=()), tuned, seed)
        return found

    def _distilled(
        self,
        name: str,
        given: dict[str, Any],
        views: int,
        model: Model,
        objective: Objective,
        epochs: int,
        images: int,
        seed: int,
    ) -> Stage:
        return stage(
            distil_on_the_rest,
            f"distil: {name}",
            passes=3 * images * epochs,
            teacher=self.teacher,
            model=model,
            objective=objective,
            views=views,
            recipe=Recipe.standard(epochs),
            seed=seed,
            **given,
        )

    def _tuned(self, name: str, student: Stage, settings: Unlearning, epochs: int, seed: int) -> Stage:
        rounds = len(settings.sizes)
        return stage(
            unlearn,
            f"tune: {name}",
            passes=3 * self.data.sizes.validation * epochs * (1 + rounds) ** 2,
            teacher=self.teacher,
            student=student,
            trusted=self.trusted,
            settings=settings,
            recipe=tuning(epochs),
            seed=seed,
        )
