"""What weights that lag serve of a stream: one live run answers for every way of serving and every delay of labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
class Compensated:
    """What an error memory made of one setting's scores: served (n,), and of its last stage what it knew (n,)."""

    served: NDArray[np.float64]
    given: NDArray[np.float64]
    label_mean: NDArray[np.float64]
    given_mean: NDArray[np.float64]
    support: NDArray[np.float64]
    strength: NDArray[np.float64]  # lambda of the last stage
    read: Mapping[str, float]


def compensate(
    stream: Stream,
    setting: Setting,
    served: Served,
    memories: Sequence[Mapping[str, Any]],
    seed: int,
    asked: Served | None = None,
) -> Compensated:
    """The same stream again, read and written by an error memory on the serving copy, as a Learner does it.

    Read with every impression; written with every label, of what was served; renewed when other weights serve. With
    `asked`, as a replica does it: written is what the weights say of the event when its label has come.
    """
    config = config_of(stream.data, {"error_memory": memories, "seed": seed})
    widths = served.embedding.shape[1], served.hidden.shape[1]
    memory = ErrorMemory(config, Featurizer(config).layout, widths)
    memory.renew(int(served.version[0]))
    tickets: list[Scores] = []
    strengths = np.zeros(len(served.base))
    written = 0
    for first in range(0, len(served.base), stream.data.impression):
        for event in range(written, stream.known(stream.start + first, setting.delay) - stream.start):
            [scores] = [tickets[event]] if asked is None else _read(memory, stream, asked, slice(event, event + 1))
            memory.observe(scores, float(stream.labels[stream.start + event]))
            written = event + 1
        if setting.every > 1 and first and served.version[first] != served.version[first - 1]:
            memory.renew(int(served.version[first]))
        shown = slice(first, first + stream.data.impression)
        strengths[shown] = memory.stages[-1].choice.pair[0, 1]
        tickets += _read(memory, stream, served, shown)
    return _columns(tickets, strengths, memory.read())


def _read(memory: ErrorMemory, stream: Stream, served: Served, events: slice) -> list[Scores]:
    batch = stream.features[stream.start + events.start : stream.start + events.stop]
    base, versions = served.base[events], served.version[events].tolist()
    scores, recalled = memory.recall(batch, base, Vectors(served.embedding[events], served.hidden[events]))
    return [Scores(*each) for each in zip(base, scores, versions, recalled, strict=True)]


def _columns(tickets: Sequence[Scores], strengths: NDArray[np.float64], read: Mapping[str, float]) -> Compensated:
    last: list[Recalled] = [scores.recalled[-1] for scores in tickets]
    return Compensated(
        np.array([scores.served[0] for scores in tickets], np.float64),
        np.array([recalled.given[0] for recalled in last], np.float64),
        np.array([recalled.label_mean[0] for recalled in last], np.float64),
        np.array([recalled.given_mean[0] for recalled in last], np.float64),
        np.array([recalled.support for recalled in last], np.float64),
        strengths,
        read,
    )
