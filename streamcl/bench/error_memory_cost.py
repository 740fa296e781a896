"""What an event costs an error memory: one read and one write, by form and by how much it holds, on one core."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from streamcl.bench.report import Bar, Row, progress
from streamcl.memory.forms import FORMS, Form
from streamcl.methods import Memory
from streamcl.random import key_of, uniform_array

REPEATS = 7
KEYS = 1000  # values of the feature that a form by key is asked for
VALUES = np.array([1.0, 0.5], np.float32)  # a label, and the score that was given

KNN, SKETCH, KEY = (
    "kNN, 5,000 rows, d 64",
    "sketch, 10 arrays of 10 bits, d 64",
    f"key, {KEYS:,} values",
)
LIMITS_US = {SKETCH: 15.0, KNN: 60.0, KEY: 2.0}

DEFINITION = (
    f"cost: microseconds of one read and one write as a Learner makes them, of a form that holds so many records;"
    f" processor time of one thread, median of {REPEATS} repeats; the choice of lambda is not part of it"
)


@dataclass(frozen=True, slots=True)
class Case:
    """A form, what it is keyed by (d numbers, or 1 for a feature's value) and how much has been written to it."""

    name: str
    config: Mapping[str, Any]
    dim: int
    records: int


def cases(sizes: Sequence[int]) -> list[Case]:
    """What the bars are about, then kNN and the sketch as what they remember grows."""
    small = {"kind": "sketch", "arrays": 10, "bits": 10}
    return [
        Case(SKETCH, small, 64, 5000),
        Case(KNN, {"kind": "knn"}, 64, 5000),
        Case("kNN, 5,000 rows, d 24", {"kind": "knn"}, 24, 5000),
        Case(KEY, {"kind": "key", "key": "user"}, 1, 5000),
        *(Case(f"kNN, d 64: {n:,} rows", {"kind": "knn", "capacity": n}, 64, n) for n in sizes),
        *(Case(f"sketch, 40 arrays of 12 bits, d 64: {n:,} records", {"kind": "sketch"}, 64, n) for n in sizes),
    ]


def measure(sizes: Sequence[int]) -> tuple[list[Row], list[Bar]]:
    rows, bars = [], []
    for case in cases(sizes):
        progress(f"cost: {case.name}")
        spent = microseconds(case)
        rows.append(Row(f"cost: {case.name}", {"us_per_event": spent}))
        if case.name in LIMITS_US:
            bars.append(Bar(f"cost: {case.name}: us per event", spent, LIMITS_US[case.name], at_least=False))
    return rows, bars


def microseconds(case: Case) -> float:
    """Per event. A repeat takes about as long whatever the form costs, and writes less than it holds."""
    form = filled(case)
    count = max(min(case.records // REPEATS, 100_000_000 // (case.dim * max(case.records, 5000))), 10)
    keys = [(key[None], key) for key in _keys(case, case.records, count)]
    return statistics.median(_once(form, keys) for _ in range(REPEATS))


def filled(case: Case) -> Form:
    config: Any = TypeAdapter(Memory).validate_python(case.config)
    form = FORMS[config.kind](config, case.dim, len(VALUES), 0)
    for start in range(0, case.records, 10_000):
        for key in _keys(case, start, min(10_000, case.records - start)):
            form.write(key, VALUES)
    return form


def _keys(case: Case, start: int, count: int) -> Any:
    draws = uniform_array(key_of(0, "bench.cost"), count * case.dim, start * case.dim).reshape(count, case.dim)
    return (draws * KEYS).astype(np.int64) if case.dim == 1 else (2 * draws - 1).astype(np.float32)


def _once(form: Form, keys: Sequence[tuple[Any, Any]]) -> float:
    start = time.thread_time()
    for batch, key in keys:
        form.read(batch)
        form.write(key, VALUES)
    return (time.thread_time() - start) / len(keys) * 1e6
