"""Outcomes that say more of themselves than a score and a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamcl.config import Config
from streamcl.metrics import Examples, Lists, Slices
from streamcl.records import Encoded, Fate, Origin, Outcome, Scores, Ticket

NOTHING = Encoded(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))


def settings(**metrics: Any) -> Config:
    data = {
        "name": "shop",
        "events": {"url": "memory://b/views", "label": "y", "key": "user"},
        "features": {"user": "categorical", "device": "categorical"},
        "metrics": metrics,
    }
    return Config.parse(data)


def outcome(label: float, score: float, key: str = "u", weight: float = 1.0, **traits: str) -> Outcome:
    served = np.array([score], np.float32)
    scores = Scores(served, served, 0)
    ticket = Ticket("id", 0.0, NOTHING, scores, Origin("events", 0, 0), "", key, weight, traits)
    return Outcome(ticket, label, Fate.INLINE, 0.0)


def take(part: Slices | Lists, outcomes: Sequence[Outcome], loss: float = 0.5) -> None:
    if outcomes:
        part.update(Examples.of(outcomes).scored([loss] * len(outcomes)))
