"""What several observations of one event come to: the rules of `join.aggregate`.

An observation is a label record. Their order is that of (event time, place in the log), never that of arrival, and
sums are exact before they are rounded, so it makes no difference in which order they came. Every rule starts from the
observations alone: with rewards below zero the largest of them is below zero too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from streamcl.records import Origin


class Observation(NamedTuple):
    """Sorts as it counts."""

    time_s: float
    origin: Origin
    value: float


RULES: dict[str, Callable[[list[float]], float]] = {
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
    "sum": math.fsum,
    "mean": lambda values: math.fsum(values) / len(values),
    "max": max,
    "min": min,
    "count": lambda values: float(len(values)),
    "any": lambda values: float(any(values)),
}
"""From values in their order, of which there is one at least."""


def aggregate(rule: str, observations: Sequence[Observation], default: float) -> float:
    """The reward of an event; `default` where nothing was observed."""
    values = [each.value for each in sorted(observations)]
    return float(RULES[rule](values)) if values else default
