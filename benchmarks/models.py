"""The classifiers that benchmarks share: undefended, adversarially trained, defensively distilled.

All are zoo:resnet18?width=16 on CIFAR-10, 12 epochs of the training part of 20 000 images. Each is a stage of the
shared store (STILLPROOF_STORE), so that whoever needs one first trains it: `python benchmarks/models.py` trains all, in
about half an hour on two cores, and prints what they reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from shared.plans import executed
from shared.record import needed_cifar10
from stillproof.core.carving import carve, data_stage
from stillproof.core.classifiers import Model, predict
from stillproof.core.images import ImageSet
from stillproof.core.plan import Context, Stage
from stillproof.core.runtime import Runtime
from stillproof.core.stages import classifier_of, training_stage
from stillproof.core.training import Recipe
from stillproof.evasion.hardening.adversarial_training import AdversarialTraining
from stillproof.evasion.hardening.defensive_distillation import DefensiveDistillation

MODEL = Model("zoo:resnet18?width=16")
RECIPE = Recipe.standard(epochs=12)
LIMIT, SEED = 20_000, 0
TEMPERATURE = 50.0


@dataclass(frozen=True)
class Shared:
    """The classifiers by name, in eval mode, and the test images."""

    classifiers: dict[str, nn.Module]
    test: ImageSet

    def some(self, n: int) -> tuple[Tensor, Tensor]:
        """The first n test images, float32 in [0, 1], and their labels."""
        return self.test.images[:n].float() / 255, self.test.known_labels()[:n]


def shared(runtime: Runtime) -> Shared:
    """Train what is not in the store. Exits where there is no CIFAR-10."""
    place = needed_cifar10("these benchmarks")
    data = data_stage(place, LIMIT)
    images = data.sizes.training
    hardened = AdversarialTraining()
    distilled = DefensiveDistillation(temperature=TEMPERATURE)
    stages: dict[str, Stage] = {
        "data": data.stage,
        "undefended": training_stage(
            "the undefended", data=data.stage, model=MODEL, recipe=RECIPE, seed=SEED, images=images
        ),
        "distilled": distilled.stage(data=data.stage, model=MODEL, recipe=RECIPE, seed=SEED, images=images),
        "adversarially trained": training_stage(
            "the adversarially trained",
            data=data.stage,
            model=MODEL,
            recipe=RECIPE,
            seed=SEED,
            images=images,
            objective=hardened,
            passes=3 * (hardened.steps + 1),
        ),
    }
    values = executed(stages, runtime)
    context = Context(runtime)
    parts = carve(values.pop("data"))
    return Shared({name: classifier_of(value, context) for name, value in values.items()}, parts.test)


def main() -> None:
    """Train all and say what they reach."""
    runtime = Runtime.choose()
    runtime.apply()
    found = shared(runtime)
    for name, classifier in found.classifiers.items():
        right = predict(classifier, found.test, runtime).argmax(1) == found.test.known_labels()
        print(f"{name}: {float(right.double().mean()):.1%} of {len(found.test)} test images")


if __name__ == "__main__":
    main()
