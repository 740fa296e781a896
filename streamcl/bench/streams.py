"""What is streamed: recorded streams from a folder, and synthetic ones whose best possible loss is known."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from streamcl.bench.quality import Floats
from streamcl.protocols import StreamclError
from streamcl.random import below, key_of

ML_100K = "ml-100k/ml-100k.inter.gz"
ELEC = "elec.csv.gz"
YOOCHOOSE = "yoochoose/period_0.txt.gz"
ELEC_STEP_S = 1800.0  # one row for each half hour

LABEL, TIME = "label", "time"


class DataError(StreamclError):
    """A recorded stream that is not there, or is not what it should be."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A finite stream of labelled events, in the order in which they are to be learned.

    `payloads` hold the features, `time` (seconds, never falling) and `label` (0 or 1). `features` is the
    configuration's table of that name. `best_losses` (N,) is the expected log-loss, in nats, of the true
    probabilities, where they are known: nobody can do better on average. `impression` events in a row are shown
    together, and their labels come together. `weight` is the field of how much an event counts, if they differ.
    """

    name: str
    features: Mapping[str, Any]
    payloads: Sequence[Mapping[str, Any]]
    best_losses: Floats | None = field(default=None, repr=False)
    impression: int = 1
    weight: str | None = None

    def labels(self) -> Floats:
        return np.array([payload[LABEL] for payload in self.payloads], dtype=np.float64)

    def first(self, count: int) -> Dataset:
        best = None if self.best_losses is None else self.best_losses[:count]
        return replace(self, payloads=self.payloads[:count], best_losses=best)

    def messages(self) -> Iterator[bytes]:
        return (orjson.dumps(payload) for payload in self.payloads)


def recorded(name: str, folder: Path | None) -> Dataset:
    """The recorded stream `name`. Raises DataError naming the file that is missing."""
    known = {"ml-100k": (ML_100K, ml_100k), "elec": (ELEC, elec), "yoochoose": (YOOCHOOSE, yoochoose)}
    path, read = known[name]
    if folder is None:
        raise DataError(f"stream {name} is recorded: --data DIR must name the folder that holds {path}")
    if not (folder / path).is_file():
        raise DataError(f"{folder / path}: no such file; --data DIR must name the folder that holds {path}")
    return read(folder / path)


def ml_100k(path: Path) -> Dataset:
    """MovieLens-100k in time order (stable: ties in file order); who and what only; label = rating of 4 or 5.

    Columns of the file, tab-separated, under a header: user_id, item_id, rating, timestamp.
    """
    rows = list(csv.reader(_lines(path), delimiter="\t"))[1:]
    rows.sort(key=lambda row: float(row[3]))
    payloads = [
        {"user": user, "item": item, TIME: float(time), LABEL: int(float(rating) >= 4)}
        for user, item, rating, time in rows
    ]
    return Dataset("ml-100k", {"user": "categorical", "item": "categorical"}, payloads)


SIDE: dict[str, Any] = {
    **dict.fromkeys(("user", "item", "gender", "occupation", "zip", "year"), "categorical"),
    "age": "numeric",
    "genres": {"kind": "bag", "buckets": 1 << 10, "max_items": 8},
}


def with_side(data: Dataset, folder: Path) -> Dataset:
    """MovieLens-100k with what is known of its users (age, gender, occupation, the zip code's first digit) and items
    (year, genres), from the files beside the ratings. Raises DataError naming the file that is missing.
    """
    users, items = (_side(folder / ML_100K, suffix) for suffix in (".user", ".item"))
    payloads = []
    for payload in data.payloads:
        age, gender, occupation, zip_code = users[payload["user"]]
        _, year, genres = items[payload["item"]]
        user = {"age": float(age), "gender": gender, "occupation": occupation, "zip": zip_code[:1]}
        payloads.append({**payload, **user, "year": year, "genres": genres.split()})
    return Dataset(data.name, SIDE, payloads)


def _side(ratings: Path, suffix: str) -> dict[str, list[str]]:
    """Columns behind the id, by id."""
    path = ratings.with_name("ml-100k" + suffix)
    try:
        rows = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    except OSError as error:
        raise DataError(f"{path}: {error}") from error
    return {id: rest for id, *rest in (row.split("\t") for row in rows)}


def elec(path: Path) -> Dataset:
    """Elec2: does the price in New South Wales stand above its mean of the last day? One row for each half hour.

    Beware: labels are runs; saying the last label again (no-change) is right in 85 % of the rows.
    """
    rows = list(csv.DictReader(_lines(path)))
    names = [name for name in rows[0] if name != "class"]
    payloads = [
        {**{name: float(row[name]) for name in names}, TIME: i * ELEC_STEP_S, LABEL: int(row["class"])}
        for i, row in enumerate(rows)
    ]
    return Dataset("elec", dict.fromkeys(names, "numeric"), payloads)


HISTORY, CLICKS = 1000, 20_000
NEGATIVES = 4
NEXT_CLICK = dict.fromkeys(("session", "prev", "item"), "categorical")


def yoochoose(path: Path) -> Dataset:
    """YOOCHOOSE's next clicks, each among four items that were not clicked: which of the five is it?

    Rows `session item`, in click order; sessions interleave. After 1,000 clicks of history, each of 20,000 becomes
    five events in a row, in random order: the item clicked (label 1) and four others. Two are items of random earlier
    clicks, so that popularity does not tell all; two are any of the items seen so far. `prev` is the session's last
    item, null at its first click. The draws are counter-based: always the same.
    """
    payloads = list(next_clicks(clicks_of([path], HISTORY + CLICKS)))
    return Dataset("yoochoose", NEXT_CLICK, payloads, impression=1 + NEGATIVES)


def clicks_of(paths: Sequence[Path], count: int) -> list[tuple[str, str]]:
    """(session, item) of the first clicks of YOOCHOOSE's periods, one file each."""
    found: list[tuple[str, str]] = []
    for path in paths:
        if len(found) < count:
            found += [(session, item) for session, item in map(str.split, _lines(path)[: count - len(found)])]
    return found


def next_clicks(clicks: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """The events of `yoochoose`, for any clicks."""
    items = list(dict.fromkeys(item for _, item in clicks[:HISTORY]))  # distinct, as they appear
    seen, last = set(items), dict(clicks[:HISTORY])
    for step, (session, item) in enumerate(clicks[HISTORY:], HISTORY):
        if item not in seen:
            seen.add(item)
            items.append(item)
        for candidate in _shown(item, clicks, items, step):
            event = {"session": session, "prev": last.get(session), "item": candidate}
            yield {**event, TIME: float(step), LABEL: int(candidate == item)}
        last[session] = item


def _shown(item: str, clicks: Sequence[tuple[str, str]], items: Sequence[str], step: int) -> list[str]:
    """The item clicked and `NEGATIVES` others, all different, in random order."""
    key, draw = key_of(0, "bench.yoochoose"), 0
    shown = [item]
    while len(shown) < 1 + NEGATIVES:
        popular = len(shown) <= NEGATIVES // 2
        place = below(step if popular else len(items), key, step, draw)
        other, draw = clicks[place][1] if popular else items[place], draw + 1
        if other not in shown:
            shown.append(other)
    place = below(len(shown), key, step, draw)
    shown[0], shown[place] = shown[place], shown[0]
    return shown


def _lines(path: Path) -> list[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: {error}") from error


SYNTHETIC = ("stationary", "drifting", "switching", "recurring", "sparse")
CARDINALITIES = (10, 20, 40)
SPARSE = (1000, 2000, 4000)
LATENT = 3
SEGMENTS = 4
BIAS = -0.8


def synthetic(kind: str, events: int, seed: int) -> Dataset:
    """Categorical click logs whose true probabilities are known; the same for the same arguments.

    Three fields; value = ⌊cardinality · u^1.5⌋, so that few values are frequent; logit = bias + a weight for each value
    + products of latent vectors for each pair of values. How that moves:

    - `stationary`: not at all.
    - `drifting`: it turns without a pause, by half a turn over the stream: in the end the opposite is true.
    - `switching`: two concepts, A-B-A-B in four equal segments, and nothing in an event tells which: what was learned
      in A contradicts B.
    - `recurring`: A-B-A-B too, but each concept has values of its own in the first field (another season, other items):
      A and B contradict each other only where a model mixes them up.
    - `sparse`: stationary, with so many values that most are seen a few times only.
    """
    if kind not in SYNTHETIC:
        raise DataError(f"no synthetic stream {kind!r}; there are: {', '.join(SYNTHETIC)}")
    rng = np.random.default_rng([seed, *kind.encode()])
    sizes = SPARSE if kind == "sparse" else CARDINALITIES
    values = [np.floor(size * rng.random(events) ** 1.5).astype(np.int64) for size in sizes]
    first, second = _concept(rng, sizes, values), _concept(rng, sizes, values)
    progress = np.arange(events, dtype=np.float64) / max(events, 1)
    which = np.floor(progress * SEGMENTS).astype(np.int64) % 2  # 0 for A, 1 for B
    logit = BIAS + _mixed(kind, progress, which, first, second)
    p = 1 / (1 + np.exp(-logit))
    labels = (rng.random(events) < p).astype(int)
    texts = [[str(value) for value in column] for column in values]
    if kind == "recurring":
        texts[0] = [f"{'AB'[concept]}{text}" for concept, text in zip(which, texts[0], strict=True)]
    names = [f"f{place}" for place in range(len(sizes))]
    payloads = [
        {**dict(zip(names, row, strict=True)), TIME: float(i), LABEL: int(labels[i])}
        for i, row in enumerate(zip(*texts, strict=True))
    ]
    best = -(p * np.log(p) + (1 - p) * np.log1p(-p))
    return Dataset(kind, dict.fromkeys(names, "categorical"), payloads, best)


def _concept(rng: np.random.Generator, sizes: Sequence[int], values: Sequence[NDArray[np.int64]]) -> Floats:
    """The logit (N,) that one draw of weights and latent vectors gives each event, but for the bias."""
    weights = [rng.normal(0, 0.3, size)[column] for size, column in zip(sizes, values, strict=True)]
    latents = [rng.normal(0, 1, (size, LATENT))[column] for size, column in zip(sizes, values, strict=True)]
    products = sum((a * b).sum(axis=1) for a, b in combinations(latents, 2))
    scale = 1.2 / np.sqrt(LATENT * len(sizes) * (len(sizes) - 1) / 2)
    return np.asarray(sum(weights) + scale * products, np.float64)


def _mixed(kind: str, progress: Floats, which: NDArray[np.int64], first: Floats, second: Floats) -> Floats:
    """What is true at each event, of the two concepts. # (N,)"""
    if kind == "drifting":
        return np.asarray(np.cos(np.pi * progress) * first + np.sin(np.pi * progress) * second, np.float64)
    if kind in ("switching", "recurring"):
        return np.where(which == 0, first, second)
    return first
