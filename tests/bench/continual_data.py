"""Small streams for the tests of `bench continual`."""

import numpy as np

from streamcl.bench.continual_course import Course
from streamcl.bench.continual_streams import Images, _classifier, split


def tiny_images(seed: int = 0, count: int = 200, pixels: int = 16) -> Images:
    """Ten classes that are easy to tell apart; as many again are held out."""
    rng = np.random.default_rng([seed, *b"tiny"])
    y = rng.integers(0, 10, 2 * count)
    x = rng.random((2 * count, pixels)).astype(np.float32) * np.float32(0.3)
    x[np.arange(2 * count), y] = 1.0
    return Images("made", x[:count], y[:count], x[count:], y[count:])


def tiny_course(seed: int) -> Course:
    return split(
        "tiny",
        tiny_images(seed),
        seed,
        settings=_classifier(16, (16,), 0.1),
        memory={"capacity": 50, "per_event": 5},
        every=40,
    )
