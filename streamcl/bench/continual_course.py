"""A stream of `bench continual`: what is learned in which order, what is held out, and what is known of the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamcl.bench.quality import Floats
from streamcl.features import Layout
from streamcl.records import Encoded


@dataclass(frozen=True, slots=True)
class Rows:
    """Examples in order: labels (N,), numbers (N, D) and categories (N, F), both by feature in the order of names.

    A category is a whole number below the feature's `buckets`, and has the row of that number: none collide.
    """

    labels: Floats
    dense: NDArray[np.float32]
    categories: NDArray[np.int64]

    @classmethod
    def of(cls, labels: ArrayLike, dense: ArrayLike | None = None, categories: ArrayLike | None = None) -> Self:
        y = np.asarray(labels, np.float64)
        numbers = np.zeros((len(y), 0), np.float32) if dense is None else np.asarray(dense, np.float32)
        places = np.zeros((len(y), 0), np.int64) if categories is None else np.asarray(categories, np.int64)
        return cls(y, numbers, places)

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, layout: Layout) -> list[Encoded]:
        """Views of three arrays: nothing is looked up by name."""
        ids = layout.slot_base + 1 + self.categories  # (N, S); row 0 of a field stands for a missing value
        weights = np.ones(ids.shape, np.float32)
        return list(map(Encoded, ids, weights, self.dense))


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One seed of a stream.

    Args:
        settings: Of the configuration: task, features, model, optimizer; the same for every recipe.
        memory: `capacity`, `per_event` and perhaps `weight` of a recipe that replays, unless it has its own.
        source: Where the examples come from.
        chosen: On which slice, and among which, the settings were chosen.
        segments: (N,) the task of each event, never falling. An evaluator reads it; and a recipe that asks for it.
        held_out: By segment, examples that are never learned from.
        every: Events between two looks at what is held out; there is one at the end of each segment too.
        delay: A label comes after so many later events were predicted.
        chances: (N,) the true probabilities of label 1, where they are known.
        drifts: Events at which the truth changes.
        near: Events that count as "after a drift".
        start: Served figures count from this event on.
    """

    name: str
    settings: Mapping[str, Any]
    memory: Mapping[str, Any]
    rows: Rows
    segments: NDArray[np.int64]
    source: str = "made"
    chosen: str = ""
    held_out: tuple[Rows, ...] = ()
    every: int = 1000
    delay: int = 0
    chances: Floats | None = None
    drifts: tuple[int, ...] = ()
    near: int = 600
    start: int = 0

    def config(self, recipe: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """The worker's configuration as a table: the stream's settings, and what the recipe says, which comes first."""
        table = {
            "name": self.name,
            "events": {"url": "memory://bench/continual", "label": "label", "segment": "segment"},
            "seed": seed,
        }
        table = _merged(table, self.settings)
        if "replay" in recipe:
            table["replay"] = dict(self.memory)
        return _merged(table, recipe)

    def after_drift(self) -> NDArray[np.bool_]:
        """(N,) whether an event is one of the first `near` after a drift."""
        found = np.zeros(len(self.rows), np.bool_)
        for drift in self.drifts:
            found[drift : drift + self.near] = True
        return found


def _merged(table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are joined field by field; whatever else there is gives way to `over`."""
    found = dict(table)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _merged(found[name], value) if both else value
    return found
