"""How much of your own classifier can be stolen? A classifier and images of your own, in a few lines.

Run it: python examples/own_model.py  (about half a minute on two cores)
The command line does the like with: stillproof steal --victim examples.own_model:my_model --data YOUR.npz
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import stillproof


def my_model(channels: int, size: int, classes: int) -> nn.Module:
    """A classifier that was trained on normalised images; the normalisation goes into it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 64), nn.ReLU(), nn.Linear(64, classes))
    model = stillproof.normalised(network, mean=[0.3] * channels, std=[0.35] * channels)
    images, labels = my_images()
    pixels = torch.from_numpy(images).float().div(255)[:, None]
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(pixels), torch.from_numpy(labels)).backward()
        optimiser.step()
    return model


def my_images() -> tuple[np.ndarray, np.ndarray]:
    """Grey 8×8 images, uint8, and their labels."""
    digits = load_digits()
    return np.rint(digits.images * 15.9375).astype(np.uint8), digits.target.astype(np.int64)


def main() -> None:
    """Steal it, by KD and by the labels alone."""
    with tempfile.TemporaryDirectory() as folder:
        images, labels = my_images()
        np.savez(Path(folder) / "mine.npz", images=images, labels=labels)
        result = stillproof.run(
            "steal",
            stillproof.RunOptions(runs=Path(folder) / "runs"),
            data=str(Path(folder) / "mine.npz"),
            victim=f"{__name__}:my_model" if __name__ != "__main__" else "own_model:my_model",
            thief_model="zoo:cnn?width=8",
            queries="5/class",
            thief=("kd?temperature=4&alpha=0.9", "label-only"),
            thief_epochs=30,
            seeds=2,
        )
    print(result.summary)
    for finding in result.findings:
        print(f"{finding.status:>12}  {finding.rule}  {finding.subject}: {finding.title}")


if __name__ == "__main__":
    main()
