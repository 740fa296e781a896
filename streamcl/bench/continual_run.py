"""One pass of one learner over one seed of a stream of `bench continual`, and the figures of it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from streamcl.bench.continual_course import Course, Rows
from streamcl.bench.quality import CLAMP, Floats, blocks
from streamcl.boundaries import Boundaries
from streamcl.config import Config
from streamcl.drift import DriftDetector
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.metrics import Prequential
from streamcl.metrics.continual import (
    Trace,
    average_accuracy,
    backward_transfer,
    forward_transfer,
    min_accuracy,
    stability_gap,
    worst_case_accuracy,
)
from streamcl.protocols import StreamclError
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Scores, Ticket

Served = NDArray[np.float32]

AT_ONCE = 500  # held-out examples of one pass: bounds what a look needs


class Refused(StreamclError):
    """A learner left an example out, as one whose gradient is unusable: its settings are none to compare."""


class Contender(Protocol):
    """What takes part: it answers event `i`, and is told the label of an event later, in the order of the events."""

    def predict(self, i: int) -> Served: ...  # (P,) a probability, or one for each class

    def learn(self, i: int) -> None: ...

    def classify(self, segment: int) -> NDArray[np.int64]: ...  # (n,) of the segment's held-out examples


class Ours:
    """The product's learner, with tickets that wait for their labels, and what tells it of drift and boundaries."""

    def __init__(self, course: Course, recipe: Mapping[str, Any], seed: int) -> None:
        config = Config.parse(course.config(recipe, seed), "recipe")
        self.course, self.learner = course, Learner(config)
        layout = Featurizer(config).layout
        self.features = course.rows.encoded(layout)
        self.held_out = [rows.encoded(layout) for rows in course.held_out]
        self.tickets: deque[Ticket] = deque()
        self.loss = Prequential(config.task, 1, config.model.classes).loss
        self.drift, self.boundaries = DriftDetector(config.drift), Boundaries(config)

    def predict(self, i: int) -> Served:
        features = self.features[i]
        scores = self.learner.predict(features)
        segment = str(self.course.segments[i])
        self.tickets.append(Ticket(str(i), float(i), features, scores, Origin(EVENTS, 0, i), segment))
        return scores.served

    def learn(self, i: int) -> None:
        fate = Fate.JOINED if self.course.delay else Fate.INLINE
        outcome = Outcome(self.tickets.popleft(), float(self.course.rows.labels[i]), fate, float(self.course.delay))
        alarms = self.drift.update(self.loss(outcome), outcome.ticket.origin)
        if not self.learner.learn(outcome, (*alarms, *self.boundaries.update(outcome))):
            raise Refused(f"{self.course.name}: example {i} was left out")

    def classify(self, segment: int) -> NDArray[np.int64]:
        return classes(np.stack([scores.served for scores in self._scores(self.held_out[segment])]))

    def _scores(self, batch: list[Encoded]) -> list[Scores]:
        starts = range(0, len(batch), AT_ONCE)
        return [scores for start in starts for scores in self.learner.predict_many(batch[start : start + AT_ONCE])]


def classes(served: Served) -> NDArray[np.int64]:
    """(N,) the likeliest class of (N, P)."""
    return served.argmax(axis=1) if served.shape[1] > 1 else (served[:, 0] >= 0.5).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Looks:
    """Accuracy on what is held out of each segment: untrained (T,), and in `trace` (E, T) after so many events (E,)."""

    untrained: Floats
    events: NDArray[np.int64]
    trace: Trace

    @classmethod
    def of(cls, course: Course, untrained: Floats, events: Sequence[int], accuracy: Sequence[Floats]) -> Self:
        at = np.array(events)
        return cls(untrained, at, Trace(np.array(accuracy), course.segments[at - 1]))


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one pass: figures by name, and how they moved: (events, figure)."""

    figures: Mapping[str, float]
    curve: tuple[Floats, Floats]


def measure(course: Course, contender: Contender) -> Run:
    """Test, then train: an event is answered, then the label of the event `delay` before it is learned from."""
    served: list[Served] = []
    untrained, accuracy = _look(course, contender), []
    cpu_s, stops = 0.0, _stops(course)
    for begin, end in zip([0, *stops[:-1]], stops, strict=True):
        start = time.process_time()
        for i in range(begin, end):
            served.append(contender.predict(i))
            if i >= course.delay:
                contender.learn(i - course.delay)
        cpu_s += time.process_time() - start
        accuracy.append(_look(course, contender))
    looks = Looks.of(course, untrained, stops, accuracy) if course.held_out else None
    return judged(course, np.stack(served), looks, cpu_s / len(course.rows))


def _stops(course: Course) -> list[int]:
    """Events after which there is a look; without anything held out, the last alone."""
    events = len(course.rows)
    if not course.held_out:
        return [events]
    ends = np.flatnonzero(np.diff(course.segments, append=-1)) + 1
    return sorted({*range(course.every, events, course.every), *ends.tolist()})


def _look(course: Course, contender: Contender) -> Floats:
    """(T,) share of right answers by segment."""
    held_out = enumerate(course.held_out)
    return np.array([_share(rows, contender.classify(segment)) for segment, rows in held_out], np.float64)


def _share(rows: Rows, answers: NDArray[np.int64]) -> float:
    return float(np.mean(answers == rows.labels))


def judged(course: Course, served: Served, looks: Looks | None, s_per_event: float = math.nan) -> Run:
    """All figures of what was served (N, P) and of the looks; see `DEFINITIONS`."""
    labels = course.rows.labels
    hits = 100.0 * (classes(served) == labels)
    loss = log_losses(labels, served)
    near = course.after_drift()
    found = {"accuracy": float(hits[course.start :].mean()), "log_loss": float(loss[course.start :].mean())}
    if course.chances is not None:
        shown = loss - log_losses(labels, course.chances[:, None])
        found |= {"regret": float(shown[course.start :].mean()), "regret_after_drift": float(shown[near].mean())}
    else:
        shown = hits
        found |= {"accuracy_after_drift": float(hits[near].mean())} if near.any() else {}
    curve = arrays(*blocks(shown))
    if looks is not None:
        found |= held_out_figures(looks, [len(rows) for rows in course.held_out])
        curve = seen(looks)
    return Run(found | {"ms_per_event": 1e3 * s_per_event}, curve)


def arrays(x: Sequence[float], y: Sequence[float]) -> tuple[Floats, Floats]:
    return np.array(x), np.array(y)


def log_losses(labels: Floats, served: Floats | Served) -> Floats:
    """(N,) in nats, of probabilities (N, P) at least `CLAMP` from 0 and 1."""
    p = np.clip(served.astype(np.float64), CLAMP, 1 - CLAMP)
    if p.shape[1] == 1:
        return np.asarray(-np.log(np.where(labels > 0.5, p[:, 0], 1 - p[:, 0])))
    return np.asarray(-np.log(p[np.arange(len(p)), labels.astype(np.int64)]))


def held_out_figures(looks: Looks, sizes: Sequence[int]) -> dict[str, float]:
    """In per cent; `sizes` (T,) of what is held out by segment."""
    table = looks.trace.matrix()  # (T, T): R[i, j], on j after i
    found = {
        "final": float(np.average(table[-1], weights=sizes)),
        "min_acc": min_accuracy(looks.trace),
        "wc_acc": worst_case_accuracy(looks.trace),
        "acc": average_accuracy(table),
        "bwt": backward_transfer(table),
        "fwt": forward_transfer(table, looks.untrained),
        "stability_gap": stability_gap(looks.trace),
    }
    return {name: 100.0 * value for name, value in found.items()}


def seen(looks: Looks) -> tuple[Floats, Floats]:
    """Mean accuracy (%) on the segments that have begun, by event."""
    rows = zip(looks.trace.accuracy, looks.trace.during + 1, strict=True)
    return looks.events.astype(np.float64), 100.0 * np.array([row[:begun].mean() for row, begun in rows])


DEFINITIONS = (
    "served figures count every event but the recommender's first 2,000, each answered before its label was learned"
    " from; accuracy in per cent, log_loss in nats; regret: log-loss minus that of the true probabilities on the same"
    " labels; after_drift: of the first 600 events after each change of what is true",
    "final: accuracy in per cent on all that is held out, after the last event; min_acc, wc_acc, acc, bwt, fwt and"
    " stability_gap, in points: as streamcl.metrics.continual defines them, over looks at what is held out of each task"
    " every so many events and at each task's end",
    "sd: over seeds; d_: minus the stream's control, mean over seeds, on the same events with the same initial weights;"
    " p_: two-sided paired t-test; ms_per_event: processor milliseconds of predicting and learning",
    "every recipe: weight 1 for the live example and the stream's replay weight (1 if it names none) for the mean of"
    " the replayed ones, unless the recipe's name says otherwise; one pass, one example at a time; the"
    " beginning of a task is told to GEM, and to recipes with a boundary of segments",
)
