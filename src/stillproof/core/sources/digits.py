"""scikit-learn's digits: real images that every installation has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from stillproof.core.images import ImageSet
from stillproof.core.sources.source import Facts, Opened, Source, split_of, with_own_test_set


@dataclass(frozen=True, kw_only=True)
class Digits(Source):
    """scikit-learn's 1 797 handwritten digits, 8×8, grey; 30 % of each class are the test set."""

    def identity(self) -> Mapping[str, object]:
        return {"source": "digits"}

    def facts(self) -> Facts:
        return Facts(1258, 539, 10)

    def open(self) -> Opened:
        from sklearn.datasets import load_digits  # takes a second to import

        bunch = load_digits()
        images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
        labels = torch.from_numpy(bunch.target.astype(np.int64))
        whole = ImageSet(images, labels, tuple("0123456789"), "digits")
        return with_own_test_set(split_of(whole), whole.classes, whole.name)._replace(has_own_test=True)
