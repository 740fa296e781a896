"""What became of every impression: its label, what the live model said, what a frozen one would have said."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from streamcl.demo.simulator import Floats, Simulation
from streamcl.learner import Learner
from streamcl.metrics.losses import entropy, log_loss, normalized_entropy, ratio
from streamcl.metrics.ranking import exact_auc
from streamcl.records import EVENTS, Outcome, Stream, Turn
from streamcl.worker import Worker

FREEZE_AT = 0.15  # of the impressions: then the frozen model stops learning
ANSWER_WITHIN = 0.1  # of the impressions: an alarm that comes later than that after a drift is not credited to it
BEFORE = 1_000  # the first impressions: they were scored before there was anything to learn from


@dataclass(frozen=True, slots=True)
class Alarm:
    """`impression` had been shown when the drift detector spoke (to within a turn).

    `drift` names the abrupt drift that it answers; None makes it a false alarm. `repeat`: not the first to answer it.
    """

    impression: int
    time_s: float
    drift: str | None = None
    after_impressions: int | None = None
    after_s: float | None = None
    repeat: bool = False


@dataclass(frozen=True, slots=True)
class Curve:
    """Mean log-loss of the labelled impressions in equal slices of the stream, in nats; all arrays (slices,)."""

    impression: Floats  # middle of the slice
    live: Floats
    frozen: Floats
    bayes: Floats
    base_rate: Floats


class Ledger:
    """Keeps, for each impression, the label that the joiner gave it and the scores of the models to compare.

    The frozen model is a copy of the live one, made when it has learned from FREEZE_AT of the impressions; from then
    on it only predicts, from the features on the ticket. Until then both are one, so it costs nothing to learn it.
    """

    def __init__(self, simulation: Simulation) -> None:
        n = simulation.settings.events
        self.simulation = simulation
        self.label = np.full(n, np.nan)  # NaN: no outcome yet
        self.live = np.full(n, np.nan)
        self.frozen = np.full(n, np.nan)
        self.seen = 0  # impressions answered
        self.labelled = 0
        self.alarms: list[Alarm] = []
        self._frozen: Learner | None = None

    def observe(self, turn: Turn, worker: Worker) -> None:
        self.seen = turn.position.get(Stream(EVENTS, 0), self.seen)
        for outcome in turn.outcomes:
            self._enter(outcome)
        self.alarms += [self._alarm() for signal in turn.signals if signal.kind == "drift"]
        if self._frozen is None and self.labelled >= FREEZE_AT * len(self.label):
            self._frozen = Learner(worker.config)
            self._frozen.load_state_dict(worker.learner.state_dict())

    def _enter(self, outcome: Outcome) -> None:
        i = self.simulation.index[outcome.ticket.id]
        self.labelled += 1
        self.label[i] = outcome.label
        self.live[i] = self.frozen[i] = outcome.ticket.scores.served[0]
        if self._frozen and outcome.ticket.scores.version > self._frozen.version:
            self.frozen[i] = self._frozen.predict(outcome.ticket.features).served[0]

    def _alarm(self) -> Alarm:
        at = max(self.seen - 1, 0)
        time_s = float(self.simulation.time_s[at])
        reach = ANSWER_WITHIN * len(self.label)
        passed = [point for point in self.simulation.drift_points if point.impression <= at < point.impression + reach]
        if not passed:
            return Alarm(at, time_s)
        point = passed[-1]
        repeat = any(alarm.drift == point.name for alarm in self.alarms)
        return Alarm(at, time_s, point.name, at - point.impression, time_s - point.time_s, repeat)

    @property
    def settled(self) -> int:
        """Impressions 0 .. settled - 1 have their outcome. Later ones would mislead: clicks come before non-clicks."""
        waiting = np.flatnonzero(np.isnan(self.label))
        return int(waiting[0]) if len(waiting) else len(self.label)

    def recent(self, count: int) -> slice:
        """The last `count` settled impressions."""
        return slice(max(0, self.settled - count), self.settled)

    def before(self) -> slice:
        """The impressions that were scored before there was anything to learn from."""
        return slice(0, min(BEFORE, self.settled))

    def curve(self, slices: int) -> Curve:
        """Only settled impressions count; a slice without any is NaN."""
        edges = np.linspace(0, len(self.label), slices + 1).astype(np.int64)
        rows = [slice(a, max(a, min(b, self.settled))) for a, b in pairwise(edges.tolist())]
        columns = {
            name: np.array([log_loss(self.label[r], scores[r]) for r in rows])
            for name, scores in self._scores().items()
        }
        base = np.array([_entropy(self.label[r]) for r in rows])
        return Curve(impression=(edges[:-1] + edges[1:]) / 2, base_rate=base, **columns)

    def figures(self) -> dict[str, Any]:
        """The numbers of the summary and the report, JSON-ready; None where undefined."""
        whole, last = slice(0, self.settled), self.recent(max(1, len(self.label) // 10))
        unlike = self.label[whole] != self.simulation.label[whole]
        return {
            "impressions": self.seen,
            "labelled": self.labelled,
            "settled": self.settled,
            "click_rate": _number(float(self.label[whole].mean()) if self.settled else math.nan),
            "labels_unlike_truth": int(unlike.sum()),
            "before_learning": self.measure(self.live, self.before()),
            "whole_stream": {name: self.measure(scores, whole) for name, scores in self._scores().items()},
            "last_tenth": {name: self.measure(scores, last) for name, scores in self._scores().items()},
            "drift_points": [asdict(point) for point in self.simulation.drift_points],
            "alarms": [asdict(alarm) for alarm in self.alarms],
        }

    def _scores(self) -> dict[str, Floats]:
        return {"live": self.live, "frozen": self.frozen, "bayes": self.simulation.bayes}

    def measure(self, scores: Floats, rows: slice) -> dict[str, float | None]:
        """Log-loss, NE, AUC and calibration (predicted over observed clicks) of settled rows."""
        y, p = self.label[rows], scores[rows]
        return {
            "log_loss": _number(log_loss(y, p)),
            "ne": _number(normalized_entropy(y, p)),
            "auc": _number(exact_auc(y, p)),
            "calibration": _number(ratio(float(p.sum()), float(y.sum()))),
        }


def _entropy(labels: Floats) -> float:
    return entropy([labels.sum(), len(labels) - labels.sum()]) if len(labels) else math.nan


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return round(value, 5) if math.isfinite(value) else None
