"""A learner's life in miniature: examples, labels that come late, signals; and what may not happen meanwhile."""

from __future__ import annotations

import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from streamcl.config import Config
from streamcl.join import tickets_from_state, tickets_to_state
from streamcl.learner import Learner
from streamcl.protocols import State
from streamcl.records import EVENTS, Encoded, Event, Fate, Origin, Outcome, Scores, Signal, Ticket
from streamcl.state import flatten
from streamcl.testing.state import claim

CLASSES, FIELDS, NUMBERS, KEYS = 4, 2, 3, 5


class Example(NamedTuple):
    """An event and its label, before it has been answered."""

    features: Encoded
    label: float
    key: str


class Journey:
    """A learner, the labels that it waits for, and the stream that it is told.

    Args:
        delay: Events between an event and its label; None: labels never come.
        on_close: Without a label: `negative` teaches 0 (the event is learned `window` events later), `drop` nothing.
        boundaries: Every so many events a `boundary` and every third of these a `drift` is signalled; 0: never.
    """

    def __init__(self, config: Config, delay: int | None = 0, on_close: str = "drop", boundaries: int = 20) -> None:
        self.learner = Learner(config)
        self.delay, self.on_close, self.boundaries = delay, on_close, boundaries
        self.waiting: deque[tuple[Ticket, float]] = deque()
        self.count = 0

    def take(self, example: Example, number: int) -> Scores:
        """Answer an event, then learn what has become due. Returns the answer."""
        origin = Origin(EVENTS, 0, number)
        event = Event(f"id-{number}", example.key, float(number), example.features, origin)
        features, scores = self.learner.answer(event)
        if self.learner.fused is not None:
            self.learner.fused.settle()
        ticket = Ticket(event.id, event.time_s, features, scores, origin, key=example.key)
        self.waiting.append((ticket, example.label))
        while len(self.waiting) > (7 if self.delay is None else self.delay):
            ticket, label = self.waiting.popleft()
            if self.delay is not None:
                self.learner.learn(Outcome(ticket, label, Fate.JOINED, 0.0), self._signals(origin))
            elif self.on_close == "negative":
                self.learner.learn(Outcome(ticket, 0.0, Fate.EXPIRED, 7.0), self._signals(origin))
        return scores

    def _signals(self, origin: Origin) -> Sequence[Signal]:
        self.count += 1
        if not self.boundaries or self.count % self.boundaries:
            return ()
        found = [Signal("boundary", "clock", origin)]
        return found if self.count % (3 * self.boundaries) else [*found, Signal("drift", "loss", origin)]

    def state_dict(self) -> State:
        return {
            "learner": self.learner.state_dict(),
            "count": self.count,
            "tickets": tickets_to_state([ticket for ticket, _ in self.waiting]),
            "labels": [label for _, label in self.waiting],
        }

    def load_state_dict(self, state: State) -> None:
        self.learner.load_state_dict(state["learner"])
        self.count = state["count"]
        self.waiting = deque(zip(tickets_from_state(state["tickets"]), state["labels"], strict=True))


def examples(task: str, count: int, seed: int = 0) -> list[Example]:
    """Every key has a taste, which changes once; numbers are such that none comes twice."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        key = int(rng.integers(KEYS))
        ids = np.array([key, 21 + int(rng.integers(20))], np.int64)
        dense = rng.normal(size=NUMBERS).astype(np.float32)
        shift = 1 if i > count // 2 else 0
        labels = {"binary": (key + shift) % 2, "multiclass": (key + shift) % CLASSES}
        label = float(labels.get(task, key + shift + 0.1 * float(dense[0])))
        found.append(Example(Encoded(ids, np.ones(FIELDS, np.float32), dense), label, f"key-{key}"))
    return found


def finite(state: State, promise: str) -> None:
    for path, array in flatten({name: part for name, part in state.items() if name not in ("memory",)})[1].items():
        values = np.asarray(array)
        raw = "/tables/" in path  # examples, as the memory's: what is missing is NaN there
        if values.dtype.kind == "f" and "diagnostics" not in path and "owner_time" not in path and not raw:
            claim(bool(np.isfinite(values).all()), f"{promise}: {path} is not finite")


def lived(journey: Journey, stream: Sequence[Example]) -> Journey:
    for n, example in enumerate(stream):
        journey.take(example, n)
    return journey


def answers(journey: Journey, stream: Sequence[Example]) -> list[NDArray[np.float32]]:
    return [journey.take(example, n).served for n, example in enumerate(stream)]


def loaded(config: Config, state: State) -> Learner:
    learner = Learner(config)
    learner.load_state_dict(state)
    return learner


@contextmanager
def sealed() -> Iterator[None]:
    """Clocks raise, and global generators must stay where they are."""
    clocks = ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns")
    kept = {name: getattr(time, name) for name in clocks}

    def refuse() -> float:
        raise AssertionError("broken: a clock was read")

    before = _generators()
    try:
        for name in clocks:
            setattr(time, name, refuse)
        yield
    finally:
        for name, clock in kept.items():
            setattr(time, name, clock)
    claim(before == _generators(), "no global generator is drawn from")


def _generators() -> tuple[bytes, str, str]:
    return torch.get_rng_state().numpy().tobytes(), str(random.getstate()), str(np.random.get_state())


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many functions are called, of Python and of C, in the one place of the list."""
    count = [0]

    def profile(_frame: Any, event: str, _arg: Any) -> None:
        count[0] += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield count
    finally:
        sys.setprofile(before)
