"""What a run said before it knew, and how good that was: the worker's own definitions, over arrays.

An event counts once. Where a joiner tells of it again (a late positive), the last label holds, and what was served
then as now. All runs of a sweep are judged by the labels that the base came to know, on the events that all of those
compared have answered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from streamcl.metrics.grouped import grouped_auc
from streamcl.metrics.losses import CLIP, entropy, log_losses, ratio
from streamcl.metrics.ranking import exact_auc
from streamcl.records import Outcome, mark
from streamcl.stations import Task

Floats = NDArray[np.float64]
OFFSETS = 1 << 48  # of a partition; an event is one number: partition * OFFSETS + offset


@dataclass(frozen=True, slots=True)
class Answers:
    """N answers in the order in which their labels came.

    Shape:
        events (N,) int64, labels (N,), served (N, P) float32, groups (N,) int64: whose event it is.
    """

    events: NDArray[np.int64]
    labels: Floats
    served: NDArray[np.float32]
    groups: NDArray[np.int64]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Self:
        tickets = [outcome.ticket for outcome in outcomes]
        return cls(
            np.array([t.origin.partition * OFFSETS + t.origin.offset for t in tickets], np.int64),
            np.array([outcome.label for outcome in outcomes], np.float64),
            np.array([t.scores.served for t in tickets], np.float32).reshape(len(tickets), -1 if tickets else 1),
            np.array([mark(t.key) for t in tickets], np.int64),
        )

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """One behind the other."""
        some = [part for part in parts if len(part.events)]
        if not some:
            return cls.of(())
        return cls(*(np.concatenate([getattr(part, name) for part in some]) for name in cls.__slots__))

    def once(self) -> Answers:
        """Each event where it came first, with its last label."""
        first = np.unique(self.events, return_index=True)[1]
        if len(first) == len(self.events):
            return self
        at = np.sort(first)
        last = len(self.events) - 1 - np.unique(self.events[::-1], return_index=True)[1]  # by event, as `first`
        label_of = dict(zip(self.events[first].tolist(), self.labels[last].tolist(), strict=True))
        labels = np.array([label_of[event] for event in self.events[at].tolist()])
        return Answers(self.events[at], labels, self.served[at], self.groups[at])

    def judged_by(self, base: Answers) -> tuple[Answers, Answers, int]:
        """This and the base on the events of both, in the base's order and with its labels; how many of them differ."""
        if np.array_equal(self.events, base.events):
            ours, theirs = self, base
        else:
            here = {event: at for at, event in enumerate(self.events.tolist())}
            pairs = [(here[event], at) for at, event in enumerate(base.events.tolist()) if event in here]
            mine, its = np.array(pairs, np.int64).reshape(-1, 2).T
            ours, theirs = self.take(mine), base.take(its)
        differ = int((ours.labels != theirs.labels).sum())
        return Answers(ours.events, theirs.labels, ours.served, ours.groups), theirs, differ

    def take(self, at: Any) -> Answers:
        """Those at an index, a mask or a slice."""
        return Answers(self.events[at], self.labels[at], self.served[at], self.groups[at])


def losses(task: Task, answers: Answers) -> Floats:
    """Of each event, (N,): nats, or the squared error for regression; not finite where the worker counts `unscored`."""
    labels, served = answers.labels, answers.served.astype(np.float64)
    if task == "binary":
        return log_losses(labels, served[:, 0]) if len(labels) else labels
    if task == "multiclass":
        p = served[np.arange(len(labels)), labels.astype(np.int64)] if len(labels) else labels
        return np.asarray(-np.log(np.clip(p, CLIP, 1.0 - CLIP)))
    return np.asarray((served[:, 0] - labels) ** 2) if len(labels) else labels


def figures(task: Task, answers: Answers, window: int) -> dict[str, float]:
    """By the worker's names, defined values only; `_window`: of the last `window` scored events."""
    loss = losses(task, answers)
    scored = np.isfinite(loss)
    answers, loss = answers.take(scored), loss[scored]
    whole = _figures(task, answers, loss) | {"examples": len(loss), "unscored": int((~scored).sum())}
    recent = _figures(task, answers.take(slice(-window, None)), loss[-window:])
    found = whole | {f"{name}_window": value for name, value in recent.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _figures(task: Task, answers: Answers, loss: Floats) -> dict[str, float]:
    """`loss` is the mean of what is compared pairwise."""
    labels, mean = answers.labels, ratio(float(loss.sum()), len(loss))
    if task == "regression":
        errors = np.abs(answers.served[:, 0] - labels) if len(labels) else labels
        return {"loss": mean, "rmse": math.sqrt(mean), "mae": ratio(float(errors.sum()), len(labels))}
    if task == "multiclass":
        hits = float((answers.served.argmax(axis=1) == labels).sum()) if len(labels) else 0.0
        ne = ratio(mean, entropy(np.bincount(labels.astype(np.int64))))
        return {"loss": mean, "log_loss": mean, "ne": ne, "accuracy": ratio(hits, len(labels))}
    scores = answers.served[:, 0].astype(np.float64) if len(labels) else labels
    positives = float(labels.sum())
    return {
        "loss": mean,
        "log_loss": mean,
        "ne": ratio(mean, entropy([positives, len(labels) - positives])),
        "auc": exact_auc(labels, scores),
        "gauc": grouped_auc(labels, scores, answers.groups),
        "calibration": ratio(float(scores.sum()), positives),
        "accuracy": ratio(float(((scores >= 0.5) == (labels >= 0.5)).sum()), len(labels)),
        "base_rate": ratio(positives, len(labels)),
    }
