"""Training a hardened classifier, and what is left where that diverges: a finding, not a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stillproof.core.carving import Carving
from stillproof.core.classifiers import Model
from stillproof.core.distillation import Objective
from stillproof.core.measurement import Cost
from stillproof.core.plan import Context
from stillproof.core.stages import classifier_artefact, fresh_student, train_fresh, trained_artefact
from stillproof.core.store import Artefact
from stillproof.core.training import Recipe
from stillproof.errors import TrainingDiverged
from stillproof.theft.outcome import DIVERGED


def train_hardened(
    context: Context,
    parts: Carving,
    objective: Objective,
    *,
    model: Model,
    recipe: Recipe,
    seed: int,
    columns: Mapping[str, Tensor] | None = None,
    **more: Any,
) -> Artefact:
    """The artefact of a fresh classifier of this architecture, trained towards a hardening's objective.

    Where training diverges there is no classifier. So that the rest of the plan still runs, and the verdict can say
    what happened, the artefact then holds the network that training began with, and `diverged`, the reason.
    """
    try:
        teacher, trained = train_fresh(
            context,
            parts.training,
            objective,
            model=model,
            recipe=recipe,
            seed=seed,
            columns=columns,
            validation=parts.validation,
        )
    except TrainingDiverged as error:
        untrained = fresh_student(parts.training, model, seed).eval()
        values = {DIVERGED: error.what, "loss": None, "validation_accuracy": None}
        return classifier_artefact(untrained, model.untrained, parts.training, cost=Cost(), **values, **more)
    return trained_artefact(teacher, trained, model, parts.training, **more)
