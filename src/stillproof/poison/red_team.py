"""The stages of a red team's test: poison is crafted, students learn from what it was added to, all are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from stillproof.core.carving import Data
from stillproof.core.classifiers import Model
from stillproof.core.compression import Compression
from stillproof.core.distillation import Distillation, Objective
from stillproof.core.noise import derive
from stillproof.core.plan import Stage, stage
from stillproof.core.stages import classifier_stage, compress, distil
from stillproof.core.training import Recipe
from stillproof.poison.craft import Crafting
from stillproof.poison.pipeline import Defended, Looking, tuning
from stillproof.poison.scanning import REFERENCES
from stillproof.poison.stages import added_for, craft_poison, measure_backdoor
from stillproof.poison.triggers import Trigger

CLEAN, POISON = "nothing", "poison"
"""What was added to the transfer sets that are compared first."""

LEARNT = "cached"
"""The label mode of students under defences, and of those that they are compared with."""


@dataclass(frozen=True, kw_only=True)
class RedTeam:
    """A test of a pipeline by its own red team.

    crafting: how what is added is made, by name, `CLEAN` apart; student: the model that is distilled, or None where the
    student is the teacher after a compression; surrogate: what the attacker has in place of the teacher; fools:
    references that the poison is to deceive as well; modes: of labels; students: their seeds; looking: the scan of the
    defended set, if there are defences.
    """

    data: Data
    teacher: Model
    student: Model | None
    compression: Compression | None
    objective: Objective
    crafting: Mapping[str, Crafting]
    rate: float
    trigger: Trigger
    surrogate: Model | None
    fools: Model | None
    modes: Sequence[str]
    students: Sequence[int]
    epochs: int
    seed: int
    looking: Looking | None

    def stages(self) -> dict[str, Stage]:
        """By name: `teacher`, `NAME/crafted`, `NAME/MODE/SEED/model`, and `NAME/MODE/SEED`, what is measured of it."""
        students = self._students()
        outputs = {"data": self.data.stage, "teacher": self._teacher, **self._crafted}
        outputs |= {f"{name}/model": student for name, student in students.items()}
        measured = {"teacher/backdoor": self._teacher, **students}
        if self.looking is not None and self.student is not None:
            defended = Defended(self.data, self._teacher, self._crafted[f"{POISON}/crafted"], self.looking)
            outputs |= {"scan": defended.scanned, "premise": self.looking.premise(defended.scanned)}
            measured |= self._defended(defended, self.student, students)
        return outputs | {name: self._measured(name, classifier) for name, classifier in measured.items()}

    @cached_property
    def _teacher(self) -> Stage:
        return self._trained("the teacher", self.teacher, self.seed)

    @cached_property
    def _known(self) -> Stage:
        """What the attacker has: the teacher, or a surrogate."""
        if self.surrogate is None:
            return self._teacher
        return self._trained("the surrogate", self.surrogate, derive(self.seed, "surrogate"))

    def _trained(self, what: str, model: Model, seed: int) -> Stage:
        recipe, images = Recipe.standard(self.epochs), self.data.sizes.training
        return classifier_stage(what, model=model, seed=seed, data=self.data.stage, recipe=recipe, images=images)

    @cached_property
    def _deceived(self) -> list[Stage]:
        """The classifiers that the poison is made to deceive."""
        references = [  # as the scan makes its own, of more images than it has
            stage(
                distil,
                f"distil the attacker's reference {number + 1} of {REFERENCES}",
                passes=3 * self.data.sizes.training * self.epochs,
                teacher=self._known,
                data=self.data.stage,
                model=self.fools,
                objective=Distillation(alpha=1.0),
                online=False,
                recipe=Recipe.standard(self.epochs),
                seed=derive(self.seed, "the attacker's reference", number),
            )
            for number in range(REFERENCES if self.fools is not None else 0)
        ]
        return [self._known, *references]

    @property
    def _added(self) -> int:
        return added_for(self.rate, self.data.sizes.training)

    @cached_property
    def _crafted(self) -> dict[str, Stage]:
        """What is added to each transfer set."""
        return {
            f"{name}/crafted": stage(
                craft_poison,
                f"craft: {name}",
                passes=3 * self._added * (made.steps if made.is_optimised else 1) * len(self._deceived),
                data=self.data.stage,
                teacher=self._teacher,
                deceived=self._deceived,
                crafting=made,
                rate=self.rate,
                seed=self.seed,
            )
            for name, made in self.crafting.items()
        }

    def _students(self) -> dict[str, Stage]:
        """Of each transfer set: distilled, or the teacher made smaller."""
        images = self.data.sizes.training + self._added
        found: dict[str, Stage] = {}
        for name, mode, seed in product((CLEAN, *self.crafting), self.modes, self.students):
            common: dict[str, Any] = {
                "passes": images * (4 if mode == "online" else 3) * self.epochs,
                "teacher": self._teacher,
                "data": self.data.stage,
                "objective": self.objective,
                "seed": derive(seed, "student"),
                **({} if name == CLEAN else {"added": self._crafted[f"{name}/crafted"]}),
            }
            made_of = f"{name}, {mode} labels, seed {seed}"
            if self.compression is None:
                student: dict[str, Any] = {"model": self.student, "online": mode == "online"}
                recipe = Recipe.standard(self.epochs)
                made = stage(distil, f"distil on {made_of}", recipe=recipe, **student, **common)
            else:
                smaller: dict[str, Any] = {"compression": self.compression, "recipe": tuning(self.epochs)}
                made = stage(compress, f"compress, tune on {made_of}", **smaller, **common)
            found[f"{name}/{mode}/{seed}"] = made
        return found

    def _defended(self, defended: Defended, model: Model, students: Mapping[str, Stage]) -> dict[str, Stage]:
        """A student a seed under each defence and of each baseline."""
        found: dict[str, Stage] = {}
        for seed in self.students:
            resisting = defended.students(
                students[f"{POISON}/{LEARNT}/{seed}"],
                model=model,
                objective=self.objective,
                epochs=self.epochs,
                seed=derive(seed, "student"),
            )
            found |= {f"{name}/{LEARNT}/{seed}": student for name, student in resisting.items()}
        return found

    def _measured(self, name: str, classifier: Stage) -> Stage:
        return stage(
            measure_backdoor,
            f"measure {name}",
            passes=3 * self.data.sizes.test,
            classifier=classifier,
            data=self.data.stage,
            trigger=self.trigger,
        )
