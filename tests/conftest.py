"""What many tests use: the machine's runtime, real digits, a place for CIFAR-10."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from stillproof.core.images import ImageSet
from stillproof.core.runtime import Runtime
from stillproof.core.sources import DataSource
from stillproof.core.sources.digits import Digits


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    """The runtime of this machine."""
    chosen = Runtime.choose()
    chosen.apply()
    return chosen


@pytest.fixture(scope="session")
def digits() -> DataSource:
    """scikit-learn's digits."""
    return Digits().load()


@pytest.fixture
def toy() -> ImageSet:
    """Sixty random 8×8 images of three classes."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(60) % 3, ("a", "b", "c"), "toy")


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The folder of CIFAR-10, where the environment names one."""
    place = os.environ.get("STILLPROOF_CIFAR10")
    if not place:
        pytest.skip("left out: STILLPROOF_CIFAR10 names no folder with CIFAR-10")
    return Path(place)
