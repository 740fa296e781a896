"""What `bench continual` streams: tasks one after another, and concepts that drift or come back; same by seed."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from river.datasets import synth

from streamcl.bench.continual_course import Course, Rows
from streamcl.bench.continual_recommender import recommender
from streamcl.bench.streams import DataError, recorded

Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]

MNIST, DIGITS = "mnist.npz", "digits.csv.gz"
DIGITS_COUNT = 1797  # of scikit-learn's; a fifth of each class is held out
PAIRS = tuple((first, first + 1) for first in range(0, 10, 2))

UNSCALED = {"kind": "numeric", "scale": "none"}


@dataclass(frozen=True, slots=True)
class Images:
    """Images as rows of pixels in [0, 1], (N, P) and (N,) classes; `source` says where they come from."""

    source: str
    x: Floats32
    y: Ints
    test_x: Floats32
    test_y: Ints


def mnist(folder: Path | None) -> Images:
    """Raises DataError naming the file that is missing."""
    if folder is None or not (folder / MNIST).is_file():
        raise DataError(f"--data DIR must name the folder that holds {MNIST}")
    with np.load(folder / MNIST) as found:
        x, y, test_x, test_y = (found[name] for name in ("x", "y", "xt", "yt"))
    scaled = [(part.reshape(len(part), -1) / np.float32(255)).astype(np.float32) for part in (x, test_x)]
    return Images("MNIST", scaled[0], y.astype(np.int64), scaled[1], test_y.astype(np.int64))


def digits(folder: Path | None, seed: int) -> Images:
    """Digits of 8 x 8 pixels, of each class a fifth held out, another one by seed.

    They are scikit-learn's, from its file in `folder` or from the installed package (which is not imported); where
    neither is there, as many of MNIST's, its images averaged over 4 x 4 pixels.
    """
    rng = np.random.default_rng([seed, *b"digits"])
    path = _digits_file(folder)
    if path is not None:
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
        source, x, y = "scikit-learn's digits", table[:, :-1] / np.float32(16), table[:, -1].astype(np.int64)
    else:
        large = mnist(folder)
        some = rng.choice(len(large.x), DIGITS_COUNT, replace=False)
        source, x, y = "MNIST, averaged to 8 x 8", pooled(large.x[some]), large.y[some]
    order = rng.permutation(len(x))
    held_out = np.concatenate([(of := order[y[order] == label])[: len(of) // 5] for label in range(10)])
    train = np.setdiff1d(order, held_out)
    return Images(source, x[train], y[train], x[held_out], y[held_out])


def _digits_file(folder: Path | None) -> Path | None:
    if folder is not None and (folder / DIGITS).is_file():
        return folder / DIGITS
    package = find_spec("sklearn")
    folders = (package.submodule_search_locations if package else None) or ()
    paths = (Path(place) / "datasets" / "data" / DIGITS for place in folders)
    return next((path for path in paths if path.is_file()), None)


def pooled(images: Floats32) -> Floats32:
    """(N, 64) of (N, 784): a border of two pixels, then means of 4 x 4."""
    square = np.pad(images.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return np.asarray(square.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(-1, 64), np.float32)


def _classifier(pixels: int, hidden: Sequence[int], learning_rate: float) -> dict[str, Any]:
    return {
        "task": "multiclass",
        "features": {f"p{i:03}": UNSCALED for i in range(pixels)},
        "model": {"kind": "mlp", "hidden": list(hidden), "classes": 10},
        "optimizer": {"kind": "sgd", "learning_rate": learning_rate},
    }


def split(name: str, images: Images, seed: int, limit: int | None = None, **fields: Any) -> Course:
    """Class-incremental: two classes at a time, in the order of their numbers, each example once, in random order.

    `limit`: at most so many examples of a pair. Nothing says which pair an example is of.

    Source:
        Class-incremental scenario of van de Ven & Tolias 2019, arXiv 1904.07734, in one pass.
    """
    rng = np.random.default_rng([seed, *b"split"])
    parts = [rng.permutation(np.flatnonzero(np.isin(images.y, pair)))[:limit] for pair in PAIRS]
    order = np.concatenate(parts)
    tests = [np.isin(images.test_y, pair) for pair in PAIRS]
    return Course(
        name=name,
        source=images.source,
        rows=Rows.of(images.y[order], images.x[order]),
        segments=np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        held_out=tuple(Rows.of(images.test_y[test], images.test_x[test]) for test in tests),
        **fields,
    )


def split_digits(folder: Path | None, seed: int, quick: bool) -> Course:
    return split(
        "split-digits",
        digits(folder, seed),
        seed,
        settings=_classifier(64, (128, 128), 0.05),
        memory={"capacity": 100, "per_event": 10},
        every=20 if quick else 10,
        chosen="settings as published with the task; the average's decay of .98 .99 .995, seeds 100 and 101, by final",
    )


def split_mnist(folder: Path | None, seed: int, quick: bool) -> Course:
    images = mnist(folder)
    kept = 1000 if quick else 2000  # held-out examples: a share of .92 is then known to .6 points (one deviation)
    some = np.random.default_rng([seed, *b"held out"]).permutation(len(images.test_x))[:kept]
    images = Images(images.source, images.x, images.y, images.test_x[some], images.test_y[some])
    return split(
        "split-mnist",
        images,
        seed,
        limit=400 if quick else None,
        settings=_classifier(784, (256,), 0.01),
        memory={"capacity": 1000, "per_event": 30, "weight": 30.0},  # each row weighs as much as the live example
        every=200,
        chosen="rate .003 to .1, 10 to 64 rows, weight 1 to 64, seeds 100 and 101, by final accuracy of the reservoir",
    )


def permuted_mnist(folder: Path | None, seed: int, quick: bool) -> Course:
    """Domain-incremental: each task has new places for the pixels, the same for its 1,000 examples.

    Source:
        Lopez-Paz & Ranzato 2017, arXiv 1706.08840, section 4: 20 tasks of 1,000 examples, one pass, MLP of two hidden
        layers of 100, 256 memories a task.

    Differs from the source:
        One example at a time, not ten; a memory of 20 x 256 for all tasks together, whose retention is the recipe's;
        500 held-out examples, the same for all tasks, instead of 10,000.
    """
    tasks, per_task, kept = (4, 300, 200) if quick else (20, 1000, 500)
    images = mnist(folder)
    rng = np.random.default_rng([seed, *b"permuted-mnist"])
    test = rng.choice(len(images.test_x), kept, replace=False)
    places = [rng.permutation(784) for _ in range(tasks)]
    which = [rng.choice(len(images.x), per_task, replace=False) for _ in range(tasks)]
    x = np.concatenate([images.x[some][:, columns] for some, columns in zip(which, places, strict=True)])
    return Course(
        name="permuted-mnist",
        source=images.source,
        settings=_classifier(784, (100, 100), 0.01),
        memory={"capacity": 256 * tasks, "per_event": 10, "weight": 5.0},
        rows=Rows.of(images.y[np.concatenate(which)], x),
        segments=np.repeat(np.arange(tasks), per_task),
        held_out=tuple(Rows.of(images.test_y[test], images.test_x[test][:, columns]) for columns in places),
        every=per_task,
        chosen="rate .005 to .03, 10 or 30 rows, weight 1 to 30, seeds 100 and 101, by accuracy of the reservoir",
    )


ON_NUMBERS: Mapping[str, Any] = {
    "task": "binary",
    "model": {"kind": "mlp", "hidden": [32]},
    "optimizer": {"kind": "adam", "learning_rate": 2e-3},
}


def _recurring(name: str, concepts: Sequence[Any], per_visit: int) -> Course:
    """Concept A, then B, then A again; nothing says when, and what is true in A is in part false in B."""
    visits = [concepts[0], concepts[1], concepts[0]]
    pairs = [pair for number, concept in enumerate(visits) for pair in _visit(concept, number, per_visit)]
    fields = sorted(pairs[0][0])  # SEA's are numbers
    numbers = np.array([[float(x[field]) for field in fields] for x, _ in pairs], np.float32)
    return Course(
        name=name,
        source="River's generator",
        settings={**ON_NUMBERS, "features": {str(field): "numeric" for field in fields}},
        memory={"capacity": 1000, "per_event": 16},
        rows=Rows.of(np.array([float(y) for _, y in pairs]), numbers),
        segments=np.repeat(np.arange(len(visits)), per_visit),
        drifts=(per_visit, 2 * per_visit),
    )


def _visit(concept: Callable[[int], Any], number: int, count: int) -> list[Any]:
    return list(concept(number).take(count))


def recurring_sea(folder: Path | None, seed: int, quick: bool) -> Course:  # noqa: ARG001 - one signature for all
    """A: x1 + x2 <= 9.5; B: x1 + x2 <= 7: they disagree on 21 % of the examples. A tenth of the labels is turned."""
    a, b = (lambda n, v=v: synth.SEA(variant=v, seed=1000 * seed + n, noise=0.1) for v in (3, 2))
    return _recurring("recurring-sea", (a, b), 1000 if quick else 5000)


def recurring_agrawal(folder: Path | None, seed: int, quick: bool) -> Course:  # noqa: ARG001
    """A: by age alone; B: by age and salary (functions 0 and 1 of the generator). Categories are read as numbers."""
    a, b = (lambda n, f=f: synth.Agrawal(classification_function=f, seed=1000 * seed + n) for f in (0, 1))
    return _recurring("recurring-agrawal", (a, b), 1000 if quick else 5000)


def elec2(folder: Path | None, seed: int, quick: bool) -> Course:  # noqa: ARG001
    """Elec2, in its order; seeds differ by the model's initial weights and its draws alone."""
    data = recorded("elec", folder)
    payloads = data.payloads[:3000] if quick else data.payloads
    names = sorted(data.features)
    numbers = np.array([[float(payload[name]) for name in names] for payload in payloads], np.float32)
    return Course(
        name="elec2",
        source="Elec2",
        settings={**ON_NUMBERS, "features": dict.fromkeys(names, "numeric")},
        memory={"capacity": 1000, "per_event": 16},
        rows=Rows.of(np.array([float(payload["label"]) for payload in payloads]), numbers),
        segments=np.zeros(len(payloads), np.int64),
    )


STREAMS: dict[str, Callable[[Path | None, int, bool], Course]] = {
    "split-digits": split_digits,
    "split-mnist": split_mnist,
    "permuted-mnist": permuted_mnist,
    "recommender": recommender,
    "recurring-sea": recurring_sea,
    "recurring-agrawal": recurring_agrawal,
    "elec2": elec2,
}
"""By name: a course of (folder of recorded streams, seed, quick). Raises DataError where recorded data is missing."""
