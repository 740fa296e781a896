"""What `bench step` streams, and how it feeds a learner by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamcl.bench import step_plain
from streamcl.bench.step_plain import DIM, FIELDS, HIDDEN, Floats, Ids
from streamcl.config import Config
from streamcl.learner import Learner
from streamcl.records import EVENTS, Encoded, Event, Fate, Origin, Outcome, Ticket

CHUNK = 512
REPLAYED = 8
ON: dict[str, Any] = {
    "replay": {"retention": "reservoir", "per_event": REPLAYED},
    "plasticity": [{"kind": "continual_backprop", "replacement_rate": 1e-4}],
}
"""Replay and continual backpropagation."""

SERVED: Any = type("Served", (), {"served": np.zeros(1, np.float32)})()


def clicks(engine: str, precision: str = "float32", buckets: int = 1000, **more: Any) -> Learner:
    names = {f"c{field:02}": {"kind": "categorical", "buckets": buckets} for field in range(FIELDS)}
    model = {"kind": "mlp", "hidden": list(HIDDEN), "embedding_dim": DIM, "dtype": precision}
    return Learner(config_of(names, model, {"kind": "adagrad", "learning_rate": step_plain.RATE}, engine, **more))


def config_of(features: Any, model: Any, optimizer: Any, engine: str, **more: Any) -> Config:
    table = {
        "name": "bench-step",
        "events": {"url": "memory://bench/step", "label": "label"},
        "features": features,
        "model": model,
        "optimizer": optimizer,
        "worker": {"engine": engine},
    }
    return Config.parse({**table, **more}, "bench")


class Stream:
    """n click events, a few categories often and most seldom; the label hangs on two of them. (n, F), (n,)"""

    def __init__(self, n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.categories: Ids = (1000 * rng.random((n, FIELDS)) ** 3).astype(np.int64)
        chance = 0.1 + 0.4 * (self.categories[:, 0] % 7 < 3) + 0.4 * (self.categories[:, 1] % 5 < 2)
        self.y = (rng.random(n) < chance).astype(np.float64)
        self.plain: Ids = self.categories + 1000 * np.arange(FIELDS)
        ids = self.categories + 1 + 1001 * np.arange(FIELDS)
        one, none = np.ones(FIELDS, np.float32), np.zeros(0, np.float32)
        self.features = [Encoded(row, one, none) for row in ids]

    def event(self, i: int) -> Event:
        return Event(str(i), "", float(i), self.features[i], Origin(EVENTS, 0, i), float(self.y[i]))


def outcome(event: Event, scores: Any) -> Outcome:
    ticket = Ticket(event.id, event.time_s, event.features, scores, event.origin, "", event.key)
    return Outcome(ticket, float(event.label or 0.0), Fate.INLINE, 0.0)


def feed(learner: Learner, outcomes: Sequence[Outcome]) -> None:
    """Learn, a chunk at a time where the engine knows how."""
    if learner.fused is None:
        for each in outcomes:
            learner.learn(each)
        return
    for start in range(0, len(outcomes), CHUNK):
        for each in outcomes[start : start + CHUNK]:
            learner.fused.learn(each)
        learner.fused.settle()


def prequential(learner: Learner, stream: Stream) -> Floats:
    """Scores (n,) before each label."""
    scores = []
    for i in range(len(stream.features)):
        event = stream.event(i)
        _, said = learner.answer(event)
        scores.append(said)
        each = outcome(event, said)
        if learner.fused is None:
            learner.learn(each)
            continue
        learner.fused.learn(each)
        if i % CHUNK == CHUNK - 1:
            learner.fused.settle()
    if learner.fused is not None:
        learner.fused.settle()
    return np.array([said.served[0] for said in scores], np.float32)
