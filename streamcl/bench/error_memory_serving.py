"""What weights that lag serve of a stream: one live run answers for every way of serving and every delay of labels."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamcl.bench.streams import LABEL, TIME, Dataset
from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.memory import ErrorMemory, Vectors
from streamcl.memory.compensation import GRID, LEAST, Choice
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Recalled, Scores, Ticket

MODES = {"per event": 1, "sync every 200": 200, "sync every 2,000": 2000, "frozen": 0}
"""How many events lie between two refreshes of the serving weights; 1: always the live ones, 0: never."""

NOTHING_SERVED = Scores(np.zeros(1, np.float32), np.zeros(1, np.float32), 0)
"""The live learner does not read what was served: its error memory is empty."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to serve: refreshed every `every` events (see MODES), labels `delay` events late.

    `asked` stands for the same, but for what the weights say of an event when its label has come: a replica asks its
    own weights then, whichever served the event.
    """

    mode: str
    delay: int = 0
    asked: bool = False

    @property
    def every(self) -> int:
        return MODES[self.mode]


@dataclass(frozen=True, slots=True)
class Stream:
    """The events of a dataset, encoded. Learned from before `start`; served, and learned from, after it."""

    data: Dataset
    features: Sequence[Encoded]
    labels: NDArray[np.float64]
    start: int

    @classmethod
    def of(cls, data: Dataset) -> Stream:
        encode = Featurizer(config_of(data, {})).encode
        return cls(data, [encode(payload) for payload in data.payloads], data.labels(), len(data.payloads) // 2)

    def known(self, event: int, delay: int) -> int:
        """How many labels stand before an event: those of the impressions before it, less the last `delay`."""
        shown = (event - self.start) // self.data.impression * self.data.impression
        return self.start + max(shown - delay, 0)

    def outcome(self, event: int, scores: Scores = NOTHING_SERVED) -> Outcome:
        time_s = float(self.data.payloads[event][TIME])
        ticket = Ticket(str(event), time_s, self.features[event], scores, Origin(EVENTS, 0, event))
        return Outcome(ticket, float(self.labels[event]), Fate.INLINE, 0.0)


@dataclass(frozen=True, slots=True)
class Served:
    """What the weights of one setting said of each event from `start` on (n), before any compensation.

    base (n, 1), embedding (n, E), hidden (n, H) float32; version (n,): labels learned from behind the weights.
    """

    base: NDArray[np.float32]
    embedding: NDArray[np.float32]
    hidden: NDArray[np.float32]
    version: NDArray[np.int64]

    def behind(self, scores: NDArray[np.float64]) -> Served:
        """The same, as the next stage sees it: given what the one before has served (n,)."""
        return replace(self, base=scores.astype(np.float32)[:, None])

    @classmethod
    def empty(cls, events: int, widths: tuple[int, int]) -> Served:
        base, embedding, hidden = (np.zeros((events, width), np.float32) for width in (1, *widths))
        return cls(base, embedding, hidden, np.zeros(events, np.int64))


def config_of(data: Dataset, settings: Mapping[str, Any]) -> Config:
    """`settings` (the tables model, optimizer, error_memory, seed) completed by what the stream looks like."""
    shape = {"name": "bench", "events": {"url": "memory://bench/events", "time": TIME, "label": LABEL}}
    return Config.parse({**shape, "features": data.features, **settings}, "bench")


def record(stream: Stream, settings: Mapping[str, Any], wanted: Sequence[Setting]) -> dict[Setting, Served]:
    """Learn the stream event by event; whenever weights are to serve events, write down what they say of them.

    The live learner does not depend on who is served by a copy of it, so one run will do. A copy's answers are taken
    in one pass when its weights are, which is the same to the rounding of a matrix product.
    """
    learner = Learner(config_of(stream.data, settings))
    count = len(stream.features)
    found = {setting: Served.empty(count - stream.start, learner.engine.widths) for setting in wanted}
    due: dict[int, list[tuple[Setting, int, int]]] = {}
    for setting in wanted:
        for weights, first, last in spans(stream, setting):
            due.setdefault(weights, []).append((setting, first, last))
    for event in range(stream.start):
        learner.learn(stream.outcome(event))
    for event in range(stream.start, count):
        _write_down(learner, stream, due.get(event, []), event, found)
        learner.learn(stream.outcome(event))
    return found


def spans(stream: Stream, setting: Setting) -> Iterator[tuple[int, int, int]]:
    """(labels behind the weights, first event, last + 1) of every set of weights, and the events it is asked about."""
    count = len(stream.features)
    step = setting.every or count
    begins = ((stream.known(first, setting.delay), first) for first in range(stream.start, count, step))
    for weights, group in groupby(begins, key=lambda begin: begin[0]):
        first, *_, last = [first for _, first in group] * 2
        end = min(last + step, count)
        if setting.asked:
            first, end = stream.known(first, setting.delay), stream.known(end, setting.delay)
        yield (weights if setting.every else stream.start), first, end


def _write_down(
    learner: Learner,
    stream: Stream,
    due: Sequence[tuple[Setting, int, int]],
    weights: int,
    found: Mapping[Setting, Served],
) -> None:
    if not due:
        return
    batch = [stream.features[event] for _, first, last in due for event in range(first, last)]
    base = np.stack([scores.served for scores in learner.predict_many(batch)])
    ids, slots, dense = (torch.from_numpy(np.stack(column)) for column in zip(*batch, strict=True))
    _, embedding, hidden = learner.engine.look(ids, slots, torch.from_numpy(learner.numerics.apply(dense.numpy())))
    at = 0
    for setting, first, last in due:
        here, there = slice(first - stream.start, last - stream.start), slice(at, at + last - first)
        served = found[setting]
        served.base[here], served.version[here] = base[there], weights
        served.embedding[here], served.hidden[here] = embedding[there].numpy(), hidden[there].numpy()
        at += last - first


@dataclass(frozen=True, slots=True)
class Known:
    """What one form knew of each event of a setting when it was served, and when its label had come (None: never).

    given, label_mean, given_mean, support: (n,) of the former.
    """

    recalled: Sequence[Recalled]
    observed: Sequence[Recalled | None]
    given: NDArray[np.float64]
    label_mean: NDArray[np.float64]
    given_mean: NDArray[np.float64]
    support: NDArray[np.float64]

    @classmethod
    def of(cls, recalled: Sequence[Recalled], observed: Sequence[Recalled | None]) -> Known:
        given, label_mean, given_mean = (
            np.array([float(one[0]) for one in column], np.float64)
            for column in zip(*((each.given, each.label_mean, each.given_mean) for each in recalled), strict=True)
        )
        return cls(recalled, observed, given, label_mean, given_mean, np.array([each.support for each in recalled]))


def know(
    stream: Stream,
    setting: Setting,
    served: Served,
    memory: Mapping[str, Any],
    seed: int,
    asked: Served | None = None,
) -> Known:
    """The same stream again, read and written by a form on the serving copy, as a Learner does it.

    Read with every impression; written with every label, of what was served; renewed when other weights serve. With
    `asked`, as a replica does it: written is what the weights say of the event when its label has come, and lambda is
    judged by the labels that had come before the event. Gamma and lambda change nothing of it.
    """
    config = config_of(stream.data, {"error_memory": [{**memory, "lambda": 0.0}], "seed": seed})
    widths = served.embedding.shape[1], served.hidden.shape[1]
    form, then = (ErrorMemory(config, Featurizer(config).layout, widths) for _ in range(2))
    late: deque[tuple[int, Recalled, float]] = deque()  # for `then`: when the label came, and the record
    form.renew(int(served.version[0]))
    recalled: list[Recalled] = []
    observed: list[Recalled | None] = [None] * len(served.base)
    for events, labels in turns(stream, setting):
        for event in labels:
            label = float(stream.labels[stream.start + event])
            [now] = [recalled[event]] if asked is None else _read(form, stream, asked, slice(event, event + 1))
            observed[event] = now
            if asked is not None:
                while late and late[0][0] <= event:
                    _, old, value = late.popleft()
                    then.write((old,), value)
                [observed[event]] = then.recall_again((now,), [then.stages[0].choice])
                late.append((event + setting.delay, now, label))
            scores = Scores(served.base[event], served.base[event], int(served.version[event]), (now,))
            form.observe(scores, label)
        first = events.start
        if setting.every > 1 and first and served.version[first] != served.version[first - 1]:
            form.renew(int(served.version[first]))
            then.renew(int(served.version[first]))
            late.clear()
        recalled += _read(form, stream, served, slice(events.start, events.stop))
    return Known.of(recalled, observed)


def turns(stream: Stream, setting: Setting) -> Iterator[tuple[range, range]]:
    """(events shown together, whose labels have come since the ones before were shown), counted from `start`."""
    written = 0
    for first in range(0, len(stream.labels) - stream.start, stream.data.impression):
        known = stream.known(stream.start + first, setting.delay) - stream.start
        yield range(first, first + stream.data.impression), range(written, known)
        written = known


def _read(form: ErrorMemory, stream: Stream, served: Served, events: slice) -> list[Recalled]:
    batch = stream.features[stream.start + events.start : stream.start + events.stop]
    vectors = Vectors(served.embedding[events], served.hidden[events])
    _, recalled = form.recall(batch, served.base[events], vectors)
    return [each for [each] in recalled]


def put_right(known: Known, gamma: int, strength: float) -> NDArray[np.float64]:
    """(n,) what would have been served with a fixed lambda."""
    error = known.label_mean - (known.given if gamma else known.given_mean)
    moved = np.clip(known.given + strength * error, LEAST, 1.0 - LEAST)
    return np.where((known.support > 0) & (strength > 0), moved, known.given)


def put_right_by_choice(
    stream: Stream, setting: Setting, known: Known, memory: Mapping[str, Any], gamma: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) what would have been served with lambda by itself, and (n,) that lambda, event by event."""
    half_life = config_of(stream.data, {"error_memory": [memory]}).error_memory[0].lambda_half_life_events
    choice = Choice((float(gamma),), GRID, half_life, "binary")
    scores, strengths = np.zeros(len(known.given)), np.zeros(len(known.given))
    for events, labels in turns(stream, setting):
        for event in labels:
            if (observed := known.observed[event]) is not None:
                choice.observe(observed, np.array([stream.labels[stream.start + event]], np.float32))
        for event in events:
            scores[event], strengths[event] = choice.serve(known.recalled[event])[0], choice.pair[0, 1]
    return scores, strengths
