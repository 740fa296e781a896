"""One pass of one learner over one seed of a stream of `bench continual`, and the figures of it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streamcl.bench.continual_course import Course, Rows
from streamcl.bench.quality import CLAMP, Floats, blocks
from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.learner import Learner
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
    """The product's learner, with tickets that wait for their labels."""

    def __init__(self, course: Course, recipe: Mapping[str, Any], seed: int) -> None:
        config = Config.parse(course.config(recipe, seed), "recipe")
        self.course, self.learner = course, Learner(config)
        layout = Featurizer(config).layout
        self.features = course.rows.encoded(layout)
        self.held_out = [rows.encoded(layout) for rows in course.held_out]
        self.tickets: deque[Ticket] = deque()

    def predict(self, i: int) -> Served:
        features = self.features[i]
        scores = self.learner.predict(features)
        segment = str(self.course.segments[i])
        self.tickets.append(Ticket(str(i), float(i), features, scores, Origin(EVENTS, 0, i), segment))
        return scores.served

    def learn(self, i: int) -> None:
        fate = Fate.JOINED if self.course.delay else Fate.INLINE
        outcome = Outcome(self.tickets.popleft(), float(self.course.rows.labels[i]), fate, float(self.course.delay))
        if not self.learner.learn(outcome):
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
    """Accuracy (L, T) on what is held out of each segment, after so many events (L,); the first before any.

    `ends` (T,): the events after which a segment was over. There is a look at each.
    """

    events: NDArray[np.int64]
    accuracy: Floats
    ends: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one pass: figures by name, and how they moved: (events, figure)."""

    figures: Mapping[str, float]
    curve: tuple[Floats, Floats]


def measure(course: Course, contender: Contender) -> Run:
    """Test, then train: an event is answered, then the label of the event `delay` before it is learned from."""
    served: list[Served] = []
    looks = [(0, _look(course, contender))]
    events, cpu_s = len(course.rows), 0.0
    stops = _stops(course)
    for begin, end in zip([0, *stops[:-1]], stops, strict=True):
        start = time.process_time()
        for i in range(begin, end):
            served.append(contender.predict(i))
            if i >= course.delay:
                contender.learn(i - course.delay)
        cpu_s += time.process_time() - start
        looks.append((end, _look(course, contender)))
    ends = np.flatnonzero(np.diff(course.segments, append=-1)) + 1
    found = Looks(np.array([at for at, _ in looks]), np.array([accuracy for _, accuracy in looks]), ends)
    return judged(course, np.stack(served), found, cpu_s / events)


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


def judged(course: Course, served: Served, looks: Looks, s_per_event: float = math.nan) -> Run:
    """All figures of what was served (N, P) and of the looks; see `DEFINITIONS`."""
    labels = course.rows.labels
    hits = (classes(served) == labels).astype(np.float64)
    loss = log_losses(labels, served)
    near = course.after_drift()
    found = {"accuracy": 100.0 * float(hits[course.start :].mean()), "log_loss": float(loss[course.start :].mean())}
    if course.chances is not None:
        regret = loss - log_losses(labels, course.chances[:, None])
        found |= {"regret": float(regret[course.start :].mean()), "regret_after_drift": float(regret[near].mean())}
        shown = regret
    else:
        found |= {"accuracy_after_drift": 100.0 * float(hits[near].mean())} if near.any() else {}
        shown = 100.0 * hits
    if course.held_out:
        found |= held_out_figures(looks, np.array([len(rows) for rows in course.held_out]))
    events, means = blocks(shown)
    curve = _seen(looks) if course.held_out else (np.array(events), np.array(means))
    return Run(found | {"ms_per_event": 1e3 * s_per_event}, curve)


def log_losses(labels: Floats, served: Floats | Served) -> Floats:
    """(N,) in nats, of probabilities (N, P) at least `CLAMP` from 0 and 1."""
    p = np.clip(served.astype(np.float64), CLAMP, 1 - CLAMP)
    if p.shape[1] == 1:
        return np.asarray(-np.log(np.where(labels > 0.5, p[:, 0], 1 - p[:, 0])))
    return np.asarray(-np.log(p[np.arange(len(p)), labels.astype(np.int64)]))


def held_out_figures(looks: Looks, sizes: NDArray[np.int64]) -> dict[str, float]:
    """In per cent; `sizes` (T,) of what is held out by segment."""
    table = looks.accuracy[np.searchsorted(looks.events, looks.ends)]  # (T, T): R[i, j], on j after i
    last, diagonal = table[-1], table.diagonal()
    lowest = [looks.accuracy[looks.events >= end, j].min() for j, end in enumerate(looks.ends[:-1])]
    found = {
        "final": float(np.average(last, weights=sizes)),
        "acc": float(last.mean()),
        "min_acc": float(np.mean(lowest)),
        "bwt": float((last - diagonal)[:-1].mean()),
        "fwt": float((table.diagonal(1) - looks.accuracy[0, 1:]).mean()),
    }
    return {name: 100.0 * value for name, value in found.items()}


def _seen(looks: Looks) -> tuple[Floats, Floats]:
    """Mean accuracy (%) on the segments that have begun, by event."""
    begun = np.searchsorted(looks.ends, looks.events, side="left") + 1  # how many, at each look
    means = [row[:count].mean() for row, count in zip(looks.accuracy, begun, strict=True)]
    return looks.events.astype(np.float64), 100.0 * np.array(means)


DEFINITIONS = (
    "served figures count every event but the recommender's first 2,000, each answered before its label was learned"
    " from; accuracy in per cent, log_loss in nats; regret: log-loss minus that of the true probabilities on the same"
    " labels; after_drift: of the first 600 events after each change of what is true",
    "R[i, j]: accuracy in per cent on what is held out of task j, after task i; final: on all that is held out, after"
    " the last event; acc: mean of R[T, j]; bwt: mean over j < T of R[T, j] - R[j, j]; fwt: mean over j > 1 of"
    " R[j - 1, j] - the untrained net's; min_acc: mean over j < T of the lowest accuracy on task j seen at any look"
    " after its last event (De Lange et al. 2023, arXiv 2205.13452)",
    "sd: over seeds; d_: minus the stream's control, mean over seeds, on the same events with the same initial weights;"
    " p_: two-sided paired t-test; ms_per_event: processor milliseconds of predicting and learning",
    "every recipe: weight 1 for the live example, 1 for the mean of the replayed ones, unless its name says otherwise;"
    " one pass, one example at a time, nothing tells a learner where a task begins, unless it is said",
)
