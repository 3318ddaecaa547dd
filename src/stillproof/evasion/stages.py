"""The job of an audit, and what its artefact holds."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from stillproof.attacks.threats import parse_threat
from stillproof.core.carving import carve
from stillproof.core.images import ImageSet, as_float
from stillproof.core.measurement import Cost
from stillproof.core.plan import Context, job
from stillproof.core.plugins import code_identity, user_code
from stillproof.core.spec import Spec
from stillproof.core.stages import classifier_of
from stillproof.core.store import Artefact
from stillproof.errors import InputError
from stillproof.evasion.auditing import Audited, Thoroughness, audit
from stillproof.evasion.escalation import Budget
from stillproof.evasion.indicators import Evidence


@dataclass(frozen=True, slots=True)
class Adaptive:
    """The user's own attack: `module:factory`, called with the classifier. None where there is none."""

    spec: str | None = None

    @property
    def code(self) -> str | None:
        """What runs code."""
        return self.spec

    def identity(self) -> str | None:
        """Changes whenever the file with the factory does."""
        return None if self.spec is None else f"{self.spec} {code_identity(Spec.parse(self.spec))}"

    def build(self, classifier: nn.Module) -> object:
        """An attack, a loss, or a module to climb through. Raises InputError."""
        if self.spec is None:
            return None
        spec = Spec.parse(self.spec)
        if not spec.runs_code:
            raise InputError(f"{self.spec!r} is no adaptive attack.", "Name a factory: package.module:factory.")
        try:
            return user_code(spec)(classifier)
        except Exception as error:  # the user's code may do anything
            raise InputError(f"{spec.name} fails: {type(error).__name__}: {error}", "Mend the factory.") from error


class Scaled(nn.Module):
    """A classifier whose logits are multiplied: the same decisions, and masked gradients if by enough."""

    def __init__(self, classifier: nn.Module, factor: float) -> None:
        super().__init__()
        self.classifier, self.factor = classifier, factor

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits, (N, K)."""
        logits: Tensor = self.classifier(images)
        return logits * self.factor


@job(version=1)
def audit_classifier(
    context: Context,
    classifier: Artefact,
    data: Artefact,
    twin: Artefact | None = None,
    *,
    threat: str,
    thoroughness: Thoroughness,
    budget: Budget,
    adaptive: Adaptive,
    scale: float,
    seed: int,
) -> Artefact:
    """All that `Evidence` holds, of the first test images. scale: factor on the logits, to plant a masked twin."""
    test = carve(data).test
    test = test.subset(torch.arange(min(thoroughness.images, len(test))))
    model = classifier_of(classifier, context)
    model = model if scale == 1 else Scaled(model, scale).eval()
    audited = audit(
        model,
        as_float(test.images),
        test.known_labels(),
        parse_threat(threat),
        outputs=classifier.values.get("outputs", "logits"),
        classes=len(test.classes),
        thoroughness=thoroughness,
        budget=budget,
        twins=[] if twin is None else [classifier_of(twin, context)],
        adaptive=adaptive.build(model),
        runtime=context.runtime,
        seed=seed,
        checkpoint=context.checkpoint,
        advance=context.advance,
    )
    return _artefact(audited, test)


def _artefact(audited: Audited, test: ImageSet) -> Artefact:
    evidence, shown = audited.evidence, list(audited.shown)
    tensors: dict[str, Tensor] = {
        "shown.clean": test.images[shown],
        "shown.adversarial": torch.stack(list(audited.shown.values())) if shown else torch.zeros(0),
        **{f"close.{name}": torch.from_numpy(value) for name, value in evidence.close.items()},
    }
    values: dict[str, object] = {"shown": shown, "classes": list(test.classes)}
    for part in fields(evidence):
        value = getattr(evidence, part.name)
        if isinstance(value, np.ndarray):
            tensors[part.name] = torch.from_numpy(value).contiguous()
        elif part.name != "close":
            values[part.name] = value
    n, trail = len(test), evidence.trail
    cost = Cost(
        forwards=sum(step["forwards"] for step in trail) + 3 * n,
        backwards=sum(step["backwards"] for step in trail) + 2 * n,
        queries=sum(step["queries"] for step in trail),
    )
    return Artefact(values, tensors, cost)


def evidence_of(audited: Artefact) -> Evidence:
    """What an audit saw."""
    arrays = {name: tensor.numpy() for name, tensor in audited.tensors.items()}
    close = {name.removeprefix("close."): value for name, value in arrays.items() if name.startswith("close.")}
    known = {part.name for part in fields(Evidence)}
    given = {name: value for name, value in {**arrays, **audited.values}.items() if name in known}
    return Evidence(**given, close=close)
