"""The stages of a theft: victims and their defences are made, thieves ask and train, all are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillproof.core.carving import Data
from stillproof.core.classifiers import Model
from stillproof.core.noise import derive
from stillproof.core.plan import Stage, stage
from stillproof.core.stages import answer_part, classifier_stage, training_stage
from stillproof.core.training import Recipe
from stillproof.serving.oracle import Reveal
from stillproof.theft import reference, reuse
from stillproof.theft.asking import ChoosesQueries, Situation
from stillproof.theft.cast import REFERENCE, Cast
from stillproof.theft.defences import Served, served_by
from stillproof.theft.lesson import Candidate, trainings
from stillproof.theft.stages import HELD_OUT, Origin, answer_test, ask, attempt, calibrate, draw, settle, signal
from stillproof.theft.transfer import Queries


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What all thefts of one budget of queries have in common.

    others: other people's images, for thieves who ask about such; response_l1: the distance that responses are tuned
    to; transfer: the threat within which adversarial examples of the copies are made.
    """

    cast: Cast
    data: Data
    others: Data | None
    queries: Queries
    origin: Origin
    labelled: bool
    reveal: Reveal
    victim: Model
    thief: Model
    recipe: Recipe
    thief_recipe: Recipe
    response_l1: float | None = None
    transfer: str | None = None

    @property
    def asked(self) -> int:
        """How many queries a thief has."""
        return self.queries.total(self.data.classes)

    def stages(self) -> dict[str, Stage]:
        """By name: `SEED/SERVED/WHAT`, and `SEED/reference`. Raises InputError."""
        outputs: dict[str, Stage] = {"data": self.data.stage}
        for number, seed in enumerate(self.cast.seeds):
            outputs |= self._of_seed(number, seed)
        return outputs

    def _of_seed(self, number: int, seed: int) -> dict[str, Stage]:
        found: dict[str, Stage] = {}
        victim = classifier_stage("the victim", seed=seed, **self._victims)
        drawn = stage(
            draw,
            f"draw queries, seed {seed}",
            data=self.data.stage,
            queries=self.queries,
            origin=self.origin,
            labelled=self.labelled,
            seed=seed,
        )
        if self.labelled:
            found[f"{seed}/{REFERENCE}"] = self._distilled(
                f"reference, seed {seed}", drawn, reference.candidates(), seed
            )
        served = {"victim": Served(victim)} | {name: self._behind(name, victim, seed) for name in self.cast.defences}
        for name, given in served.items():
            behind = self._at_equal_cost(name, given, drawn, seed)
            found |= self._measured(name, behind, drawn, seed)
            found |= self._stolen(name, behind, drawn, seed)
            if self.transfer is not None:
                found |= self._reused(name, behind, found, seed)
        if any(behind.classifier is not victim for behind in served.values()):
            seeds = self.cast.seeds
            found[f"{seed}/retrained/signal"] = stage(
                signal,
                f"signal of another victim, seed {seed}",
                passes=self.asked,
                classifier=training_stage(
                    "the victim",
                    seed=seeds[(number + 1) % len(seeds)] if len(seeds) > 1 else seed + 1,
                    **self._victims,
                ),
                drawn=drawn,
            )
        return found

    @property
    def _victims(self) -> dict[str, Any]:
        images = self.data.sizes.training
        return {"data": self.data.stage, "model": self.victim, "recipe": self.recipe, "images": images}

    def _behind(self, name: str, victim: Stage, seed: int) -> Served:
        common: dict[str, Any] = {"recipe": self.recipe, "images": self.data.sizes.training, "seed": seed}
        return served_by(self.cast.defences[name], victim, self.data.stage, **common)

    def _at_equal_cost(self, name: str, behind: Served, drawn: Stage, seed: int) -> Served:
        """What is served, its response tuned to the distance that was asked for."""
        if self.response_l1 is None or behind.response is None or behind.response.strength is None:
            return behind
        tuning = stage(
            calibrate,
            f"calibrate {name}, seed {seed}",
            passes=self.asked * (1 + len(behind.helpers)),
            classifier=behind.classifier,
            drawn=drawn,
            l1=self.response_l1,
            **behind.asked,
        )
        return replace(behind, calibration=tuning)

    def _measured(self, name: str, behind: Served, drawn: Stage, seed: int) -> dict[str, Stage]:
        """What is served about the test images and about the queries."""
        found: dict[str, Stage] = {}
        if behind.calibration is not None:
            found[f"{seed}/{name}/calibration"] = behind.calibration
        found[f"{seed}/{name}/model"] = behind.classifier
        asked: dict[str, Any] = {"classifier": behind.classifier, **behind.asked}
        job, part = (answer_part, {"part": "test"}) if behind.response is None else (answer_test, {})
        test = {"passes": self.data.sizes.test, "data": self.data.stage, **asked, **part}
        found[f"{seed}/{name}/test"] = stage(job, f"measure {name}, seed {seed}", **test)
        label = f"signal of {name}, seed {seed}"
        found[f"{seed}/{name}/signal"] = stage(signal, label, passes=self.asked, drawn=drawn, **asked)
        return found

    def _stolen(self, name: str, behind: Served, drawn: Stage, seed: int) -> dict[str, Stage]:
        """A student of each thief."""
        serving: dict[str, Any] = {"served": behind.classifier, "reveal": self.reveal, **behind.asked}
        transfer = stage(ask, f"ask {name}, seed {seed}", passes=self.asked, drawn=drawn, **serving)
        situation = Situation(
            serving=serving,
            drawn=drawn,
            data=self.data.stage,
            others=None if self.others is None else self.others.stage,
            queries=self.asked,
            origin=self.origin,
            model=self.thief,
            recipe=self.thief_recipe,
            seed=derive(seed, "thief"),
        )
        found: dict[str, Stage] = {}
        for thief_name, thief in self.cast.thieves.items():
            label = f"{thief.title} from {name}, seed {seed}"
            own = thief.transfer(f"{label}: ask", situation) if isinstance(thief, ChoosesQueries) else transfer
            found[f"{seed}/{name}/{thief_name}"] = self._distilled(label, own, thief.candidates(), seed)
        return found

    def _distilled(self, name: str, transfer: Stage, candidates: Sequence[Candidate], seed: int) -> Stage:
        """The best of the candidates by held-out queries, trained on all of them."""
        # a thief does not know the weights that the victim began with
        common: dict[str, Any] = {"transfer": transfer, "model": self.thief, "recipe": self.thief_recipe}
        common["seed"] = derive(seed, "thief")
        epochs = self.thief_recipe.epochs
        kept = round(self.asked * (1 - HELD_OUT))
        attempts = [
            stage(attempt, f"{name}: try {one}", passes=3 * kept * epochs * trainings(one), objective=one, **common)
            for one in candidates
        ]
        return stage(
            settle,
            f"{name}: settle",
            passes=3 * self.asked * epochs * max(map(trainings, candidates)) + self.data.sizes.test,
            attempts=attempts,
            data=self.data.stage,
            objectives=candidates,
            **common,
        )

    def _reused(self, name: str, behind: Served, found: Mapping[str, Stage], seed: int) -> dict[str, Stage]:
        """Adversarial examples of each copy, shown to what is served."""
        images = min(reuse.IMAGES, self.data.sizes.test)
        return {
            f"{seed}/{name}/{copy}/reused": stage(
                reuse.mislead,
                f"transfer from {copy} to {name}, seed {seed}",
                passes=3 * reuse.STEPS * images,
                copy=found[f"{seed}/{REFERENCE}" if copy == REFERENCE else f"{seed}/{name}/{copy}"],
                data=self.data.stage,
                threat=self.transfer,
                seed=seed,
                classifier=behind.classifier,
                **behind.asked,
            )
            for copy in self.cast.copies(labelled=self.labelled)
        }
