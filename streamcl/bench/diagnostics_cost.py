"""What figures of the hidden layers cost a learning step: the same learner with and without them, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streamcl.bench.report import Row
from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.random import key_of, uniform_array
from streamcl.records import EVENTS, Fate, Origin, Outcome, Scores, Ticket

ROUNDS = 20
MODELS: Mapping[str, Mapping[str, Any]] = {
    "deepfm 64-32": {},
    "mlp 100-100-100": {"kind": "mlp", "hidden": [100, 100, 100]},
}

DEFINITION = (
    f"diagnostics: microseconds of Learner.learn with the default [diagnostics], and switched off; {ROUNDS} rounds, in"
    " each of them both in turn, of as many steps as lie between two reckonings of the ranks, so that each round has"
    " one; processor time of one thread; medians, and the median of the rounds' differences"
)


def measure(steps: int = 10_000, rounds: int = ROUNDS) -> list[Row]:
    """`steps` of learning a round; fewer than `diagnostics.report_every_steps` leave out ranks in some rounds."""
    return [Row(f"diagnostics: {name}", microseconds(model, steps, rounds)) for name, model in MODELS.items()]


def microseconds(model: Mapping[str, Any], steps: int, rounds: int) -> dict[str, float]:
    """Per learning step."""
    learners = {"off": _learner(model, sample_every_steps=0), "on": _learner(model)}
    outcomes = _outcomes(_config(model), 1000)
    for learner in learners.values():
        _round(learner, outcomes, steps)  # which fills the window
    spent: dict[str, list[float]] = {name: [] for name in learners}
    for index in range(rounds):
        for name in sorted(learners, reverse=bool(index % 2)):
            spent[name].append(_round(learners[name], outcomes, steps))
    more = [on - off for on, off in zip(spent["on"], spent["off"], strict=True)]
    medians = {f"us_{name}": statistics.median(values) for name, values in spent.items()}
    return medians | {"us_more": statistics.median(more)}


def _config(model: Mapping[str, Any], **diagnostics: int) -> Config:
    features = {f"c{i}": {"kind": "categorical", "buckets": 1000} for i in range(8)} | {"x": "numeric"}
    events = {"url": "memory://bench/events", "label": "y"}
    return Config.parse(
        {"name": "bench", "events": events, "features": features, "model": model, "diagnostics": diagnostics}
    )


def _learner(model: Mapping[str, Any], **diagnostics: int) -> Learner:
    return Learner(_config(model, **diagnostics))


def _outcomes(config: Config, count: int) -> list[Outcome]:
    featurizer, draws = Featurizer(config), uniform_array(key_of(0, "bench.diagnostics"), count * 10).reshape(count, 10)
    nothing = Scores(np.zeros(1, np.float32), np.zeros(1, np.float32), 0)
    found = []
    for i, row in enumerate(draws):
        payload: dict[str, Any] = {f"c{j}": int(row[j] * 1000) for j in range(8)} | {"x": float(row[8])}
        ticket = Ticket(str(i), float(i), featurizer.encode(payload), nothing, Origin(EVENTS, 0, i))
        found.append(Outcome(ticket, float(row[9] < 0.5), Fate.JOINED, 0.0))
    return found


def _round(learner: Learner, outcomes: Sequence[Outcome], steps: int) -> float:
    start = time.thread_time()
    for step in range(steps):
        learner.learn(outcomes[step % len(outcomes)])
    return (time.thread_time() - start) / steps * 1e6
