"""The job of an audit, and what its artefact holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn

from stillproof.attacks.frozen import Classifier
from stillproof.attacks.threats import parse_threat
from stillproof.core.adapters import logits_of
from stillproof.core.carving import carve
from stillproof.core.classifiers import kind_of_output, predict
from stillproof.core.images import ImageSet, as_float, stratified
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive, permutation
from stillproof.core.plan import Context, job
from stillproof.core.plugins import call_with_options, code_identity, user_code
from stillproof.core.spec import Spec
from stillproof.core.stages import classifier_of
from stillproof.core.store import Artefact
from stillproof.core.weights import state_digest
from stillproof.errors import BudgetExceeded, InputError
from stillproof.evasion.allowance import Budget
from stillproof.evasion.auditing import Audited, Thoroughness, audit
from stillproof.evasion.evidence import Evidence
from stillproof.serving.guard import finite
from stillproof.serving.http import Endpoint, HttpClassifier


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

    def check(self) -> None:
        """Raise InputError for what names no factory."""
        if self.spec is not None and not Spec.parse(self.spec).runs_code:
            raise InputError(f"{self.spec!r} is no adaptive attack.", "Name a factory: package.module:factory.")

    def build(self, classifier: nn.Module) -> object:
        """An attack, a loss, or a module to climb through. Raises InputError."""
        if self.spec is None:
            return None
        spec = Spec.parse(self.spec)
        try:
            return user_code(spec)(classifier)
        except Exception as error:  # the user's code may do anything
            raise InputError(f"{spec.name} fails: {type(error).__name__}: {error}", "Mend the factory.") from error


SATURATING = 250.0
"""Median margin at which most images have no gradient of the cross-entropy (float32 holds none over 104)."""


LARGEST = 1e6
"""Factor on the logits, beyond which they might overflow: a classifier whose answers are all but equal has no masked
twin."""


class Scaled(nn.Module):
    """A classifier whose logits are multiplied: the same decisions, and masked gradients if by enough."""

    def __init__(self, classifier: nn.Module, factor: float) -> None:
        super().__init__()
        self.classifier, self.factor = classifier, factor

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits, (N, K)."""
        logits: Tensor = self.classifier(images)
        return logits * self.factor


@job(version=11)
def audit_classifier(
    context: Context,
    classifier: Artefact,
    data: Artefact,
    twins: Sequence[Artefact] = (),
    *,
    threat: str,
    thoroughness: Thoroughness,
    budget: Budget,
    adaptive: Adaptive,
    scale: float,
    seed: int,
) -> Artefact:
    """All that `Evidence` holds, of the first test images. scale: factor on the logits at least, to plant a masked
    twin: more where that would leave gradients."""
    test = _tested(data, thoroughness)
    model = classifier_of(classifier, context)
    if scale != 1:
        margins = predict(model, test, context.runtime).topk(2, dim=1).values
        usual = float((margins[:, 0] - margins[:, 1]).median())
        model = Scaled(model, min(max(scale, SATURATING / max(usual, 1e-9)), LARGEST)).eval()
    audited = audit(
        model,
        as_float(test.images),
        test.known_labels(),
        parse_threat(threat),
        outputs=classifier.values.get("outputs", "logits"),
        classes=len(test.classes),
        thoroughness=thoroughness,
        budget=budget,
        twins=[classifier_of(twin, context) for twin in twins],
        adaptive=adaptive.build(model),
        runtime=context.runtime,
        seed=seed,
        checkpoint=context.checkpoint,
        advance=context.advance,
    )
    return artefact_of(audited, test)


@dataclass(frozen=True, slots=True)
class BlackBox:
    """What only answers: an endpoint (`http://…`), or a `module:factory` whose product is called with images."""

    spec: str
    queries: int | None = None

    @property
    def code(self) -> str | None:
        """What runs code."""
        return self.spec if Spec.parse(self.spec).runs_code else None

    def identity(self) -> Mapping[str, object]:
        """The place, and the code and weights that are found there; what stands behind an endpoint is not known."""
        spec = Spec.parse(self.spec)
        found: dict[str, object] = {"spec": self.spec, "queries": self.queries}
        if spec.runs_code:
            made = call_with_options(user_code(spec), spec)
            found["code"] = code_identity(spec)
            found["state"] = state_digest(made) if isinstance(made, nn.Module) else None
        return found

    def check(self) -> None:
        """Raise InputError for what is neither."""
        spec = Spec.parse(self.spec)
        if not spec.runs_code:
            Endpoint.parse(self.spec)

    def open(self) -> Asked | HttpClassifier:
        """Ready to be asked. Raises InputError."""
        spec = Spec.parse(self.spec)
        if not spec.runs_code:
            return HttpClassifier(Endpoint.parse(self.spec), budget=self.queries)
        made = call_with_options(user_code(spec), spec)
        if not callable(made):
            raise InputError(f"{spec.name} returned {type(made).__name__}.", "A factory returns something to call.")
        return Asked(made, self.queries)


class Asked:
    """A black box as attacks ask it: it counts, and never gives more answers than its budget, if it has one."""

    def __init__(self, answer: Classifier, budget: int | None) -> None:
        self.answer = answer.eval() if isinstance(answer, nn.Module) else answer
        self.budget = budget
        self.queries = 0
        self.kind = "logits"

    def __call__(self, images: Tensor) -> Tensor:
        if self.budget is not None and self.queries + len(images) > self.budget:
            raise BudgetExceeded(f"{self.queries} of {self.budget} queries are spent.", "Raise the budget of queries.")
        self.queries += len(images)
        with torch.no_grad():
            found = self.answer(images.contiguous())
        if (
            isinstance(found, Tensor)
            and found.ndim == 2
            and found.is_floating_point()
            and kind_of_output(found) == "probabilities"
        ):
            self.kind = "probabilities"
            return logits_of(found.float())
        return finite(found) if isinstance(found, Tensor) and bool(found.isneginf().any()) else found


@job(version=5)
def audit_black_box(
    context: Context,
    data: Artefact,
    twins: Sequence[Artefact] = (),
    *,
    box: BlackBox,
    threat: str,
    thoroughness: Thoroughness,
    budget: Budget,
    seed: int,
) -> Artefact:
    """The same of what only answers: attacks without gradients, and transfer."""
    test = _tested(data, thoroughness)
    asked = box.open()
    audited = audit(
        asked,
        as_float(test.images),
        test.known_labels(),
        parse_threat(threat),
        classes=len(test.classes),
        thoroughness=thoroughness,
        budget=budget,
        twins=[classifier_of(twin, context) for twin in twins],
        runtime=context.runtime,
        seed=seed,
        checkpoint=context.checkpoint,
        advance=context.advance,
    )
    made = artefact_of(audited, test)
    outputs = asked.kind or "logits"
    values = made.values if audited.evidence.outputs == "labels" else {**made.values, "outputs": outputs}
    return replace(made, values=values, cost=Cost(queries=asked.queries))


def _tested(data: Artefact, thoroughness: Thoroughness) -> ImageSet:
    """Some of the test images, of all classes alike, in an order that is not that of the classes."""
    test = carve(data).test
    share = min(1.0, thoroughness.images / len(test))
    labels = test.known_labels()
    rows = stratified(labels, (share, 1 - share), seed=0)[0] if share < 1 else torch.arange(len(test))
    return test.subset(rows[permutation(len(rows), derive(0, "audited"))])


def artefact_of(audited: Audited, test: ImageSet) -> Artefact:
    """What is kept of an audit."""
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
    return Artefact(values, tensors, audited.cost)


def evidence_of(audited: Artefact) -> Evidence:
    """What an audit saw."""
    arrays = {name: tensor.numpy() for name, tensor in audited.tensors.items()}
    close = {name.removeprefix("close."): value for name, value in arrays.items() if name.startswith("close.")}
    known = {part.name for part in fields(Evidence)}
    given = {name: value for name, value in {**arrays, **audited.values}.items() if name in known}
    return Evidence(**given, close=close)
