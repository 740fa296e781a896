"""What VW reaches on recorded streams: a run in which it does not compares us with something else than VW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from streamcl.bench.quality import Floats, Trace, quality
from streamcl.bench.report import Bar

VW, VW_FTRL = "vw default", "vw --ftrl"
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
