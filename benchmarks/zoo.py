"""Every model of the zoo after a smoke training on CIFAR-10: parameters and accuracy.

The smoke profile's training: 2 epochs by the standard recipe, on the training part of 5 000 images; one seed;
accuracy on 5 000 test images. That a model trains at all is what this shows, not what it can reach.
`python benchmarks/zoo.py [NAME ...]`
"""

from __future__ import annotations

import sys

import torch

from shared.plans import executed
from shared.record import needed_cifar10, record
from stillproof.core import measures
from stillproof.core.carving import data_stage
from stillproof.core.classifiers import Model
from stillproof.core.plan import stage
from stillproof.core.plugins import table
from stillproof.core.runtime import Runtime
from stillproof.core.stages import answer_part, training_stage
from stillproof.core.training import Recipe

SEEDS = (0,)
LIMIT, EPOCHS = 5000, 2
SHAPE, CLASSES = (3, 32, 32), 10


def main() -> None:
    """Train each."""
    place = needed_cifar10("the zoo's accuracy")
    runtime = Runtime.choose()
    runtime.apply()
    data = data_stage(place, LIMIT)
    for name in sys.argv[1:] or table("model"):
        model = Model(f"zoo:{name}")
        stages = {}
        for seed in SEEDS:
            trained = training_stage(
                name,
                data=data.stage,
                model=model,
                recipe=Recipe.standard(EPOCHS),
                seed=seed,
                images=data.sizes.training,
            )
            stages[str(seed)] = stage(answer_part, f"ask {name}", classifier=trained, data=data.stage, part="test")
        answers = executed(stages, runtime).values()
        right = [found.tensors["logits"].argmax(1) == found.tensors["labels"] for found in answers]
        accuracy = measures.mean_share(torch.stack(right).numpy())
        parameters = sum(p.numel() for p in model.fresh(SHAPE, CLASSES, 0).parameters())
        record("zoo", settings={"limit": LIMIT, "epochs": EPOCHS, "seeds": list(SEEDS)})
        record("zoo", **{name: {"parameters": parameters, "accuracy": accuracy.model_dump(mode="json")}})


if __name__ == "__main__":
    main()
