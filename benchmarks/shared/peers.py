"""The libraries that people use, as contestants: a classifier, images, labels and a seed in, adversarial images out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Contestant = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
"""(classifier, images, labels, seed) -> adversarial images. Whoever takes no seed has torch's and NumPy's."""


def foolbox_attack(name: str, epsilon: float | None = None, **settings: Any) -> Contestant:
    """An attack of foolbox; without epsilon it looks for the smallest change."""
    import foolbox

    def run(model: nn.Module, images: Tensor, labels: Tensor, _seed: int) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        attack = getattr(foolbox.attacks, name)(**settings)
        _, found, _ = attack(wrapped, images, labels, epsilons=epsilon)
        return found

    return run


def art_attack(name: str, **settings: Any) -> Contestant:
    """An attack of the Adversarial Robustness Toolbox."""
    import art.attacks.evasion as attacks
    from art.estimators.classification import PyTorchClassifier

    def run(model: nn.Module, images: Tensor, labels: Tensor, _seed: int) -> Tensor:
        wrapped = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(images.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
        )
        attack = getattr(attacks, name)(wrapped, **settings)
        return torch.from_numpy(np.asarray(attack.generate(images.numpy(), labels.numpy()), dtype=np.float32))

    return run


def torchattacks_attack(name: str, **settings: Any) -> Contestant:
    """An attack of torchattacks."""
    import torchattacks

    def run(model: nn.Module, images: Tensor, labels: Tensor, _seed: int) -> Tensor:
        return getattr(torchattacks, name)(model, **settings)(images, labels)

    return run


def original_apgd(**settings: Any) -> Contestant:
    """APGD of the authors' AutoAttack, from the checkout that STILLPROOF_AUTOATTACK names."""
    sys.path.insert(0, os.environ["STILLPROOF_AUTOATTACK"])
    from autoattack.autopgd_base import APGDAttack

    def run(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        attack = APGDAttack(model, device="cpu", verbose=False, seed=seed, **settings)
        return attack.perturb(images, labels)

    return run


def importable(peers: Mapping[str, Callable[[], Contestant]], left_out: dict[str, str]) -> dict[str, Contestant]:
    """Those peers that import here; why not, of the others."""
    found: dict[str, Contestant] = {}
    for name, make in peers.items():
        try:
            found[name] = make()
        except Exception as error:  # a peer may fail at import in any way
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found
