"""What the plasticity bench streams: tasks that change now and then, so that a learner must go on learning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamcl.bench.plasticity_learner import Examples
from streamcl.bench.quality import Floats
from streamcl.bench.streams import DataError

MNIST = "mnist.npz"

BITS, SLOW_BITS = 20, 15
TARGET_UNITS, BETA = 100, 0.7
CHANGE_EVERY = 10_000


class SlowlyChanging:
    """Slowly-changing regression: a target net too rich for the learner, of which one region at a time is seen.

    Of 20 bits the last five are fair coins at every example; the first 15 are redrawn, all at once, every
    `change_every` examples. The target: 100 threshold units, all weights and biases ±1; a unit fires if
    `b + w x > .7 · 21 - S`; y = ±1 + the sum of ± the units.

    Source:
        Dohare et al. 2024, Nature 632:768-774; constants of the code `shibhansh/loss-of-plasticity`, without
        `flip_one`.

    Differs from the source:
        Nothing but the generator. As in that code, and unlike the paper's text, S = (20 - Σw + b) / 2: not quite the
        number of weights at -1.
    """

    def __init__(self, seed: int, change_every: int = CHANGE_EVERY) -> None:
        self.change_every = change_every
        self.rng = np.random.default_rng([seed, *b"slowly-changing-regression"])
        self.weights = self._signs(TARGET_UNITS, BITS)
        self.biases = self._signs(TARGET_UNITS)
        self.out_weights = self._signs(TARGET_UNITS)
        self.out_bias = self._signs(1)
        minus = (BITS - self.weights.sum(axis=1) + self.biases) / 2
        self.thresholds = BETA * (BITS + 1) - minus

    def _signs(self, *shape: int) -> NDArray[np.float32]:
        return (2 * self.rng.integers(0, 2, shape) - 1).astype(np.float32)

    def regions(self) -> Iterator[Examples]:
        """For ever: `change_every` examples that share their slow bits."""
        while True:
            slow = self.rng.integers(0, 2, SLOW_BITS)
            fast = self.rng.integers(0, 2, (self.change_every, BITS - SLOW_BITS))
            seen = np.empty((1 << (BITS - SLOW_BITS), BITS), np.uint8)  # every input there can be in this region
            seen[:, :SLOW_BITS] = slow
            seen[:, SLOW_BITS:] = np.arange(len(seen))[:, None] >> np.arange(BITS - SLOW_BITS) & 1
            which = fast @ (1 << np.arange(BITS - SLOW_BITS))
            yield Examples(seen[which], self.target(seen)[which])

    def target(self, inputs: NDArray[np.uint8]) -> Floats:
        """(N,) of inputs (N, 20): whole numbers."""
        sums = inputs.astype(np.float32) @ self.weights.T + self.biases  # (N, 100), exact
        return np.asarray((sums > self.thresholds) @ self.out_weights + self.out_bias, np.float64)


@dataclass(frozen=True, slots=True)
class Task:
    """One task on images: which, with their pixels in which order, and with which labels (M,)."""

    order: NDArray[np.int64]
    columns: NDArray[np.int64]
    targets: Floats


class Images:
    """MNIST's training images, one example at a time; a new task every `per_task` of them, and nothing says so.

    `permuted`: new places for the pixels. `label_permuted`: each class gets the number of another.

    Source:
        Goodfellow et al. 2013, arXiv 1312.6211, and Dohare et al. 2024, for the first; Elsayed & Mahmood 2024,
        arXiv 2404.00781, for the second.

    Differs from the source:
        Fewer examples, tasks and units, see the bench's configuration; labels are MNIST's, not EMNIST's.
    """

    def __init__(self, folder: Path | None) -> None:
        """Raises DataError naming the file that is missing or is not what it should be."""
        if folder is None:
            raise DataError(f"--data DIR must name the folder that holds {MNIST}")
        path = folder / MNIST
        try:
            with np.load(path) as found:
                images, labels = found["x"], found["y"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: no arrays x (N, 28, 28) and y (N,) to read ({error})") from error
        if images.ndim != 3 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise DataError(f"{path}: x is {images.dtype} {images.shape}, y {labels.shape}; want uint8 (N, H, W), (N,)")
        self.classes = int(labels.max()) + 1
        self.examples = Examples(images.reshape(len(images), -1), labels.astype(np.float64), scale=1 / 255)

    def permuted(self, seed: int, per_task: int) -> Iterator[Task]:
        """For ever."""
        rng = np.random.default_rng([seed, *b"permuted-mnist"])
        total, pixels = self.examples.inputs.shape
        while True:
            columns = rng.permutation(pixels)
            yield Task(_some(rng, total, per_task), columns, self.examples.targets)

    def label_permuted(self, seed: int, per_task: int) -> Iterator[Task]:
        """For ever."""
        rng = np.random.default_rng([seed, *b"label-permuted"])
        total, pixels = self.examples.inputs.shape
        while True:
            names = rng.permutation(self.classes).astype(np.float64)
            yield Task(_some(rng, total, per_task), np.arange(pixels), names[self.examples.targets.astype(np.int64)])


def _some(rng: np.random.Generator, total: int, count: int) -> NDArray[np.int64]:
    """`count` of `total`, none twice, in random order."""
    return np.asarray(rng.permutation(total)[:count], np.int64)
