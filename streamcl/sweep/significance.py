"""Whether one configuration loses less than another on the same events, or only seems to.

Losses of neighbouring events are alike (a session, an evening, a model that has just gone astray), so events are no
independent draws, and a test that takes them for that finds differences where there are none. The row of differences
is cut into `BATCHES` batches of consecutive events; their means are nearly independent once a batch is much longer
than what events have in common, and a Student t interval of them is one of the whole mean.

Source: non-overlapping batch means, Schmeiser 1982, doi 10.1287/opre.30.3.556, who finds 10 to 30 batches enough; Law
and Carson 1979, doi 10.1287/opre.27.5.1011. A difference that changes along the stream widens the interval: it is
about the mean over streams like this one, not about this stream alone. Over seeds, differences are averaged first, so
the interval says how the stream might have been, not how other seeds might.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

BATCHES = 30
FEWEST_BATCHES, FEWEST_EVENTS = 10, 20
"""Fewer batches, or fewer events in one, say nothing."""
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean of paired differences, its interval of 95 % by itself, and the two-sided p that it is 0 in truth.

    Interval and p are NaN where there are too few events to judge.
    """

    mean: float
    low: float
    high: float
    p: float
    events: int


def difference(paired: NDArray[np.float64]) -> Difference:
    """Of (N,) differences in the order of the stream."""
    events = len(paired)
    mean = float(paired.mean()) if events else math.nan
    count = min(BATCHES, events // FEWEST_EVENTS)
    if count < FEWEST_BATCHES:
        return Difference(mean, math.nan, math.nan, math.nan, events)
    means = np.array([batch.mean() for batch in np.array_split(paired, count)])
    error = float(means.std(ddof=1)) / math.sqrt(count)
    if error == 0.0:
        return Difference(mean, mean, mean, 1.0 if mean == 0.0 else 0.0, events)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    return Difference(mean, mean - half, mean + half, p, events)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: below .05, one false alarm among all of them in 20 such families at most.

    NaN stays NaN and counts for none.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6, 65-70.
    """
    order = sorted((p, at) for at, p in enumerate(ps) if not math.isnan(p))
    adjusted, least = [math.nan] * len(ps), 0.0
    for rank, (p, at) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        adjusted[at] = least
    return adjusted
