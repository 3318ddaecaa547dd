"""A data set that need not fit into memory: its pixels stay in a file that is mapped, and any verb runs on it.

Run it: python examples/larger_than_memory.py  (a few seconds; it writes a small set to a temporary folder)
`write` makes a synthetic set of any size; `images` is what a data SPEC names:
  stillproof distill --data 'larger_than_memory:images?folder=/big/disk' --teacher zoo:cnn --student zoo:cnn
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import stillproof

CLASSES = 10
PIXELS, LABELS = "pixels.npy", "labels.npy"


def write(folder: Path, n: int, size: int) -> None:
    """n colour images: each class has a picture of its own, seen through noise. Written a few thousand at a time."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(60, 196, (CLASSES, 3, size, size))
    labels = np.arange(n) % CLASSES
    np.save(folder / LABELS, labels)
    pixels = np.lib.format.open_memmap(folder / PIXELS, mode="w+", dtype=np.uint8, shape=(n, 3, size, size))
    for start in range(0, n, 2048):
        drawn = labels[start : start + 2048]
        noise = generator.integers(-60, 60, (len(drawn), 3, size, size), dtype=np.int16)
        pixels[start : start + 2048] = (patterns[drawn] + noise).astype(np.uint8)


def images(folder: str) -> stillproof.DataSource:
    """The set as ImageSets whose pixels are mapped, not read; every tenth image is for the test."""
    pixels = torch.from_numpy(np.load(Path(folder) / PIXELS, mmap_mode="c"))
    labels = torch.from_numpy(np.load(Path(folder) / LABELS))
    held_out = len(labels) // 10
    names = tuple(f"class {number}" for number in range(CLASSES))
    train = stillproof.ImageSet(pixels[held_out:], labels[held_out:], names, "synthetic")
    test = stillproof.ImageSet(pixels[:held_out], labels[:held_out], names, "synthetic")
    return stillproof.DataSource(train, test)


def main() -> None:
    """Distil on a small one."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), n=4000, size=16)
        sys.path.insert(0, str(Path(__file__).parent))
        result = stillproof.run(
            "distill",
            stillproof.RunOptions(runs=Path(folder) / "runs"),
            data=f"larger_than_memory:images?folder={folder}",
            teacher="zoo:cnn?width=8",
            student="zoo:cnn?width=4",
            epochs=2,
        )
    print(result.summary)


if __name__ == "__main__":
    main()
