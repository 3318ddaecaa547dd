"""What a stolen copy is good for besides its answers: adversarial examples that the served classifier falls for too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stillproof.attacks.random_draws import RandomDraws
from stillproof.attacks.surrogate import Transfer
from stillproof.attacks.threats import parse_threat
from stillproof.core.carving import carve
from stillproof.core.classifiers import predict
from stillproof.core.images import ImageSet, as_float, as_uint8, stratified
from stillproof.core.measurement import Cost
from stillproof.core.noise import derive
from stillproof.core.plan import Context, job
from stillproof.core.stages import classifier_of
from stillproof.core.store import Artefact
from stillproof.serving.guard import finite
from stillproof.serving.responses import Response
from stillproof.theft.stages import answering

IMAGES = 1000
"""Of the test images, of all classes alike, are tried at most."""

STEPS = 40
"""Of the climb on the copy."""


@job(version=2)
def mislead(
    context: Context,
    copy: Artefact,
    classifier: Artefact,
    data: Artefact,
    helpers: Sequence[Artefact] = (),
    calibration: Artefact | None = None,
    *,
    response: Response | None = None,
    threat: str,
    seed: int,
) -> Artefact:
    """Adversarial examples of a copy, shown once to what is served: bool, (n,), `right` before, `fell`, and `lucky`.

    lucky: it fell to one random change of the same size. Only the copy is climbed; what is shown has 8 bits a channel.
    """
    test = carve(data).test
    labels = test.known_labels()
    share = min(1.0, IMAGES / len(test))
    test = test.subset(stratified(labels, (share, 1 - share), seed=0)[0]) if share < 1 else test
    images, labels = as_float(test.images), test.known_labels()
    served = answering(context, classifier, response, helpers, calibration)

    queries = 0

    def answer(shown: Tensor) -> Tensor:
        nonlocal queries
        queries += len(shown)
        given = ImageSet(as_uint8(shown), None, test.classes, "what is shown to the victim")
        return finite(predict(served, given, context.runtime))

    right = answer(images).argmax(dim=1) == labels
    within = parse_threat(threat)
    surrogates = (classifier_of(copy, context),)
    attacks = {
        "fell": Transfer(surrogates=surrogates, threat=within, steps=STEPS, uint8=True),
        # the image as it is, a draw, and twice room to judge what is handed back: one draw, and no second
        "lucky": RandomDraws(threat=within, queries=4, uint8=True),
    }
    tensors = {"right": right}
    for name, attack in attacks.items():
        found = attack(answer, images, labels, seed=derive(seed, name), runtime=context.runtime)
        # at distance 0 nothing was shown: what is served wavers
        tensors[name] = found.success & right & (found.distance > 0)
    climbed = int(right.sum()) * STEPS
    cost = Cost(queries=queries, forwards=queries * (1 + len(helpers)) + climbed, backwards=climbed)
    return Artefact({}, tensors, cost)
