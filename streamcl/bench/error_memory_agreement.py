"""Does the sketch say what it stands for: the exact kernel mean on rows, and the sign of kNN's error on a stream?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcl.bench.error_memory_serving import Known
from streamcl.bench.quality import Floats
from streamcl.bench.report import Bar, Row, progress
from streamcl.memory.forms import Sketch
from streamcl.methods import SketchMemory

ROWS, QUERIES, DIM, CLUSTERS = 2000, 400, 24, 40
SETTLED = 2048
"""Keys seen before the rows: the sketch takes its centre over at a reset, and then not before 4,096 keys."""

ARRAYS = (5, 20, 80, 320)
BITS = (8, 12)
FALL = 0.75
SAME_SIGN = 0.8

DEFINITION = (
    f"agreement: rmse and correlation of the sketch's mean label with the exact kernel mean, kernel"
    f" (1 - angle / pi)^bits, over {QUERIES} queries among {ROWS:,} rows in {CLUSTERS} clusters, d {DIM}, mean over"
    " seeds; same sign: share of the events, of those where both found something, for which sketch and kNN would move"
    " the score the same way"
)


def against_kernel(seeds: Sequence[int]) -> tuple[list[Row], list[Bar]]:
    """More arrays come nearer to the exact mean: at each step by a quarter at least."""
    rows, bars = [], []
    for bits in BITS:
        progress(f"agreement: sketch of {bits} bits against its kernel")
        errors = []
        for arrays in ARRAYS:
            found = np.array([rmse_and_correlation(bits, arrays, seed) for seed in seeds])
            rmse, correlation = found.mean(axis=0).tolist()
            errors.append(rmse)
            rows.append(Row(f"agreement: {arrays} arrays of {bits} bits", {"rmse": rmse, "correlation": correlation}))
        worst = max(after / before for before, after in pairwise(errors))
        bars.append(
            Bar(f"agreement: rmse by that of a quarter of the arrays, {bits} bits", worst, FALL, at_least=False)
        )
    return rows, bars


def rmse_and_correlation(bits: int, arrays: int, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    middles, rates = rng.normal(size=(CLUSTERS, DIM)), rng.random(CLUSTERS)
    which = rng.integers(0, CLUSTERS, SETTLED + ROWS + QUERIES)
    keys = (middles[which] + 0.5 * rng.normal(size=(len(which), DIM))).astype(np.float32)
    values = np.stack(((rng.random(len(which)) < rates[which]), rng.random(len(which))), 1).astype(np.float32)
    sketch = Sketch(SketchMemory(bits=bits, arrays=arrays, half_life_events=None), DIM, 2, seed)
    for key, value in zip(keys[:SETTLED], values[:SETTLED], strict=True):
        sketch.write(key, value)
    sketch.reset()
    rows = slice(SETTLED, SETTLED + ROWS)
    for key, value in zip(keys[rows], values[rows], strict=True):
        sketch.write(key, value)
    queries = keys[SETTLED + ROWS :]
    found = sketch.read(queries)
    exact = kernel_mean(queries - sketch.latched, keys[rows] - sketch.latched, values[rows, 0], bits)
    return float(np.sqrt(np.mean((found[:, 1] - exact) ** 2))), float(np.corrcoef(found[:, 1], exact)[0, 1])


def kernel_mean(queries: NDArray[Any], rows: NDArray[Any], values: NDArray[Any], bits: int) -> Floats:
    """(Q,) the mean of values, weighted by how likely all `bits` random planes leave a row on a query's side.

    Source: the collision probability of SimHash, Charikar 2002 (STOC), section 3.
    """
    unit = [each.astype(np.float64) / np.linalg.norm(each, axis=1, keepdims=True) for each in (queries, rows)]
    angles = np.arccos(np.clip(unit[0] @ unit[1].T, -1.0, 1.0))  # (Q, R)
    weights = (1.0 - angles / math.pi) ** bits
    return np.asarray(weights @ values / weights.sum(axis=1))


def same_sign(sketch: Known, knn: Known) -> float:
    """The share of events that both would move, and move the same way."""
    both = (sketch.support > 0) & (knn.support > 0)
    errors = [np.sign(each.label_mean - each.given_mean)[both] for each in (sketch, knn)]
    return float(np.mean(errors[0] == errors[1])) if both.any() else math.nan
