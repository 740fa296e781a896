"""Peers in the table of `bench stream`: their rows, and what VW is known to reach.

A run in which VW does not reach it compares us with something else than VW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from streamcl.bench.quality import Floats, Trace, quality
from streamcl.bench.report import Bar, Row

VW, VW_FTRL, NO_CHANGE = "vw default", "vw --ftrl", "no-change"
TOLERANCE = 0.002


@dataclass(frozen=True, slots=True)
class Known:
    """What one stream at one size is known for, as (AUC, NE).

    `asked` is what is promised. `vw` and `ftrl` are what VW 9.11.9 reaches, to within `TOLERANCE`.
    """

    events: int | None
    asked: tuple[float, float]
    vw: tuple[float, float]
    ftrl: tuple[float, float]


def reproductions(others: Mapping[str, Trace], labels: Floats, known: Known) -> list[Bar]:
    """How far each peer is from its own known figure. A peer that is missing has not reproduced anything."""
    bars = []
    for name, figures in ((VW, known.vw), (VW_FTRL, known.ftrl)):
        found = quality(labels, others[name].scores) if name in others else {"auc": math.nan, "ne": math.nan}
        for metric, figure in zip(("auc", "ne"), figures, strict=True):
            off = abs(found[metric] - figure)
            bars.append(Bar(f"peer reproduces: {name} {metric} {figure:.4f}", off, TOLERANCE, at_least=False))
    return bars


def missing(others: Mapping[str, Trace]) -> list[Row]:
    """Of the peers that could not be run."""
    note = {"note": "not installed; it comes with streamcl[bench]"}
    return [Row(name, note) for name in (VW, VW_FTRL) if name not in others]


def measure(trace: Trace, labels: Floats) -> dict[str, float]:
    """A row's numbers; of no-change, whose scores are certainties, only what does not read them as probabilities."""
    judged = quality(labels, trace.scores)
    if trace.name == NO_CHANGE:
        judged = {"accuracy": judged["accuracy"]}
    return {**judged, "events": len(labels), "events_per_s": round(trace.events_per_s, 1)}


def mean(measures: list[dict[str, float]]) -> dict[str, float]:
    means = {name: sum(m[name] for m in measures) / len(measures) for name in measures[0]}
    return {**means, "events": measures[0]["events"]}  # a count stays one
